"""What an edit makes of a change of its tensor: of an adapter, which is trained as a change of the base's weights.

For an edit E of a tensor T and a change d of it,

    E(T + d) = E(T) + L(d),

where L, the linear part of E, is an edit as well, or nothing where E only adds what does not depend on T. An edit that
puts something else in the tensor's place has no such part. L acts along one axis of T or on all of it alike, so that of
a change in factors, `d = s B A`, it changes one factor alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import singledispatch

import torch

from normswap.planning.edits import (
    AddShift,
    CarryAffine,
    Centre,
    CentreInput,
    CentreOutput,
    Compensate,
    FoldBias,
    FoldGain,
    GrowBias,
    ModuleEdit,
    NormOutput,
    Read,
    Refit,
    Rotate,
    Scale,
    TensorEdit,
    Unscale,
    Untie,
)


class NotCarried(ValueError):
    """A change of the tensor does not survive the edit; the message says why."""


@singledispatch
def linear_part(edit: TensorEdit) -> TensorEdit | None:
    """L, above; None: the change stays as it is. Raises NotCarried where there is none."""
    raise NotCarried(f"the plan puts other values in the place of {edit.tensor} ({edit.edit})")


@linear_part.register(Centre)
@linear_part.register(FoldGain)
@linear_part.register(Rotate)
@linear_part.register(Compensate)
def _(edit: TensorEdit):
    return edit


@linear_part.register
def _(edit: Scale):
    return edit.model_copy(update={"form": "w"})  # of a gain `1 + w` the one does not change


@linear_part.register
def _(edit: Unscale):
    return edit.model_copy(update={"bias": None})


@linear_part.register(FoldBias)
@linear_part.register(AddShift)
@linear_part.register(CarryAffine)
@linear_part.register(Untie)
def _(edit: TensorEdit):
    return None


@linear_part.register
def _(edit: Refit):
    raise NotCarried(f"{edit.tensor} was fitted on data, for the base as it is")


@singledispatch
def around(edit: ModuleEdit, weight: str, out: int | None, into: int | None) -> TensorEdit | None:
    """What an edit of a module asks of a change that is computed beside the module, `y = module(x) + change(x)`.

    PEFT puts a low-rank change around a layer: what the layer does to its input or output is not done to the change's.

    Args:
        weight: name of the layer's weight.
        out, into: the weight's axes that lie along the last axis of the layer's output and of its input; None: none.

    Raises:
        NotCarried: the change would have to do what no weights can.
    """
    raise NotCarried(f"the plan changes what {edit.module} computes ({edit.edit})")


@around.register
def _(edit: CentreOutput, weight, out, into):
    return _centred(edit, weight, out, "output")


@around.register
def _(edit: CentreInput, weight, out, into):
    return _centred(edit, weight, into, "input")


def _centred(edit: CentreOutput | CentreInput, weight: str, axis: int | None, end: str) -> Centre:
    if edit.axis != -1 or axis is None:
        raise NotCarried(f"the plan centres the {end} of {edit.module} along an axis that no axis of {weight} makes")
    return Centre(tensor=weight, axis=axis)


@around.register(GrowBias)
@around.register(NormOutput)  # a norm behind a gate of 0, which hands the output on
def _(edit: ModuleEdit, weight, out, into):
    return None


def neutral(name: str, value: torch.Tensor, edits: Iterable[TensorEdit], read: Read) -> torch.Tensor:
    """A trained gain or bias of a norm whose gain g and bias b were folded, and which has neutral ones since.

    What reads the norm has the base's g and b in it, `W diag(g)` and `c + W b`, so that of the trained g' and b' the
    norm keeps what is not there yet: `g' / g`, in the form `1 + w` less 1, and `(b' - b) / g`.

    Args:
        name: of the norm's tensor.
        value: its trained value, g', w' or b'.
        edits: of the whole plan.
        read: the base's values.

    Raises:
        NotCarried: the tensor went elsewhere, or something lies between that does not commute with a gain.
    """
    edits = [edit for edit in edits if isinstance(edit, TensorEdit)]
    readers = [edit for edit in edits if name in edit.reads()]
    biases = [edit for edit in readers if isinstance(edit, FoldBias) and edit.bias == name]
    gains = [edit for edit in readers if isinstance(edit, FoldGain) and edit.weight == name]
    if not readers or len(biases) + len(gains) < len(readers):
        raise NotCarried(f"the plan moves {name} into other tensors, which the adapter does not train")
    if biases:
        into = {edit.reader for edit in biases}
        gains = [edit for edit in edits if isinstance(edit, FoldGain) and edit.tensor in into]
    for gain in gains:
        behind = edits[edits.index(gain) + 1 :]
        if any(other.tensor == gain.tensor and getattr(other, "axis", None) == gain.axis for other in behind):
            raise NotCarried(f"{gain.tensor}, which {name} is folded into, is changed along the same axis after that")
    if len({(gain.weight, gain.form) for gain in gains}) > 1 or not all(isinstance(gain.weight, str) for gain in gains):
        raise NotCarried(f"what {name} is folded into takes over several gains")
    g = gains[0].gain(read).reshape(value.shape) if gains else torch.ones_like(value)
    if not g.all():
        raise NotCarried(f"{gains[0].weight} has gains of 0, which nothing beside them makes up for")
    if biases:
        return (value - read(name)) / g
    one = float(gains[0].form == "1 + w")
    return (one + value) / g - one
