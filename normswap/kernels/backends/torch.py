"""torch's own functions, `F.rms_norm` and `F.layer_norm`: nothing to install, one rounding at the end."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from normswap.kernels.backend import Abilities, Backend, Kernel
from normswap.kernels.call import Call


class Torch(Backend):
    name = "torch"
    about = "F.rms_norm and F.layer_norm"
    abilities = Abilities(
        devices=("cpu", "cuda", "mps", "xpu"),
        dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16),
        forms=("norm",),
        gains=(None, "w"),
        castings=("float32",),
        bias=("layernorm",),
        mixed=False,
        max_width=2**31 - 1,
        compile="traced, and fused by Inductor with what is around it",
        distributed="DTensor has rules for both",
        dtensor=True,
    )

    def build(self, call: Call) -> Kernel:
        eps, shape = call.norm.eps, (call.width,)
        if call.norm.kind == "rmsnorm":
            return lambda x, weight, bias: F.rms_norm(x, shape, weight, eps)
        return lambda x, weight, bias: F.layer_norm(x, shape, weight, bias, eps)


BACKEND = Torch()
