"""Kinds of norm as people write them."""

from __future__ import annotations

_NAMES = {
    "layernorm": "LayerNorm",
    "rmsnorm": "RMSNorm",
    "batchnorm": "BatchNorm",
    "groupnorm": "GroupNorm",
    "dyt": "DyT",
    "derf": "Derf",
    "repbn": "RepBN",
    "none": "frozen scale",
    "none-eps": "frozen scale by eps",
    "affine": "affine map",
}


def kind_name(kind: str) -> str:
    """A kind of norm as people write it; one that is not known by another name is written as it is asked for."""
    form, _, rest = kind.partition("-")
    return _NAMES.get(kind) or (f"{form} {_NAMES[rest]}" if rest in _NAMES else kind)
