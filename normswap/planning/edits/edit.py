"""What an edit is, and an edit of a tensor: a function of its value."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict

Read = Callable[[str], torch.Tensor]
#: before a tensor's name: the one that calibration fitted, and not the model's
FITTED = "fitted:"


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

    def keeps_rows_apart(self) -> bool:
        """Whether each index of the first axis is changed by itself, so that some rows can be computed alone."""
        return False

    def apply(self, value: torch.Tensor | None, read: Read) -> torch.Tensor | None:
        """The new value, from the value so far (None: the tensor does not exist yet; returning None removes it)."""
        raise NotImplementedError


def along(vector: torch.Tensor, runs: int, axis: int, ndim: int) -> torch.Tensor:
    """`vector` of n values, `runs` times over, as `(1, .., runs n, .., 1)`, to act along `axis` of a tensor."""
    return vector.flatten().repeat(runs).reshape([-1 if i == axis else 1 for i in range(ndim)])
