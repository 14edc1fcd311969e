"""A call in plain torch, with every rounding that its modules do: what a compiler is given."""

from __future__ import annotations

from functools import partial

from normswap.kernels.backend import Kernel
from normswap.kernels.call import Call, Norm
from normswap.kernels.plain import plain


def decomposed(call: Call) -> Kernel:
    """The call as a differentiable function of plain torch operations."""
    first = _plain(call.norm)
    second = None if call.then is None else _plain(call.then)

    def add_norm(x, residual, weight, bias):
        s = residual + x
        return first(s, weight, bias), s

    def norm_add(x, residual, weight, bias):
        return residual + first(x, weight, bias)

    def norm_add_norm(x, residual, weight, bias, weight2, bias2):
        s = residual + first(x, weight, bias)
        return second(s, weight2, bias2), s

    def of_norm(x, weight, bias):
        return first(x, weight, bias)

    return {"norm": of_norm, "add-norm": add_norm, "norm-add": norm_add, "norm-add-norm": norm_add_norm}[call.form]


def _plain(norm: Norm) -> Kernel:
    return partial(plain, kind=norm.kind, eps=norm.eps, gain=norm.gain, casting=norm.casting, out_dtype=norm.out_dtype)
