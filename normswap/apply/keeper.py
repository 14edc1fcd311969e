"""Collects, while tensors are edited, what taking the edits back will need."""

from __future__ import annotations

from typing import NamedTuple

import torch

from normswap.planning.edits import Read, TensorEdit
from normswap.planning.undo import NoWayBack, keeps_by_parts, kept, key_of, taken_back


class Part(NamedTuple):
    """A part of a tensor: from where on, along which axis."""

    axis: int
    start: int


WHOLE = Part(0, 0)


class Keeper:
    """Told of every edit of a tensor that the source has, before it is made. Several threads may tell it.

    Attributes:
        why_not: why there is no way back; None while there is one.
    """

    def __init__(self):
        # A part that is computed again, for another file that needs it, replaces itself.
        self._parts: dict[str, dict[Part, torch.Tensor]] = {}
        self.why_not: str | None = None

    def note(self, edit: TensorEdit, number: int, value: torch.Tensor, read: Read, part: Part = WHOLE) -> None:
        """`edit`, the tensor's edit of that number, is about to change `value`: the tensor, or a part of it."""
        if self.why_not is not None:
            return
        key = key_of(edit.tensor, number)
        try:
            taken_back(edit, key)
            found = kept(edit, value, read)
        except NoWayBack as error:
            self.why_not = str(error)
            return
        if found is not None:
            self._parts.setdefault(key, {})[part if keeps_by_parts(edit) else WHOLE] = found.clone()

    def tensors(self) -> dict[str, torch.Tensor]:
        """What was kept, by the key that the way back knows it by."""
        return {key: _joined(parts) for key, parts in self._parts.items()}


def _joined(parts: dict[Part, torch.Tensor]) -> torch.Tensor:
    ordered = [parts[part] for part in sorted(parts)]
    return ordered[0] if len(ordered) == 1 else torch.cat(ordered, next(iter(parts)).axis)
