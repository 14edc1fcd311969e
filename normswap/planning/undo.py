"""What takes an edit back, and what has to be kept for that when it is made.

A conversion that computes the same function loses little: the means of what it centres, the gains that it folds, the
small tensors that it fills or drops. They are kept beside the weights (`checkpoint.kept`), and the edits of the way
back add, divide by and put back what was kept, last edit first. What has been trained in between stays trained.
"""

from __future__ import annotations

from functools import singledispatch

import torch

from normswap.planning.edits import (
    AddShift,
    CarryAffine,
    Centre,
    Copy,
    Drop,
    Fill,
    FoldBias,
    FoldGain,
    Initialise,
    Read,
    Restore,
    Rotate,
    Running,
    Scale,
    TensorEdit,
)
from normswap.planning.plans import Plan


class NoWayBack(ValueError):
    """The edit loses something that cannot be kept; the message says what."""


@singledispatch
def taken_back(edit: TensorEdit, key: str) -> TensorEdit:
    """The edit that undoes `edit`, reading what was kept of it under `key`. Raises NoWayBack where there is none."""
    raise NoWayBack(f"{edit.edit} of {edit.tensor} cannot be taken back")


@singledispatch
def kept(edit: TensorEdit, value: torch.Tensor, read: Read) -> torch.Tensor | None:
    """What `taken_back` will need, from the value before the edit, in float64; None: nothing.

    Of a part of the tensor, that of this part. Raises NoWayBack.
    """
    return None


def keeps_by_parts(edit: TensorEdit) -> bool:
    """Whether of each part of a tensor another thing is kept, and not one for all."""
    return not isinstance(edit, FoldGain)


@taken_back.register
def _(edit: Centre, key):
    return Restore(tensor=edit.tensor, how="add", kept=key, axis=edit.axis, runs=edit.groups)


@kept.register
def _(edit: Centre, value, read):
    return edit.mean(value, read)


@taken_back.register
def _(edit: FoldGain, key):
    return Restore(tensor=edit.tensor, how="divide", kept=key, axis=edit.axis, runs=edit.runs)


@kept.register
def _(edit: FoldGain, value, read):
    gain = edit.gain(read)
    if not gain.all():
        named = getattr(edit.weight, "gain", edit.weight)
        raise NoWayBack(f"{named} has {int((gain == 0).sum())} gains of 0, and what they met is lost")
    return gain.flatten()


@taken_back.register(FoldBias)
@taken_back.register(AddShift)
@taken_back.register(CarryAffine)
def _(edit: TensorEdit, key):
    return Restore(tensor=edit.tensor, how="subtract", kept=key)


@kept.register
def _(edit: FoldBias, value, read):
    return edit.carried(read)


@kept.register
def _(edit: AddShift, value, read):
    return edit.norm.shift(read).reshape(value.shape)


@kept.register
def _(edit: CarryAffine, value, read):
    return edit.added(value, read)


@taken_back.register
def _(edit: Scale, key):
    if not edit.factor:
        raise NoWayBack(f"{edit.tensor} was multiplied by 0")
    return edit.model_copy(update={"factor": 1 / edit.factor})


@taken_back.register
def _(edit: Rotate, key):
    if edit.rotation.fitted is not None:
        raise NoWayBack(f"{edit.tensor} was turned by a matrix found on data, which is not kept")
    return edit.model_copy(update={"back": not edit.back})


@taken_back.register(Fill)
@taken_back.register(Drop)
@taken_back.register(Copy)
@taken_back.register(Running)
@taken_back.register(Initialise)
def _(edit: TensorEdit, key):
    return Restore(tensor=edit.tensor, how="replace", kept=key)


@kept.register(Fill)
@kept.register(Drop)
@kept.register(Copy)
@kept.register(Running)
@kept.register(Initialise)
def _(edit: TensorEdit, value, read):
    return value


def key_of(tensor: str, number: int) -> str:
    """Under which name is kept what the edit of that number of a tensor loses."""
    return f"{tensor}#{number}"


def way_back(plan: Plan, stock: set[str], tensors: dict[str, torch.Tensor]) -> Plan:
    """The plan that turns what `plan` made into a checkpoint of the stock class.

    Args:
        stock: names of the tensors of the source's class; what else there is goes.
        tensors: what was kept, by `key_of`.

    Raises:
        NoWayBack: an edit that cannot be taken back.
    """
    edits: list[TensorEdit] = []
    made = {fill.tensor for edit in plan.module_edits() for fill in edit.makes()}
    own = {edit.tensor for edit in plan.edits if isinstance(edit, TensorEdit) and edit.creates}
    for name in sorted((made | own) - stock):
        edits.append(Drop(tensor=name))
    for name, steps in plan.tensor_edits().items():
        if name in own:
            edits.append(Drop(tensor=name))
        elif name in stock:
            edits += [taken_back(step, key_of(name, number)) for number, step in reversed([*enumerate(steps)])]
    back = plan.model_copy(update={"edits": tuple(dict.fromkeys(edits)), "reasons": (), "claim": "exact"})
    return back.keeping(tensors)
