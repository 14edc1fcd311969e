"""Batch norms as they run, an affine map of each channel, taken over by the weights beside them."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict

from normswap.norms.formula import running_affine
from normswap.norms.spec import GainForm
from normswap.planning.edits.edit import Read, TensorEdit


class Frozen(BaseModel):
    """A batch norm as it runs, by the names of its tensors: `a x + c`, a = g / sqrt(variance + eps), c = b - a mean."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: str
    variance: str
    eps: float
    gain: str | None = None
    form: GainForm = "w"
    bias: str | None = None

    @property
    def module(self) -> str:
        """Path of the norm."""
        return self.mean.rpartition(".")[0]

    def reads(self) -> tuple[str, ...]:
        return tuple(name for name in (self.mean, self.variance, self.gain, self.bias) if name is not None)

    def scale(self, read: Read) -> torch.Tensor:
        return self._affine(read)[0]

    def shift(self, read: Read) -> torch.Tensor:
        return self._affine(read)[1]

    def _affine(self, read: Read) -> tuple[torch.Tensor, torch.Tensor]:
        named = {"mean": self.mean, "variance": self.variance, "gain": self.gain, "bias": self.bias}
        tensors = {does: read(name).flatten() for does, name in named.items() if name is not None}
        if self.form == "1 + w" and "gain" in tensors:
            tensors["gain"] = 1 + tensors["gain"]
        return running_affine(tensors, self.eps)


class AddShift(TensorEdit):
    """A bias takes over what a batch norm behind it added: `b <- b + c`. Its scale is a gain, folded before."""

    edit: Literal["add_shift"] = "add_shift"
    norm: Frozen

    def reads(self):
        return self.norm.reads()

    def apply(self, value, read):
        return value + self.norm.shift(read).reshape(value.shape)


class CarryAffine(TensorEdit):
    """A convolution does what a batch norm beside it did to the same input x, which is still added: the rest of it,

        r (a x + c) - r x:        W <- W + r diag(a - 1), in its middle;        b <- b + r c.

    Channel k of the `axis` reads channel k, or the k-th in its group of channels, along the axis `into`; None for b.

    Attributes:
        factor: r.
        behind: path of the norm that stood behind the convolution, and gave what it alone made.
    """

    edit: Literal["carry_affine"] = "carry_affine"
    axis: int
    into: int | None
    factor: float
    norm: Frozen
    behind: str

    def reads(self):
        return self.norm.reads()

    def added(self, value: torch.Tensor, read: Read) -> torch.Tensor:
        """What is added to `value`."""
        if self.into is None:
            return self.factor * self.norm.shift(read).reshape(value.shape)
        channels = torch.arange(value.shape[self.axis], device=value.device)
        index = [torch.full_like(channels, n // 2) for n in value.shape]
        index[self.axis], index[self.into] = channels, channels % value.shape[self.into]
        return torch.zeros_like(value).index_put(tuple(index), self.factor * (self.norm.scale(read) - 1))

    def apply(self, value, read):
        return value + self.added(value, read)
