"""A model that runs without its weights in memory: each is read when an operation uses it, and let go.

Large parameters are placeholders, NaN in every place and without storage of their size, so that whatever could pass the
reading by would show. While the model runs, a mode hears every torch call (`TorchFunctionMode`) and hands it values in
the place of placeholders. A linear map goes through its weight a part at a time, an embedding reads the rows that it
looks up, and of experts stacked in one parameter those are read that are chosen; any other operation gets the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_any, tree_map

from normswap.verification.weights import Part, Weights

# Parameters with fewer values are in memory like any other.
SMALL = 2**15
# Values of a weight in memory at once, where rows are used one by one: 4 MiB in float64, which is memory used again.
_AT_ONCE = 2**19


class Held(NamedTuple):
    """Where the values of a placeholder are: in `weights`, under `name`, cut to `through` (None: as they are)."""

    weights: Weights
    name: str
    through: torch.dtype | None


class Reading(TorchFunctionMode):
    """While active, operations on placeholders get the values that these stand for.

    Args:
        held: by the placeholder's `id`.
    """

    def __init__(self, held: dict[int, Held]):
        super().__init__()
        self._held = held

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in _OF_SHAPE or not tree_any(self.is_held, (args, kwargs)):
            return function(*args, **kwargs)
        if (in_parts := _IN_PARTS.get(function)) is not None:
            found = in_parts(self, *args, **kwargs)
            if found is not NotImplemented:
                return found
        args, kwargs = tree_map(self._value, (args, kwargs))
        return function(*args, **kwargs)

    def is_held(self, value: object) -> bool:
        return id(value) in self._held

    def read(self, placeholder: torch.Tensor, rows: range | None = None) -> torch.Tensor:
        """Its values, or those of some rows, in its dtype."""
        held = self._held[id(placeholder)]
        with _unheard():
            value = held.weights.read(held.name, rows)
            return (value if held.through is None else value.to(held.through)).to(placeholder.dtype)

    def parts(self, placeholder: torch.Tensor) -> Iterator[Part]:
        """Its values a part at a time, from the first to the last along whichever axis that goes."""
        held = self._held[id(placeholder)]
        with _unheard():
            parts = iter(held.weights.parts(held.name, _AT_ONCE))
        while True:
            with _unheard():
                part = next(parts, None)
                if part is None:
                    return
                value = part.values if held.through is None else part.values.to(held.through)
                part = part._replace(values=value.to(placeholder.dtype))
            yield part

    def _value(self, value: Any) -> Any:
        return self.read(value) if self.is_held(value) else value


@contextmanager
def _unheard() -> Iterator[None]:
    """What reads files and computes weights is no part of the model: no mode that the model runs under changes it."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch._C.DisableTorchFunction():
            yield
    finally:
        torch.set_default_dtype(default)


def _linear(mode: Reading, x: Any, weight: Any, bias: Any = None) -> Any:
    """`x W^T + b`, W a part at a time: rows give outputs, columns add up."""
    if mode.is_held(x) or not mode.is_held(weight):
        return NotImplemented
    made = _in_parts(x, mode.parts(weight), out=0)
    return made if bias is None else made + (mode.read(bias) if mode.is_held(bias) else bias)


def _in_parts(x: torch.Tensor, parts: Iterator[Part], out: int) -> torch.Tensor:
    """`x` times a matrix that comes in parts; `out` is the matrix' axis of outputs."""
    columns, made = [], None
    for part in parts:
        values = part.values.mT if out == 0 else part.values
        if part.axis == out:
            columns.append(x @ values)
        else:
            product = x[..., part.range.start : part.range.stop] @ values
            made = product if made is None else made + product
    return torch.cat(columns, -1) if made is None else made


def _addmm(mode: Reading, bias: Any, x: Any, weight: Any, **scales: Any) -> Any:
    """`b + x W`, W a part at a time."""
    if scales or not mode.is_held(weight) or mode.is_held(x):
        return NotImplemented
    return (mode.read(bias) if mode.is_held(bias) else bias) + _in_parts(x, mode.parts(weight), out=1)


def _embedding(mode: Reading, ids: torch.Tensor, weight: Any, *rest: Any, **options: Any) -> Any:
    """The rows that are looked up, and no others; a norm of rows (`max_norm`) would write to the weight."""
    max_norm = rest[1] if len(rest) > 1 else options.get("max_norm")
    if max_norm is not None or not mode.is_held(weight):
        return NotImplemented
    wanted, where = ids.unique(return_inverse=True)
    rows = torch.cat([mode.read(weight, run) for run in _runs(wanted.tolist())]) if len(wanted) else weight[:0]
    return F.embedding(where, rows)


def _runs(numbers: list[int]) -> Iterator[range]:
    """Growing numbers as ranges of those that follow each other."""
    start = 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1:
            yield range(numbers[start], numbers[i - 1] + 1)
            start = i


def _getitem(mode: Reading, weight: Any, index: Any) -> Any:
    """One row, or a run of rows."""
    if not mode.is_held(weight):
        return NotImplemented
    if (
        isinstance(index, torch.Tensor)
        and index.ndim == 0
        and not index.is_floating_point()
        and index.dtype != torch.bool
    ):
        index = int(index)
    if type(index) is int:
        index = index % len(weight)
        return mode.read(weight, range(index, index + 1))[0]
    if isinstance(index, slice) and index.step in (None, 1):
        start, stop, _ = index.indices(len(weight))
        return mode.read(weight, range(start, max(start, stop)))
    return NotImplemented


_IN_PARTS: dict[Callable, Callable] = {
    F.linear: _linear,
    torch._C._nn.linear: _linear,
    torch.addmm: _addmm,
    F.embedding: _embedding,
    torch.Tensor.__getitem__: _getitem,
}

#: what a placeholder answers as well as the tensor that it stands for
_OF_SHAPE = {
    *(getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "requires_grad", "ndim", "layout")),
    *(getattr(torch.Tensor, name).__get__ for name in ("is_cuda", "is_meta", "is_leaf", "itemsize", "nbytes")),
    *(getattr(torch.Tensor, name) for name in ("size", "dim", "numel", "__len__", "is_floating_point", "is_complex")),
    *(getattr(torch.Tensor, name) for name in ("element_size", "nelement", "get_device", "ndimension")),
}


def placeholder(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    """NaN in every place, in the memory of one."""
    return nn.Parameter(torch.full((), torch.nan, dtype=dtype).expand(shape), requires_grad=False)


def read_on_use(model: nn.Module, held: dict[int, Held]) -> None:
    """Have `model` read the placeholders of `held` whenever it runs, in place."""
    modes: list[Reading] = []

    def begin(module, args):
        modes.append(Reading(held))
        modes[-1].__enter__()

    def end(module, args, output):
        modes.pop().__exit__(None, None, None)

    model.register_forward_pre_hook(begin, prepend=True)
    model.register_forward_hook(end, always_call=True)
