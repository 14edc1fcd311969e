"""An edit of a module, which moves no values: a bias, a number, norms on its output."""

from __future__ import annotations

from typing import Literal

from normswap.planning.edits.bounds import Attribute, Size
from normswap.planning.edits.edit import Edit
from normswap.planning.edits.values import Fill


class ModuleEdit(Edit):
    """A change of a module."""

    module: str

    def makes(self) -> tuple[Fill, ...]:
        """The tensors that the module has afterwards, as they are where it did not have them before."""
        return ()


class GrowBias(ModuleEdit):
    """A module built without a bias gets one, of shape `(size,)`."""

    edit: Literal["grow_bias"] = "grow_bias"
    size: Size

    def makes(self):
        return (Fill(tensor=f"{self.module}.bias", value=0.0, shape=(self.size,)),)


class SetScale(ModuleEdit):
    """The module gets the attribute `name`, a number that its rewritten code multiplies by."""

    edit: Literal["set_scale"] = "set_scale"
    name: Attribute
    value: float


class NormOutput(ModuleEdit):
    """Runs of the module's output go through norms that it holds (`norms.normed`): heads of queries and keys.

    Attributes:
        runs: per norm its name, where on the last axis its runs begin, and how long they are.
    """

    edit: Literal["norm_output"] = "norm_output"
    runs: tuple[tuple[Attribute, tuple[int, ...], Size], ...]
