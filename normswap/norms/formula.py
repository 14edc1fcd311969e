"""The mathematics of `NormSpec`, to hold a module's output against."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional as F

from normswap.norms.spec import NormSpec


def formula(
    x: torch.Tensor, spec: NormSpec, tensors: Mapping[str, torch.Tensor], z: torch.Tensor | None = None
) -> torch.Tensor:
    """`spec` applied to `x` (batch first), with its casting; for every kind but batchnorm (`running_affine`).

    Args:
        tensors: the module's parameters, by the names in `spec`.
        z: what the gate reads, of the shape of `x`; for gated norms only.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    h = x if spec.casting == "input" else x.to(wide)
    factor = None if spec.gate is None else getattr(F, spec.gate.activation)(z.to(h.dtype))
    if spec.gate is not None and spec.gate.place == "before":
        h = h * factor
    h = _grouped(h, spec)
    if spec.casting == "float32-before-gain":
        h = h.to(x.dtype)
    if spec.weight is not None:
        weight = placed(tensors[spec.weight].to(h.dtype), x.ndim, spec)
        h = h * (1 + weight if spec.gain == "1 + w" else weight)
    if spec.bias is not None:
        h = h + placed(tensors[spec.bias].to(h.dtype), x.ndim, spec)
    if spec.gate is not None and spec.gate.place == "after":
        h = h * factor
    return h.to(x.dtype)


def running_affine(tensors: Mapping[str, torch.Tensor], eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """What a batchnorm is as it runs, `y = a x + c`: a and c, per channel.

    Args:
        tensors: `mean` and `variance`, and `gain` and `bias` where it has them.
    """
    a = torch.rsqrt(tensors["variance"] + eps)
    a = a * tensors["gain"] if "gain" in tensors else a
    c = -a * tensors["mean"]
    return a, c + tensors["bias"] if "bias" in tensors else c


def placed(p: torch.Tensor, ndim: int, spec: NormSpec) -> torch.Tensor:
    """A parameter shaped to act on values of `ndim` axes: one axis lies along the first normalised axis."""
    if p.ndim != 1 or p.numel() == 1:
        return p
    return p.reshape([-1 if axis - ndim == spec.axes[0] else 1 for axis in range(ndim)])


def _grouped(h: torch.Tensor, spec: NormSpec) -> torch.Tensor:
    """The groups of `h`, each normalised, without gain and bias."""
    if spec.kind == "groupnorm":
        return _normalised(h.reshape(h.shape[0], spec.groups, -1), (-1,), spec).reshape(h.shape)
    if spec.groups > 1:
        axis = spec.axes[0] % h.ndim
        return _normalised(h.unflatten(axis, (spec.groups, -1)), (axis + 1,), spec).flatten(axis, axis + 1)
    return _normalised(h, spec.axes, spec)


def _normalised(h: torch.Tensor, axes: tuple[int, ...], spec: NormSpec) -> torch.Tensor:
    if spec.kind != "rmsnorm":
        h = h - h.mean(axes, keepdim=True)
    return h * torch.rsqrt(h.square().mean(axes, keepdim=True) + spec.eps)
