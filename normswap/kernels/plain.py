"""A norm in plain torch: what a compiler is given, and what is differentiated twice."""

from __future__ import annotations

import torch

from normswap.norms.spec import Casting, GainForm


def plain(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    kind: str,
    eps: float,
    gain: GainForm | None,
    casting: Casting,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """`gain(weight) * (x - m) / sqrt(mean((x - m)^2) + eps) + bias` over the last axis, rounded as a module would.

    Args:
        x: (..., width), of any floating dtype.
        weight, bias: (width,).
        kind: `layernorm`, m = mean(x), or `rmsnorm`, m = 0.
        casting: see `NormSpec`.
        out_dtype: of the output.
    """
    h = x if casting == "input" else x.to(torch.promote_types(x.dtype, torch.float32))
    if kind == "layernorm":
        h = h - h.mean(-1, keepdim=True)
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    if casting == "float32-before-gain":
        h = h.to(x.dtype)
    factor = factor_of(weight, gain, casting, h.dtype)
    h = h if factor is None else h * factor
    h = h if bias is None else h + bias
    return h.to(out_dtype)


def factor_of(weight: torch.Tensor | None, gain: GainForm | None, casting: Casting, wide: torch.dtype):
    """What a row is multiplied by, in the dtype in which the module has it."""
    if weight is None:
        return None
    weight = weight if casting == "float32-before-gain" else weight.to(wide)
    return 1 + weight if gain == "1 + w" else weight


def gradients_of_plain(
    tensors: tuple[torch.Tensor | None, ...], needed: tuple[bool, ...], dy: torch.Tensor, how: dict
) -> list[torch.Tensor | None]:
    """Gradients of x, weight and bias that can be differentiated again, computed in float32."""
    y = plain(
        *(None if t is None else t.float() for t in tensors), **how | {"casting": "float32", "out_dtype": torch.float32}
    )
    of = [t for t, is_needed in zip(tensors, needed, strict=True) if is_needed]
    found = iter(torch.autograd.grad(y, of, dy.float(), create_graph=True))
    return [next(found) if is_needed else None for is_needed in needed]
