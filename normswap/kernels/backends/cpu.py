"""normswap's own C kernel for CPUs, compiled by the machine's C compiler when it is first used.

On a machine without one, the same in as few passes of torch's operators as they allow.
"""

from __future__ import annotations

from functools import partial

from normswap.kernels.backend import Abilities, Backend, Kernel
from normswap.kernels.call import Call


class Cpu(Backend):
    name = "cpu"
    about = "normswap's own C kernel for CPUs; without a compiler few passes of torch"
    abilities = Abilities(
        devices=("cpu",),
        forms=("norm",),
        max_width=2**31 - 1,
        compile="traced as plain torch, which Inductor fuses",
        distributed="plain tensors",
    )

    def version(self) -> str:
        from normswap.kernels.cpu import available

        return f"{super().version()}, {'compiled' if available() is None else 'without a compiler'}"

    def build(self, call: Call) -> Kernel:
        from normswap.kernels.cpu import available, few_passes, norm

        told = call.norm
        return partial(
            norm if available() is None else few_passes,
            kind=told.kind,
            eps=told.eps,
            gain=told.gain,
            casting=told.casting,
            out_dtype=told.out_dtype,
        )


BACKEND = Cpu()
