"""Casting modes as what they are to a kernel: the dtypes that values are rounded to on their way.

All arithmetic is done in `acc`, float32 or float64, and a value that the eager module keeps in a narrower dtype is
rounded to it where the module does so. With X the input's dtype, W the gain's and B the bias's, and P(a, b) what torch
promotes to:

    casting               step   hat   gained    biased
    float32               acc    acc   acc       acc       one rounding, of the output
    float32-before-gain   acc    X     P(X, W)   P(gained, B)
    input                 X      X     P(X, W)   P(gained, B)

`step` is every value up to the root: the mean, x - m, its square, the mean of these, that + eps, its rsqrt; `hat` is
the normalised input; `gained` is 1 + w, and the product with the gain; `biased` is the sum with the bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton.language as tl

TRITON_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


@dataclass(frozen=True)
class Roundings:
    """Triton dtypes, see above."""

    acc: tl.dtype
    step: tl.dtype
    hat: tl.dtype
    gained: tl.dtype
    biased: tl.dtype


@cache
def roundings(casting: str, x: torch.dtype, weight: torch.dtype | None, bias: torch.dtype | None) -> Roundings:
    """The roundings of a norm in `casting` on input of dtype `x`; None for a gain or bias that is not there."""
    acc = accumulator(x)
    if casting == "float32":
        return Roundings(acc, acc, acc, acc, acc)
    gained = x if weight is None else torch.promote_types(x, weight)
    biased = gained if bias is None else torch.promote_types(gained, bias)
    of = TRITON_DTYPES
    return Roundings(acc, of[x] if casting == "input" else acc, of[x], of[gained], of[biased])


def accumulator(x: torch.dtype) -> tl.dtype:
    """What a norm of such input computes in."""
    return tl.float64 if x == torch.float64 else tl.float32
