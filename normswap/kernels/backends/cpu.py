"""normswap's own C kernel for CPUs, compiled by the machine's C compiler when it is first used."""

from __future__ import annotations

from functools import partial

from normswap.kernels.backend import Abilities, Backend, Kernel
from normswap.kernels.call import Call


class Cpu(Backend):
    name = "cpu"
    about = "normswap's own C kernel, for CPUs"
    abilities = Abilities(
        devices=("cpu",),
        forms=("norm",),
        max_width=2**31 - 1,
        compile="a custom operator, opaque to Inductor",
        distributed="plain tensors",
    )

    def missing(self) -> str | None:
        from normswap.kernels.cpu.library import available

        return available()

    def build(self, call: Call) -> Kernel:
        from normswap.kernels.cpu.norm import norm

        told = call.norm
        return partial(
            norm, kind=told.kind, eps=told.eps, gain=told.gain, casting=told.casting, out_dtype=told.out_dtype
        )


BACKEND = Cpu()
