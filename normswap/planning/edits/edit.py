"""What an edit is, and an edit of a tensor: a function of its value."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict

#: values of a tensor that is read in parts: 2 MiB in float64, which a core's cache holds
_PART = 2**18
#: before a tensor's name: the one that calibration fitted, and not the model's
FITTED = "fitted:"


@dataclass(frozen=True)
class Read:
    """Original values of a model's tensors, in float64, for the edits of others.

    Attributes:
        whole: a tensor by name.
        parts: the same in parts along its first axis, of `rows_at_once` rows each; None: cut from the whole.
        found: what `once` has found; None: it remembers nothing.
    """

    whole: Callable[[str], torch.Tensor]
    parts: Callable[[str], Iterable[torch.Tensor]] | None = None
    found: dict[Edit, torch.Tensor] | None = None

    def __call__(self, name: str) -> torch.Tensor:
        return self.whole(name)

    def in_parts(self, name: str) -> Iterable[torch.Tensor]:
        """For what can be summed or joined over parts of a large tensor, so that it is never in float64 as a whole."""
        if self.parts is not None:
            return self.parts(name)
        whole = self.whole(name)
        return whole.split(rows_at_once(whole.shape))

    def remembering(self) -> Read:
        """The same for the edits of one value, or of one part of it: what an edit finds, it finds `once`."""
        return replace(self, found={})

    def once(self, edit: Edit, find: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `find` gives for `edit`: both making the edit and keeping what undoes it need it."""
        if self.found is None:
            return find()
        if edit not in self.found:
            self.found[edit] = find()
        return self.found[edit]


def rows_at_once(shape: tuple[int, ...]) -> int:
    """Rows (of the first axis) that a part has: the same wherever the tensor is, so that sums give the same bits."""
    return max(1, _PART // max(1, math.prod(shape[1:])))


class Edit(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorEdit(Edit):
    """A change of one tensor. `apply` gets and returns float64."""

    #: whether it makes a tensor that there was not, of nothing but what it reads
    creates: ClassVar[bool] = False
    tensor: str

    def reads(self) -> tuple[str, ...]:
        """Names of the other tensors whose original values `apply` needs."""
        return ()

    def fitted(self) -> tuple[str, ...]:
        """Names of the tensors that calibration fitted and `apply` needs."""
        return ()

    def mixes(self) -> tuple[int, ...] | None:
        """The axes along which values meet, or meet a vector; None: all.

        A part of the tensor along any other axis can be computed alone.
        """
        return None

    def of_part(self, read: Read, axis: int, start: int, size: int) -> Read:
        """What to `apply` with to the part that is `size` long from `start` on, along an axis that is not mixed."""
        return read

    def apply(self, value: torch.Tensor | None, read: Read) -> torch.Tensor | None:
        """The new value, from the value so far (None: the tensor does not exist yet; returning None removes it)."""
        raise NotImplementedError


def along(vector: torch.Tensor, runs: int, axis: int, ndim: int) -> torch.Tensor:
    """`vector` of n values, `runs` times over, as `(1, .., runs n, .., 1)`, to act along `axis` of a tensor."""
    return vector.flatten().repeat(runs).reshape([-1 if i == axis else 1 for i in range(ndim)])
