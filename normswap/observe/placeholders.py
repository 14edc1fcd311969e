"""Where real values meet unknown ones: what a call gets to see of a tensor that has a shape but no values."""

from __future__ import annotations

from typing import Literal

import torch

META = torch.device("meta")
#: which entries of an unknown mask count as set
Hits = Literal["ends", "first", "every"]

LIKE_FACTORIES = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"}
INDEXING = {"__getitem__", "__setitem__"}


def off_meta(leaf):
    on_meta = isinstance(leaf, torch.device | str) and str(leaf) == "meta"
    return torch.device("cpu") if on_meta else leaf


def to_meta(leaf):
    if isinstance(leaf, torch.device):
        return META
    return leaf.to(META) if isinstance(leaf, torch.Tensor) and not leaf.is_meta else leaf


def known_index(leaf):
    """An index that meta tensors can be indexed by."""
    if isinstance(leaf, torch.Tensor) and leaf.is_meta and leaf.dtype == torch.bool and leaf.ndim == 1:
        return torch.tensor(sorted({0, len(leaf) - 1}))  # the two ends, as with `nonzero`
    if isinstance(leaf, torch.Tensor) and not leaf.is_meta and leaf.dtype == torch.bool and leaf.ndim:
        found = leaf.nonzero(as_tuple=True)  # how many are set is known, which a mask on the meta device hides
        return found[0] if leaf.ndim == 1 else found
    if isinstance(leaf, torch.Tensor) and not leaf.is_meta and leaf.ndim == 0 and not leaf.is_floating_point():
        return leaf.item()
    return leaf


def _hits(which: Hits, mask: torch.Tensor, as_tuple: bool = False) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """`nonzero` of an unknown mask: its two ends, so that code for hits runs, on the first and last of a kind.

    The ends are enough for experts that share a tensor; experts with parameters of their own must run one by one.
    """
    ends = [0] if which == "first" else sorted({0, mask.numel() - 1})
    flat = torch.arange(mask.numel()) if which == "every" and mask.ndim == 1 else torch.tensor(ends)
    columns = torch.unravel_index(flat, mask.shape) if mask.ndim else (flat,)
    return columns if as_tuple else torch.stack(columns, 1)


def _where(which: Hits, condition, *rest, **kwargs):
    return NotImplemented if rest or kwargs else _hits(which, condition, as_tuple=True)


def _zero(tensor, *_, **__):
    return torch.zeros((), dtype=tensor.dtype).item()


PLACEHOLDERS = {
    "item": _zero,
    "__bool__": lambda tensor: False,
    "is_nonzero": lambda tensor: False,
    "__int__": lambda tensor: 0,
    "__index__": lambda tensor: 0,
    "__float__": lambda tensor: 0.0,
    "equal": lambda a, b: False,
    "allclose": lambda a, b, **_: False,
    "cpu": lambda tensor, **_: tensor,
    "tolist": lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype).tolist(),
}
HITS = {"nonzero": _hits, "where": _where}
