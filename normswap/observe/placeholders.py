"""Where real values meet unknown ones: what a call gets to see of a tensor that has a shape but no values."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Literal

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from normswap.observe.alike import alike

META = torch.device("meta")
#: which entries of an unknown mask count as set
Hits = Literal["ends", "first", "every"]

LIKE_FACTORIES = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"}
#: of their second argument these look at shape, dtype and device alone
LIKENING = {"expand_as", "view_as", "reshape_as", "type_as", "to"}
LARGEST_STAND_IN = 1 << 26  # elements


def off_meta(leaf):
    on_meta = isinstance(leaf, torch.device | str) and str(leaf) == "meta"
    return torch.device("cpu") if on_meta else leaf


def likeness(leaf):
    """A tensor off the meta device with the shape and dtype of `leaf`, and no memory for its values."""
    on_meta = isinstance(leaf, torch.Tensor) and leaf.is_meta
    return torch.zeros((), dtype=leaf.dtype).expand(leaf.shape) if on_meta else off_meta(leaf)


def to_meta(leaf):
    if isinstance(leaf, torch.device):
        return META
    return leaf.to(META) if isinstance(leaf, torch.Tensor) and not leaf.is_meta else leaf


def numbers(leaf):
    """A size that is a known tensor, as a number: meta tensors take no other."""
    whole = isinstance(leaf, torch.Tensor) and not leaf.is_meta and leaf.ndim == 0 and not leaf.is_floating_point()
    return leaf.item() if whole and leaf.dtype != torch.bool else leaf


def on_meta(function: Callable, args: tuple, kwargs: dict, which: Hits) -> tuple[object, bool]:
    """Call `function` on tensors without values, and give back such, and whether unknown values were guessed for it.

    Where the meta device cannot say what comes out (the shape depends on values: a mask as an index, counts of
    repeats), the call is made for real: known values as they are, others replaced by a stand-in.
    """
    try:
        return alike(function, tree_map(to_meta, args), tree_map(to_meta, kwargs)), False
    except (NotImplementedError, RuntimeError) as failed:
        error = failed
    with suppress(NotImplementedError, RuntimeError):
        numbered = tree_map(numbers, (args, kwargs))
        args_on_meta, kwargs_on_meta = tree_map(to_meta, numbered)
        return function(*args_on_meta, **kwargs_on_meta), False
    result = None
    for whole in (0, 1):  # the place of an index, else a count: with counts of zero nothing would be left
        with suppress(NotImplementedError, RuntimeError, IndexError):
            result = _on_stand_ins(function, args, kwargs, which, whole)
            if all(t.numel() for t in tree_flatten(result)[0] if isinstance(t, torch.Tensor)):
                break
    if result is None:
        raise error
    return result


def _on_stand_ins(function: Callable, args: tuple, kwargs: dict, which: Hits, whole: int) -> tuple[object, bool]:
    leaves, spec = tree_flatten((args, kwargs))
    stand_ins = {id(t): _stand_in(t, which, whole) for t in leaves if isinstance(t, torch.Tensor) and t.is_meta}
    if sum(t.numel() for t in stand_ins.values()) > LARGEST_STAND_IN:
        raise NotImplementedError("too large to be tried for real")
    before = {name: t._version for name, t in stand_ins.items()}
    args, kwargs = tree_unflatten([stand_ins.get(id(leaf), off_meta(leaf)) for leaf in leaves], spec)
    returned = function(*args, **kwargs)
    made, spec = tree_flatten(returned)
    memory = {t.untyped_storage()._cdata for t in stand_ins.values()}
    original = {id(stand_ins[id(t)]): t for t in leaves if id(t) in stand_ins}
    for t in made:
        if isinstance(t, torch.Tensor) and id(t) not in original and t.untyped_storage()._cdata in memory:
            raise NotImplementedError("a view of a stand-in is none of the original")
    for t in original.values():
        if stand_ins[id(t)]._version != before[id(t)]:
            t.zero_()  # it was written to
    guessed = any(not t.is_floating_point() for t in original.values())
    return tree_unflatten([original.get(id(t), to_meta(t)) for t in made], spec), guessed


def _stand_in(tensor: torch.Tensor, which: Hits, whole: int) -> torch.Tensor:
    """Zeros in the place of unknown values, `whole` for integers; a mask is set at the entries that count as hits."""
    integer = not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype != torch.bool
    real = torch.full(tensor.shape, whole if integer else 0, dtype=tensor.dtype)
    if tensor.dtype == torch.bool and tensor.ndim and tensor.numel():
        real[_hits(which, tensor, as_tuple=True)] = True
    return real


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


def whole_parts(name: str, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Arguments of a `split` whose sizes were read from unknown values: the parts become as equal as can be."""
    if name not in ("split", "split_with_sizes") or len(args) < 2 or not isinstance(args[1], list | tuple):
        return args, kwargs
    sizes, dim = args[1], kwargs.get("dim", args[2] if len(args) > 2 else 0)
    whole, parts = args[0].shape[dim], len(sizes)
    if not parts or any(isinstance(n, torch.Tensor) for n in sizes) or sum(sizes) == whole:
        return args, kwargs
    return (args[0], [whole // parts + (i < whole % parts) for i in range(parts)], *args[2:]), kwargs


def check_counts(name: str, args: tuple) -> None:
    """Refuse a write through a known mask of more or fewer values than it has places: the meta device does not look.

    Raises:
        RuntimeError: as the same call would on tensors with values.
    """
    if name == "masked_scatter" and not args[1].is_meta:
        places, given = int(args[1].expand(args[0].shape).sum()), args[2].numel()
        if given < places:
            raise RuntimeError(f"masked_scatter of {given} values into {places} places")
    if name == "__setitem__" and isinstance(args[1], torch.Tensor) and isinstance(args[2], torch.Tensor):
        target, mask, given = args
        if mask.dtype == torch.bool and not mask.is_meta:
            places = torch.Size((int(mask.sum()), *target.shape[mask.ndim :]))
            torch.broadcast_to(given.to(META), places)


# A million times what small inputs take: 1 GiB in float64.
_MOST_VALUES = 2**27


def check_gathered(name: str, args: tuple) -> None:
    """Refuse a lookup that would make much more than small inputs are for: a mask of integers, taken for row numbers.

    Raises:
        IndexError: as rows that are not there would.
    """
    if name == "__getitem__" and isinstance(args[1], torch.Tensor) and not args[1].is_floating_point():
        rows, index = args
        if index.dtype != torch.bool and index.numel() * max(1, rows[:1].numel()) > _MOST_VALUES:
            raise IndexError(f"{index.numel()} rows of {tuple(rows.shape[1:])} are more than small inputs are for")


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
