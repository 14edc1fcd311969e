"""What an edit makes of a change of its tensor: E(T + d) = E(T) + L(d), for every edit that says it has an L."""

from typing import get_args

import pytest
import torch

from normswap.planning.adapted import NotCarried, linear_part, neutral
from normswap.planning.edits import (
    FITTED,
    AddShift,
    AnyEdit,
    CarryAffine,
    Centre,
    Compensate,
    Copy,
    Drop,
    Fill,
    FoldBias,
    FoldGain,
    Frozen,
    Gain,
    Read,
    Refit,
    Rotate,
    Running,
    Scale,
    TensorEdit,
    Unscale,
    Untie,
)
from normswap.planning.orthogonal import Rotation

FROZEN = Frozen(mean="mean", variance="var", eps=1e-5, gain="g", bias="b")
GAINS = (Gain(weight="g", form="w"), Gain(weight="h", form="1 + w"))
# edits of a tensor T of shape (6, 8), a bias where it has one axis alone
LINEAR = [
    Centre(tensor="T", axis=0, groups=2),
    Centre(tensor="T", axis=1),
    FoldGain(tensor="T", axis=1, weight="g", form="1 + w"),
    FoldGain(tensor="T", axis=1, weight=FROZEN, form="w"),
    Rotate(tensor="T", axis=1, rotation=Rotation(by="hadamard", width=4)),
    Rotate(tensor="T", axis=1, rotation=Rotation(by="reflected", width=8, fitted="v"), back=True),
    Compensate(tensor="T", axis=1, lost="v", told_by="c"),
    Scale(tensor="T", factor=-0.3),
    Scale(tensor="T", factor=-0.3, form="1 + w"),
    Unscale(tensor="T", axis=1, gains=GAINS, factor=0.7, bias="b"),
    FoldBias(tensor="T", reader="W", axis=2, bias="b"),
    CarryAffine(tensor="T", axis=0, into=1, factor=2.0, norm=FROZEN.model_copy(update={"gain": "six"}), behind="n"),
]
ABSENT = [
    Drop(tensor="T"),
    Fill(tensor="T", value=1.0),
    Copy(tensor="T", source="W"),
    Refit(tensor="T"),
    Running(tensor="T", gains=GAINS, factor=1.0),
]
SAME = [Untie(tensor="T", source="S"), AddShift(tensor="T", norm=FROZEN)]


def values(name: str) -> torch.Tensor:
    shape = {"T": (6, 8), "W": (6, 8, 8), "six": (6,)}.get(name.removeprefix(FITTED), (8,))
    if name == "var":
        return torch.ones(8, dtype=torch.float64)
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(map(ord, name))), dtype=torch.float64)


@pytest.mark.parametrize("edit", LINEAR, ids=lambda edit: f"{edit.edit}-{edit.__dict__.get('axis', '')}")
def test_the_linear_part_is_what_a_change_becomes(edit):
    tensor = values("T")
    if isinstance(edit, CarryAffine):

        def read(name):
            return values("six").abs() + 1 if name in ("var", "mean", "six", "b") else values(name)
    else:
        read = values
    change = values("other")[:6, None] * values("another")[None]
    part, read = linear_part(edit), Read(read)
    made = change if part is None else part.apply(change, read)
    moved = edit.apply(tensor + change, read) - edit.apply(tensor, read)
    assert torch.allclose(moved, made, rtol=0, atol=1e-12)  # 3e-15
    assert moved.abs().max() > 0.1


@pytest.mark.parametrize("edit", ABSENT, ids=lambda edit: edit.edit)
def test_a_tensor_that_is_replaced_carries_no_change(edit):
    with pytest.raises(NotCarried, match="T"):
        linear_part(edit)


def test_every_edit_of_the_vocabulary_is_tried_here():
    tried = {type(edit) for edit in (*LINEAR, *ABSENT, *SAME)}
    known = {kind for kind in get_args(get_args(AnyEdit)[0]) if issubclass(kind, TensorEdit)}
    assert {kind.__name__ for kind in known - tried} == {"Initialise", "Restore"}  # of norms, and of the way back
    assert all(linear_part(edit) is None for edit in SAME)


def folded(*behind: TensorEdit) -> list:
    return [
        FoldBias(tensor="c", reader="W", axis=1, bias="b"),
        FoldGain(tensor="W", axis=1, weight="g", form="1 + w"),
        *behind,
        Fill(tensor="g", value=0.0),
        Fill(tensor="b", value=0.0),
    ]


def test_trained_norms_keep_what_was_not_folded():
    tensors = {name: torch.randn(4, dtype=torch.float64) for name in ("g", "b")}
    reader = torch.randn(3, 4, dtype=torch.float64)
    g, b, x = torch.randn(3, 4, dtype=torch.float64).unbind()
    edits = folded()
    gain, bias = (neutral(name, value, edits, Read(tensors.__getitem__)) for name, value in (("g", g), ("b", b)))
    wanted = reader @ (x * (1 + g) + b)
    made = (reader * (1 + tensors["g"])) @ (x * (1 + gain) + bias) + reader @ tensors["b"]
    assert torch.allclose(wanted, made, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("edits", "said"),
    [
        (folded(Centre(tensor="W", axis=1)), "W, which g is folded into, is changed along the same axis after that"),
        (folded(Copy(tensor="other", source="g")), "moves g into other tensors"),
        ([Fill(tensor="g", value=0.0)], "moves g into other tensors"),
    ],
)
def test_trained_norms_are_refused_where_a_gain_does_not_commute(edits, said):
    with pytest.raises(NotCarried, match=said):
        neutral("g", torch.ones(4), edits, Read(lambda name: torch.ones(4)))
    with pytest.raises(NotCarried, match="gains of 0"):
        neutral("g", torch.ones(4), folded(), Read(lambda name: -torch.ones(4)))
