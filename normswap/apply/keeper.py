"""Collects, while tensors are edited, what taking the edits back will need."""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch

from normswap.pages import empty_apart
from normswap.planning.edits import Read, TensorEdit
from normswap.planning.undo import NoWayBack, keeps_by_parts, kept, key_of, taken_back


class Part(NamedTuple):
    """A part of a tensor: along which axis, from where on, and how long the tensor is there."""

    axis: int
    start: int
    length: int


class Keeper:
    """Told of every edit of a tensor that the source has, before it is made. Several threads may tell it.

    Attributes:
        why_not: why there is no way back; None while there is one.
    """

    def __init__(self):
        self._kept: dict[str, torch.Tensor] = {}
        self._lock = threading.Lock()
        self.why_not: str | None = None

    def note(self, edit: TensorEdit, number: int, value: torch.Tensor, read: Read, part: Part | None = None) -> None:
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
        if found is None:
            return
        whole = part is None or not keeps_by_parts(edit)
        shape = list(found.shape)
        if not whole:
            shape[part.axis] = part.length
        with self._lock:
            if key not in self._kept:
                self._kept[key] = empty_apart(shape, found.dtype)
        place = self._kept[key]
        (place if whole else place.narrow(part.axis, part.start, found.shape[part.axis])).copy_(found)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What was kept, by the key that the way back knows it by."""
        return self._kept
