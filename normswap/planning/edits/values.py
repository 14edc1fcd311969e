"""Tensors filled, scaled, copied, dropped, untied, fitted or put back."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from normswap.norms.spec import GainForm
from normswap.planning.edits.edit import FITTED, Read, TensorEdit, along


class Drop(TensorEdit):
    """The tensor is removed: what it did is folded elsewhere."""

    edit: Literal["drop"] = "drop"

    def apply(self, value, read):
        return None


class Fill(TensorEdit):
    """Every entry of the tensor becomes `value`: the neutral gain or bias of a folded norm.

    A tensor that the model does not have yet (of an added norm) is made, of shape `shape`.
    """

    edit: Literal["fill"] = "fill"
    value: float
    shape: tuple[int, ...] | None = None

    def apply(self, value, read):
        if value is None:
            return torch.full(self.shape, self.value, dtype=torch.float64)
        return torch.full_like(value, self.value)


class Scale(TensorEdit):
    """`T <- factor T`; of a gain in the form `1 + w`, the gain is what is scaled: `w <- factor (1 + w) - 1`."""

    edit: Literal["scale"] = "scale"
    factor: float
    form: GainForm = "w"

    def mixes(self):
        return ()

    def apply(self, value, read):
        return self.factor * (1 + value) - 1 if self.form == "1 + w" else self.factor * value


class Copy(TensorEdit):
    """The tensor takes the original values of `source`, times `factor`: a gain that moves to another norm."""

    edit: Literal["copy"] = "copy"
    source: str
    factor: float = 1.0

    def reads(self):
        return (self.source,)

    def apply(self, value, read):
        return self.factor * read(self.source)


class Untie(TensorEdit):
    """`tensor`, until now an alias of `source`, becomes a parameter of its own with the same values."""

    creates: ClassVar[bool] = True
    edit: Literal["untie"] = "untie"
    source: str

    def reads(self):
        return (self.source,)

    def apply(self, value, read):
        return read(self.source).clone()


class Refit(TensorEdit):
    """The tensor becomes one that calibration fitted, which is stored beside the plan under the same name."""

    edit: Literal["refit"] = "refit"

    def fitted(self):
        return (self.tensor,)

    def apply(self, value, read):
        return read(FITTED + self.tensor)


class Restore(TensorEdit):
    """An earlier edit taken back (`planning.undo`) with k, which was kept beside the weights for that.

    `add`: `T + k`, one value per run of `axis`; `divide`: `T / k`, one value per channel of `axis`; `subtract`:
    `T - k`; `replace`: k itself.
    """

    creates: ClassVar[bool] = True
    edit: Literal["restore"] = "restore"
    how: Literal["add", "divide", "subtract", "replace"]
    kept: str
    axis: int = 0
    runs: int = 1

    def fitted(self):
        return (self.kept,)

    def mixes(self):
        return (self.axis,) if self.how in ("add", "divide") else None

    def of_part(self, read, axis, start, size):
        if self.how == "divide":
            return read
        return Read(lambda name: read(name).narrow(axis, start, size))

    def apply(self, value, read):
        k = read(FITTED + self.kept)
        if self.how == "replace":
            return k
        if self.how == "subtract":
            return value - k
        if self.how == "divide":
            return value / along(k, self.runs, self.axis, value.ndim)
        split = value.unflatten(self.axis, (self.runs, -1))
        return (split + k.unsqueeze(self.axis + 1)).flatten(self.axis, self.axis + 1)
