"""normswap's own Triton kernels: all forms, castings and dtypes, one persistent backward kernel, never in place."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial

from normswap.kernels.backend import Abilities, Backend, Kernel
from normswap.kernels.call import Call


class Triton(Backend):
    name = "triton"
    about = "normswap's own kernels"
    package = module = "triton"
    abilities = Abilities(
        devices=("cuda",),
        castings=("float32", "float32-before-gain", "input"),
        capability=(7, 0),
        compile="custom operators, opaque to Inductor: one graph, no fusion with what is around them",
        distributed="custom operators with sharding rules: rows may be sharded",
        dtensor=True,
    )

    def rejects(self, call: Call) -> str | None:
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # on the CPU, slowly: for tests
        abilities = replace(self.abilities, devices=("cpu", "cuda")) if interpreted else self.abilities
        return self.missing() or abilities.rejects(call)

    def build(self, call: Call) -> Kernel:
        from normswap.kernels.triton import ops

        function = getattr(ops, call.form.replace("-", "_"))
        options = {}
        for norm, suffix in zip(call.norms, ("", "2"), strict=False):
            told = {"kind": norm.kind, "eps": norm.eps, "gain": norm.gain, "casting": norm.casting}
            options |= {f"{name}{suffix}": value for name, value in (told | {"out_dtype": norm.out_dtype}).items()}
        return partial(function, **options)


BACKEND = Triton()
