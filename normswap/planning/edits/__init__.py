"""The vocabulary of edits: every change a conversion makes, as data with its mathematics beside it.

A tensor edit is a pure function of the tensor's value so far and of *original* values of the few tensors that belong
with it, so that the live model and the stream of shards give the same weights in any order of tensors. A module edit
changes the structure only and moves no values. Tensors and modules are named as the model names them.
"""

from typing import Annotated

from pydantic import Field

from normswap.planning.edits.bases import Compensate, Rotate
from normswap.planning.edits.centring import Centre, CentreInput, CentreOutput
from normswap.planning.edits.config import SetConfig, SetEps
from normswap.planning.edits.edit import FITTED, Edit, Read, TensorEdit, rows_at_once
from normswap.planning.edits.folding import FoldBias, FoldGain
from normswap.planning.edits.gains import Gain, Running, Unscale
from normswap.planning.edits.modules import GrowBias, ModuleEdit, NormOutput, SetScale
from normswap.planning.edits.norms import AddNorm, Initialise, NormKind, SwapNorm
from normswap.planning.edits.running import AddShift, CarryAffine, Frozen
from normswap.planning.edits.source import Change, Rewrite
from normswap.planning.edits.values import Copy, Drop, Fill, Refit, Restore, Scale, Untie

AnyEdit = Annotated[
    Centre
    | Untie
    | FoldGain
    | FoldBias
    | AddShift
    | CarryAffine
    | Rotate
    | Compensate
    | Drop
    | Fill
    | Scale
    | Copy
    | Running
    | Unscale
    | Refit
    | Initialise
    | Restore
    | SwapNorm
    | AddNorm
    | SetScale
    | Rewrite
    | CentreOutput
    | CentreInput
    | NormOutput
    | GrowBias
    | SetConfig
    | SetEps,
    Field(discriminator="edit"),
]


__all__ = [
    "AddNorm",
    "AddShift",
    "AnyEdit",
    "CarryAffine",
    "Centre",
    "CentreInput",
    "CentreOutput",
    "Change",
    "Compensate",
    "Copy",
    "Drop",
    "Edit",
    "FITTED",
    "Fill",
    "FoldBias",
    "FoldGain",
    "Frozen",
    "Gain",
    "GrowBias",
    "Initialise",
    "ModuleEdit",
    "NormKind",
    "NormOutput",
    "Read",
    "Refit",
    "Restore",
    "Rewrite",
    "Rotate",
    "Running",
    "Scale",
    "SetConfig",
    "SetEps",
    "SetScale",
    "SwapNorm",
    "TensorEdit",
    "Unscale",
    "Untie",
    "rows_at_once",
]
