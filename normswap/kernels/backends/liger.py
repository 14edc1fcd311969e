"""Liger-Kernel (Hsu et al., arXiv 2410.10989): Triton kernels for RMSNorm, residual add + RMSNorm, LayerNorm.

Its RMSNorms are called with `in_place=False`: in `residual + norm(x)` the incoming gradient is the residual's as well,
and a backward that writes into it corrupts the residual's (Liger-Kernel issues 370, 581 and 980).
"""

from __future__ import annotations

from normswap.kernels.backend import Abilities, Backend, Kernel
from normswap.kernels.call import Call

_CASTINGS = {"float32": "gemma", "float32-before-gain": "llama"}


class Liger(Backend):
    name = "liger"
    about = "Liger-Kernel, never in place"
    package, module = "liger-kernel", "liger_kernel"
    abilities = Abilities(
        devices=("cuda", "xpu"),
        forms=("norm", "add-norm"),
        bias=("layernorm",),
        mixed=False,
        capability=(7, 0),
        compile="breaks the graph into an autograd.Function that Dynamo traces",
        distributed="gathers a DTensor whole",
    )

    def rejects(self, call: Call) -> str | None:
        found = super().rejects(call)
        if found or call.norm.kind == "rmsnorm":
            return found if found or call.form == "norm" or call.norm.gain else "has no add-norm without gain"
        if call.form != "norm":
            return f"has no {call.form} of a layernorm"
        if call.norm.gain != "w" or not call.norm.bias or call.norm.casting != "float32":
            return "its layernorm has a gain and a bias, and rounds once"
        return None

    def build(self, call: Call) -> Kernel:
        norm = call.norm
        if norm.kind == "layernorm":
            from liger_kernel.ops.layer_norm import LigerLayerNormFunction

            return lambda x, weight, bias: LigerLayerNormFunction.apply(x, weight, bias, norm.eps)
        offset, casting = float(norm.gain == "1 + w"), _CASTINGS[norm.casting]
        if call.form == "norm":
            from liger_kernel.ops.rms_norm import LigerRMSNormFunction

            return lambda x, weight, bias: LigerRMSNormFunction.apply(x, weight, norm.eps, offset, casting, False)
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

        return lambda x, residual, weight, bias: LigerFusedAddRMSNormFunction.apply(
            x, residual, weight, norm.eps, offset, casting, False
        )


BACKEND = Liger()
