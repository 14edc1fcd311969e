"""A call in plain torch, with every rounding that its modules do: what a compiler is given."""

from __future__ import annotations

import torch

from normswap.kernels.backend import Kernel
from normswap.kernels.call import Call, Norm


def decomposed(call: Call) -> Kernel:
    """The call as a differentiable function of plain torch operations."""
    norm, then = call.norm, call.then

    def of_norm(x, weight, bias):
        return normalised(x, weight, bias, norm)

    def add_norm(x, residual, weight, bias):
        s = residual + x
        return normalised(s, weight, bias, norm), s

    def norm_add(x, residual, weight, bias):
        return residual + normalised(x, weight, bias, norm)

    def norm_add_norm(x, residual, weight, bias, weight2, bias2):
        s = residual + normalised(x, weight, bias, norm)
        return normalised(s, weight2, bias2, then), s

    return {"norm": of_norm, "add-norm": add_norm, "norm-add": norm_add, "norm-add-norm": norm_add_norm}[call.form]


def normalised(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, norm: Norm) -> torch.Tensor:
    """`gain(w) * (x - m) / sqrt(mean((x - m)^2) + eps) + b` over the last axis; m = 0 for an rmsnorm.

    Shapes: x `(..., width)`; weight and bias `(width,)`.
    """
    h = x if norm.casting == "input" else x.to(torch.promote_types(x.dtype, torch.float32))
    if norm.kind == "layernorm":
        h = h - h.mean(-1, keepdim=True)
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + norm.eps)
    if norm.casting == "float32-before-gain":
        h = h.to(x.dtype)
    elif weight is not None:
        weight = weight.to(h.dtype)
    if weight is not None:
        h = h * (1 + weight if norm.gain == "1 + w" else weight)
    if bias is not None:
        h = h + bias
    return h.to(norm.out_dtype)
