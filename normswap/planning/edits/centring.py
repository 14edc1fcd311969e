"""Means taken out of weights, or at run time as values enter or leave a module."""

from __future__ import annotations

from typing import Literal

import torch

from normswap.planning.edits.edit import Read, TensorEdit
from normswap.planning.edits.modules import ModuleEdit


class Centre(TensorEdit):
    """`T <- T - mean(T)` along `axis`, taken in `groups` equal runs (heads side by side in one axis)."""

    edit: Literal["centre"] = "centre"
    axis: int
    groups: int = 1

    def mixes(self):
        return (self.axis,)

    def mean(self, value: torch.Tensor, read: Read) -> torch.Tensor:
        """What is taken out: that axis has `groups` values."""
        return read.once(self, lambda: value.unflatten(self.axis, (self.groups, -1)).mean(self.axis + 1))

    def apply(self, value, read):
        split = value.unflatten(self.axis, (self.groups, -1))
        return (split - self.mean(value, read).unsqueeze(self.axis + 1)).flatten(self.axis, self.axis + 1)


class CentreOutput(ModuleEdit):
    """The module's output is centred along `axis`, counted from the end, in the module itself (`norms.centred`)."""

    edit: Literal["centre_output"] = "centre_output"
    axis: int = -1


class CentreInput(ModuleEdit):
    """The module's first input is centred along `axis`, counted from the end, in the module itself."""

    edit: Literal["centre_input"] = "centre_input"
    axis: int = -1
