"""Where the values of a model's tensors come from, by the model's names: a checkpoint, or a plan carried out on one.

Rows of the first axis can be had alone wherever they lie together in a file and no edit mixes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch

from normswap.apply.layout import Layout
from normswap.apply.values import Values, free_axis
from normswap.checkpoint.files import Checkpoint
from normswap.checkpoint.keymap import Group, KeyMap, Tensors
from normswap.errors import SourceError
from normswap.planning.edits import TensorEdit, Untie

WIDE = torch.float64


class Weights(Protocol):
    """Values of tensors by name."""

    def name_of(self, names: tuple[str, ...]) -> str:
        """Of the names that share one tensor of a model, the one to read it by."""

    def read(self, name: str, rows: range | None = None) -> torch.Tensor:
        """A tensor, or some `rows` of it; not to be written to."""

    def parts(self, name: str, most: int) -> Iterator[Part]:
        """A tensor in parts of so many values at most, along an axis along which they can be had by themselves."""


class Part(NamedTuple):
    """A part of a tensor: along which axis, what of that axis, and its values."""

    axis: int
    range: range
    values: torch.Tensor


class Stored:
    """Those that a checkpoint's files hold, in the dtypes that they are stored in."""

    def __init__(self, checkpoint: Checkpoint, keymap: KeyMap):
        self._checkpoint, self._keymap = checkpoint, keymap
        self._merged: tuple[Group, Tensors] | None = None

    def read(self, name: str, rows: range | None = None) -> torch.Tensor:
        group = self._keymap.stored_group(name)
        if group.converter is None:
            return self._checkpoint.read(group.sources[0], rows)
        return _some(self._of_merged(group)[self._stored_name(group, name)], rows)

    def parts(self, name: str, most: int) -> Iterator[Part]:
        yield from _rows(self.shape(name), most, lambda rows: self.read(name, rows))

    def name_of(self, names: tuple[str, ...]) -> str:
        found = next((name for name in names if self._keymap.stored_group(name) is not None), None)
        if found is None:
            raise SourceError(f"the files do not hold {names[0]}, which the model needs. Get the complete checkpoint.")
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        return self._keymap.shapes[name]

    def _of_merged(self, group: Group) -> Tensors:
        """What transformers makes of a group; the last is held, as experts are asked for one by one."""
        if self._merged is None or self._merged[0] is not group:
            self._merged = None
            self._merged = (
                group,
                self._keymap.to_model(group, {key: self._checkpoint.read(key) for key in group.sources}),
            )
        return self._merged[1]

    def _stored_name(self, group: Group, name: str) -> str:
        return next(alias for alias in (name, *self._keymap.names_of(name)) if alias in group.targets)


class Planned:
    """Those that a plan makes of a checkpoint, in float64, not rounded."""

    def __init__(self, values: Values, layout: Layout, stored: Stored):
        self._values, self._stored = values, stored
        self._edits = {name: edits for job in layout.jobs for name, edits in job.edits.items()}
        self._made_of = {name: job.group is not None for job in layout.jobs for name in job.edits}

    def name_of(self, names: tuple[str, ...]) -> str:
        return next((name for name in names if name in self._edits), None) or self._stored.name_of(names)

    def read(self, name: str, rows: range | None = None) -> torch.Tensor:
        found = self._edited(name)
        if found is None:
            edits = self._edits.get(name)
            return self._stored.read(name, rows) if edits is None else _some(self._values.new(name, edits, WIDE), rows)
        source, edits = found
        shape = self._stored.shape(source)
        if rows is None or free_axis(edits, len(shape)) != 0:
            return _some(self._values.apply(name, self._stored.read(source), edits, WIDE), rows)
        return self._values.apply(name, self._stored.read(source, rows), edits, WIDE, rows.start, shape)

    def parts(self, name: str, most: int) -> Iterator[Part]:
        found = self._edited(name)
        if found is None and name not in self._edits:
            yield from self._stored.parts(name, most)
            return
        axis = None if found is None else free_axis(found[1], len(self._stored.shape(found[0])))
        if not axis:  # rows by themselves, or all at once
            shape = self._stored.shape(found[0]) if axis == 0 else None
            yield from _rows(shape, most, lambda rows: self.read(name, rows))
            return
        source, edits = found
        value, shape = self._stored.read(source), self._stored.shape(source)
        for part in ranges(shape, axis, most):
            own = value.narrow(axis, part.start, len(part))
            yield Part(axis, part, self._values.apply(name, own, edits, WIDE, part.start, shape))

    def _edited(self, name: str) -> tuple[str, tuple[TensorEdit, ...]] | None:
        """Of a tensor that is made of a stored one: that one's name, and the edits that lead from there."""
        edits = self._edits.get(name, ())
        if edits and self._made_of[name]:
            return name, edits
        if edits and isinstance(edits[0], Untie):
            return edits[0].source, edits[1:]
        return None


def ranges(shape: tuple[int, ...], axis: int, most: int) -> list[range]:
    """An axis in runs of so many values of the whole tensor at most."""
    size = max(1, most * shape[axis] // max(1, math.prod(shape)))
    return [range(start, min(start + size, shape[axis])) for start in range(0, shape[axis], size)]


def _rows(shape: tuple[int, ...] | None, most: int, read: Callable[[range | None], torch.Tensor]) -> Iterator[Part]:
    """A tensor some rows at a time; where `shape` is None, all at once."""
    for rows in ranges(shape, 0, most) if shape else [None]:
        value = read(rows)
        yield Part(0, rows or range(len(value) if value.ndim else 0), value)


def _some(value: torch.Tensor, rows: range | None) -> torch.Tensor:
    return value if rows is None else value[rows.start : rows.stop]
