"""The gains that a stream went through, carried along it as one product."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict

from normswap.norms.spec import GainForm
from normswap.planning.edits.edit import Read, TensorEdit, along


class Gain(BaseModel):
    """A gain as a norm applies it: the tensor itself, or one plus it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight: str
    form: GainForm

    def of(self, read: Read) -> torch.Tensor:
        return 1 + read(self.weight) if self.form == "1 + w" else read(self.weight)


class Running(TensorEdit):
    """D, the running product of gains along a stream whose skips had them: `T <- factor g_1 g_2 ...` per channel."""

    edit: Literal["running"] = "running"
    gains: tuple[Gain, ...]
    factor: float

    def reads(self):
        return tuple(gain.weight for gain in self.gains)

    def product(self, read: Read) -> torch.Tensor:
        product = self.gains[0].of(read) * self.factor
        for gain in self.gains[1:]:
            product = product * gain.of(read)
        return product

    def apply(self, value, read):
        return self.product(read)


class Unscale(Running):
    """What writes to a stream that is carried divided by D: `T <- (T + b) / D` along `axis`, b a norm's bias or 0."""

    edit: Literal["unscale"] = "unscale"
    axis: int
    bias: str | None = None

    def reads(self):
        return super().reads() + ((self.bias,) if self.bias else ())

    def mixes(self):
        return None if self.bias else (self.axis,)

    def apply(self, value, read):
        if self.bias is not None:
            value = read(self.bias) if value is None else value + read(self.bias)
        return value / along(self.product(read), 1, self.axis, value.ndim)
