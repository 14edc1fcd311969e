"""quack-kernels (Dao-AILab): CuTe kernels for Hopper and later; RMSNorm and residual add + RMSNorm, one rounding."""

from __future__ import annotations

from normswap.kernels.backend import Abilities, Backend, Kernel
from normswap.kernels.call import Call


class Quack(Backend):
    name = "quack"
    about = "quack-kernels, for compute capability 9 and later"
    package, module = "quack-kernels", "quack"
    abilities = Abilities(
        devices=("cuda",),
        forms=("norm", "add-norm"),
        kinds=("rmsnorm",),  # its layernorm is two plain functions without a gradient
        castings=("float32",),
        bias=("rmsnorm",),
        capability=(9, 0),
        compile="custom operators",
        distributed="plain tensors",
    )

    def build(self, call: Call) -> Kernel:
        from quack.rmsnorm import rmsnorm

        norm = call.norm
        options = {"eps": norm.eps, "out_dtype": norm.out_dtype, "weight_offset": float(norm.gain == "1 + w")}
        if call.form == "norm":
            return lambda x, weight, bias: rmsnorm(x, weight, bias, **options)
        return lambda x, residual, weight, bias: rmsnorm(
            x, weight, bias, residual, residual_dtype=call.dtype, prenorm=True, **options
        )


BACKEND = Quack()
