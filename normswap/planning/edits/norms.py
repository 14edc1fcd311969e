"""Norms of another kind, or where there were none, and what their tensors begin as."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, field_validator
from torch import nn

from normswap.norms.kind import Direct, Fitted
from normswap.norms.kinds import KINDS, MODULES
from normswap.norms.spec import Casting, GainForm, NormSpec
from normswap.planning.edits.bounds import MAX_SIZE, Size
from normswap.planning.edits.edit import Read, TensorEdit
from normswap.planning.edits.modules import ModuleEdit
from normswap.planning.edits.values import Fill


def _known(kind: str) -> str:
    if kind not in KINDS:
        raise ValueError(f"expected a kind of norm among {', '.join(KINDS)}, found '{kind}'")
    return kind


NormKind = Annotated[str, AfterValidator(_known)]


class SwapNorm(ModuleEdit):
    """The norm at `module` becomes one of another kind; parameters that stay keep their names.

    Attributes:
        kind: of `norms.kinds`; `affine` is a gain and a bias without normalising, `identity` hands its input on.
        width: size of the normalised axis.
        axis: the normalised axis, counted from the end.
        shape: of gain and bias; None: `(width,)`.
    """

    edit: Literal["swap_norm"] = "swap_norm"
    kind: NormKind
    width: Size
    eps: float
    gain: GainForm | None
    bias: bool
    casting: Casting
    axis: int = -1
    shape: tuple[Size, ...] | None = None

    @field_validator("shape")
    @classmethod
    def _small(cls, shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if shape is not None and math.prod(shape) > MAX_SIZE:
            raise ValueError(f"expected at most {MAX_SIZE} gains, found a shape {shape}"[:200])
        return shape

    def build(self) -> nn.Module:
        """The norm with neutral parameters and buffers, each of which is one number throughout."""
        arguments = self.model_dump(include={"width", "eps", "gain", "bias", "casting", "axis", "shape"})
        return MODULES[self.kind](**arguments)

    def makes(self):
        return tuple(
            Fill(tensor=f"{self.module}.{name}", value=float(t.flatten()[0]), shape=tuple(t.shape))
            for name, t in self.build().state_dict().items()
        )


class AddNorm(SwapNorm):
    """A norm where there was none: `module` is the path that it gets. Its parameters begin neutral."""

    edit: Literal["add_norm"] = "add_norm"


class Initialise(TensorEdit):
    """The tensor of a norm becomes what its kind takes from the norm that it replaces (`norms.kind`).

    Attributes:
        module: path of both norms.
        kind: the kind that was asked for.
        replaced: what stood there.
    """

    edit: Literal["initialise"] = "initialise"
    module: str
    kind: NormKind
    replaced: NormSpec

    @property
    def route(self) -> Direct | Fitted:
        return KINDS[self.kind].routes[self.replaced.kind]

    def reads(self):
        return tuple(f"{self.module}.{name}" for name in self.replaced.tensors.values())

    def own(self, read: Read) -> dict[str, torch.Tensor]:
        """The replaced norm's tensors by what they do."""
        tensors = {does: read(f"{self.module}.{name}") for does, name in self.replaced.tensors.items()}
        if self.replaced.gain == "1 + w":
            tensors["gain"] = 1 + tensors["gain"]
        return tensors

    def apply(self, value, read):
        route = self.route
        make = route.values if isinstance(route, Direct) else route.start
        return make(self.replaced, self.own(read))[self.tensor.rpartition(".")[2]]
