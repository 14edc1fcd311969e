"""Collects, while tensors are edited, what taking the edits back will need."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch

from normswap.planning.edits import Read, TensorEdit
from normswap.planning.undo import NoWayBack, keeps_by_rows, kept, key_of, taken_back


class Keeper:
    """Told of every edit before it is made.

    Attributes:
        why_not: why there is no way back; None while there is one.
    """

    def __init__(self):
        self._parts: dict[str, dict[str, list[torch.Tensor]]] = {}
        self.why_not: str | None = None

    def begin(self, tensors: Iterable[str]) -> None:
        """Tensors of the source are computed, from the first row on; again for each file that holds a part of them."""
        self._parts |= {tensor: defaultdict(list) for tensor in tensors}

    def note(self, edit: TensorEdit, number: int, value: torch.Tensor | None, read: Read) -> None:
        """`edit`, the tensor's edit of that number, is about to change `value`: the tensor, or some rows of it."""
        if self.why_not is not None or edit.tensor not in self._parts:
            return  # what the source does not have goes as it came
        key = key_of(edit.tensor, number)
        try:
            taken_back(edit, key)
            part = kept(edit, value, read)
        except NoWayBack as error:
            self.why_not = str(error)
            return
        parts = self._parts[edit.tensor][key]
        if part is not None and (keeps_by_rows(edit) or not parts):
            parts.append(part.clone())

    def tensors(self) -> dict[str, torch.Tensor]:
        """What was kept, by the key that the way back knows it by."""
        joined = (parts for by_key in self._parts.values() for parts in by_key.items())
        return {key: parts[0] if len(parts) == 1 else torch.cat(parts) for key, parts in joined if parts}
