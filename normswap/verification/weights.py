"""Where the values of a model's tensors come from, by the model's names: a checkpoint, or a plan carried out on one.

Rows of the first axis can be had alone wherever they lie together in a file and no edit mixes them.
"""

from __future__ import annotations

from typing import Protocol

import torch

from normswap.apply.layout import Layout
from normswap.apply.values import Values, free_axis
from normswap.checkpoint.files import Checkpoint
from normswap.checkpoint.keymap import Group, KeyMap, Tensors
from normswap.errors import SourceError
from normswap.planning.edits import TensorEdit, Untie


class Weights(Protocol):
    """Values of tensors by name."""

    def name_of(self, names: tuple[str, ...]) -> str:
        """Of the names that share one tensor of a model, the one to read it by."""

    def read(self, name: str, rows: range | None = None) -> torch.Tensor:
        """A tensor, or some `rows` of it; not to be written to."""


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

    def edits(self, name: str) -> tuple[TensorEdit, ...]:
        """Those that make the tensor of that very name."""
        return self._edits.get(name, ())

    def name_of(self, names: tuple[str, ...]) -> str:
        return next((name for name in names if name in self._edits), None) or self._stored.name_of(names)

    def rows_alone(self, name: str) -> bool:
        """Whether some rows cost no more than their part of the whole."""
        edits = self.edits(name)
        made_of = edits[0].source if edits and isinstance(edits[0], Untie) else name
        if edits and not self._made_of[name] and made_of == name:
            return False
        own = edits[1:] if made_of != name else edits
        return free_axis(own, len(self._stored.shape(made_of))) == 0

    def read(self, name: str, rows: range | None = None) -> torch.Tensor:
        edits, source = self.edits(name), name
        if not edits:
            return self._stored.read(name, rows)
        if not self._made_of[name]:
            if not isinstance(edits[0], Untie):
                return _some(self._values.new(name, edits, torch.float64), rows)
            source, edits = edits[0].source, edits[1:]
        shape = self._stored.shape(source)
        if rows is None or free_axis(edits, len(shape)) != 0:
            return _some(self._values.apply(name, self._stored.read(source), edits, torch.float64), rows)
        value = self._stored.read(source, rows)
        return self._values.apply(name, value, edits, torch.float64, rows.start, shape)


def _some(value: torch.Tensor, rows: range | None) -> torch.Tensor:
    return value if rows is None else value[rows.start : rows.stop]
