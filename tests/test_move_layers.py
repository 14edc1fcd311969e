"""Different placements for different layers, against the same written by hand; layers and placements not there."""

import copy
import functools

import pytest
import torch

from models import tiny
from normswap.apply.live import apply_plan
from normswap.errors import RefusedError
from normswap.planning.planner import plan_moves
from normswap.planning.request import Request
from normswap.understand.normmap import NormMap
from normswap.verification.precision import LiftFloat32
from placement_families import FAMILIES, Stack
from test_move import TOLERANCE, numbers
from test_placement_references import prepared


def by_layer(stack: Stack, c: list[float], t: list[float], kinds: list[str]) -> torch.Tensor:
    """A pre-norm stream whose steps stand in different placements; after a normalised step it carries `c n(x)`."""
    x, normal = stack.first, False
    for i, (step, kind) in enumerate(zip(stack.steps, kinds, strict=True)):
        (branch,) = step.branches
        if kind in ("pre", "sandwich"):
            y = branch.apply(branch.n_in(x))
            x = x + (t[i] * stack.norm_at(i).plain(y) if kind == "sandwich" else y)
            normal = False
            continue
        own, skip = (c[i], 1.0) if kind == "post" else (1.0, c[i])
        u = x if normal else own * stack.norm_at(i).plain(x)
        y = stack.norm_at(i + 1).plain(skip * u + branch.apply(branch.n_in.affine(u / own)))
        at_end = i + 1 == len(kinds)
        x = y if at_end or kinds[i + 1] == "deepnorm" else c[i + 1] * y
        normal = True
    return stack.final.affine(x) if normal else stack.final(x)


LAYERS = {
    ("post", "0"): "post pre pre",
    ("post", "1"): "pre post pre",
    ("post", "2"): "pre pre post",
    ("post", "0,2"): "post pre post",
    (("post", "sandwich"), ("0", "2")): "post pre sandwich",
    (("deepnorm", "post"), ("0-1", "2")): "deepnorm deepnorm post",
    (("post", "deepnorm"), (None, "1")): "post deepnorm post",
}


@functools.cache
def three_layers():
    model = tiny("llama", num_hidden_layers=3).double()
    inputs = prepared("llama")[1]
    return model, inputs, NormMap.of(model, inputs)


def request_of(asked) -> Request:
    """Of placements, and layers for them."""
    return Request.of(**dict(zip(("placement", "layers"), asked, strict=False)))


@pytest.mark.parametrize("request_", LAYERS, ids=str)
def test_layers_have_placements_of_their_own(request_):
    model, inputs, normmap = three_layers()
    (c,), (t,), scales = numbers(normmap)
    plan, steps = plan_moves(normmap, request_of(request_), scales=scales)
    result = apply_plan(copy.deepcopy(model), plan)
    kinds = LAYERS[request_].split()
    assert [(step.layer, step.after) for step in steps] == [
        (i, k) for i in range(3) for k in [kinds[i]] * 2 if k != "pre"
    ]
    with LiftFloat32():
        expected = FAMILIES["llama"](
            model, inputs, lambda stack: by_layer(stack, c, t, [k for k in kinds for _ in "ab"])
        )
        logits = result(**inputs).logits
    assert (logits - expected).abs().max() < TOLERANCE * expected.abs().max()  # 2e-15
    checked = 0
    for mine, theirs, kind in zip(result.model.layers, model.model.layers, kinds, strict=True):
        if kind == "pre":
            assert type(mine) is type(theirs)
            own = mine.state_dict()
            assert own.keys() == theirs.state_dict().keys()
            assert all(torch.equal(own[k], v) for k, v in theirs.state_dict().items())
            checked += 1
        else:
            assert type(mine) is not type(theirs)
    assert checked == kinds.count("pre")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("post", "3"), "--layers 3: this model has no layer 3; expected numbers from 0 to 2"),
        (("post", "0-"), "expects numbers and ranges such as 0-3,7; found '0-'"),
        (
            ("nowhere",),
            "'nowhere' is not offered: expected one of pre, post, deepnorm, pre-normalized-skip, sandwich, ",
        ),
        (("pre",), "every block stands so already"),
        ((("post",), ("0", "1")), "layers 1 belong to no placement"),
    ],
)
def test_layers_and_placements_that_are_not_there(asked, message):
    normmap = three_layers()[2]
    with pytest.raises(RefusedError) as caught:
        plan_moves(normmap, request_of(asked))
    assert message in str(caught.value)
