"""Inductor: the call in plain torch, compiled alone. On a GPU it makes Triton kernels, on a CPU C++.

A model that is compiled as a whole needs none of this: there, norms are left as they are and fuse with what is around
them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from types import FunctionType

import torch

from normswap.kernels.backend import Abilities, Backend, Kernel
from normswap.kernels.call import Call
from normswap.kernels.decomposed import decomposed


class Compile(Backend):
    name = "compile"
    about = "torch.compile of the norm alone"
    abilities = Abilities(
        devices=("cpu", "cuda"),
        castings=("float32", "float32-before-gain", "input"),
        compile="traced into the graph around it",
        distributed="plain tensors",
        max_width=2**31 - 1,
    )

    def missing(self) -> str | None:
        if not torch.cuda.is_available() and not any(map(shutil.which, ("c++", "g++", "clang++"))):
            return "Inductor needs a C++ compiler (g++ or clang++), and there is none on the PATH"
        return None

    def build(self, call: Call) -> Kernel:
        # Inductor keeps what is rounded between two operations in float32, unless it is told not to
        rounds = any(norm.casting != "float32" for norm in call.norms) or call.form != "norm"
        options = {"emulate_precision_casts": True} if rounds and call.dtype != torch.float32 else None
        compiled = torch.compile(_own_code(decomposed(call)), dynamic=True, options=options)

        def run(x, *tensors):
            # rows of one shape: one compilation serves every batch
            held = tensors if call.form == "norm" else (tensors[0].reshape(-1, call.width), *tensors[1:])
            y = compiled(x.reshape(-1, call.width), *held)
            return y.view(x.shape) if isinstance(y, torch.Tensor) else tuple(t.view(x.shape) for t in y)

        return run


def _own_code(function: Callable) -> Callable:
    """The function with a code object of its own: Dynamo counts recompilations by code, and all calls share one."""
    code = function.__code__.replace()
    return FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)


BACKEND = Compile()
