"""normswap's own C kernel for CPUs, compiled by the machine's C compiler when it is first used.

Where there is no compiler, torch's operators on a few rows at a time.
"""

from __future__ import annotations

from functools import partial

from normswap.kernels.backend import Abilities, Backend, Kernel
from normswap.kernels.call import Call


class Cpu(Backend):
    name = "cpu"
    about = "normswap's own C kernel, for CPUs; without a C compiler, few passes of torch"
    abilities = Abilities(
        devices=("cpu",),
        forms=("norm",),
        max_width=2**31 - 1,
        compile="plain torch, which Inductor fuses with what is around it",
        distributed="plain tensors",
    )

    def version(self) -> str:
        from normswap.kernels.cpu import available

        return super().version() + ("" if available() is None else ", without a C compiler")

    def build(self, call: Call) -> Kernel:
        from normswap.kernels.cpu import available, few_passes, norm

        told = call.norm
        return partial(
            norm if available() is None else few_passes,
            kind=told.kind, eps=told.eps, gain=told.gain, casting=told.casting, out_dtype=told.out_dtype,
        )  # fmt: skip


BACKEND = Cpu()
