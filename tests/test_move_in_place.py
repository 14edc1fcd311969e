"""DeepNorm to post-norm, and LayerNorm Scaling, over the families: against placements written by hand, and back."""

import copy

import pytest
import torch
from torch import nn

import normswap
from normswap.errors import RefusedError
from normswap.planning.rewrites.moved import Scales
from normswap.understand.normmap import NormMap
from normswap.understand.placement import Block
from normswap.verification.precision import LiftFloat32
from placement_references import reference
from test_move import TOLERANCE, check_same, counts, moved, numbers, observed
from test_placement_references import POST, RAW

SWEPT = [name for name in (*RAW, *POST) if name != "olmo2"]  # its branches read the stream without a norm
DAMPED = [name for name in RAW if name != "olmo2"]


def steps_of(model: nn.Module, name: str) -> list[list[Block]]:
    """Per stream the blocks that close a step."""
    streams = NormMap.of(model, observed(name)[1]).streams
    return [[block for block in stream.blocks if not block.beside] for stream in streams]


def deepnorm(name: str) -> tuple[nn.Module, torch.Tensor]:
    """The family's model with DeepNorm blocks, each with a scale of its own, and what that is by hand."""
    model, inputs, normmap = observed(name)
    c, _, scales = numbers(normmap)
    c = [[value + 0.01 for value in own] for own in c]  # none is 1
    there, plan = moved(name, "deepnorm", Scales({step: value + 0.01 for step, value in scales.stream.items()}))
    if name in POST:  # there scales begin as 1
        named = [(edit.module, edit.name) for edit in plan.edits if edit.edit == "set_scale"]
        for (module, number), value in zip(named, [value for own in c for value in own], strict=True):
            setattr(there.get_submodule(module), number, value)
    with LiftFloat32():
        return there, reference(model, inputs, "deepnorm", c)


@pytest.mark.parametrize("name", SWEPT)
def test_deepnorm_becomes_post_norm(name):
    there, expected = deepnorm(name)
    scaled = [block for blocks in steps_of(there, name) for block in blocks if block.is_scaled]
    inputs = observed(name)[1]
    plan = normswap.plan(there, placement="post", exact=True, inputs=inputs)
    assert plan.claim == "exact" and len(plan.moved) == len(scaled) == sum(counts(observed(name)[2]))
    result = copy.deepcopy(there)
    normswap.convert_model(result, plan=plan, inputs=inputs)
    # of the weights of the model that it all began with few were neither folded into nor divided: embeddings, a norm
    check_same(name, result, expected, fewest=3)
    assert not any(block.is_scaled for blocks in steps_of(result, name) for block in blocks)
    with pytest.raises(RefusedError, match="every block stands so already"):
        normswap.plan(result, placement="post", inputs=inputs)


@pytest.mark.parametrize("name", DAMPED)
def test_norms_are_damped_and_free_again(name):
    model, inputs, _ = observed(name)

    def expected() -> torch.Tensor:
        with LiftFloat32():
            return model(**inputs).logits

    there = copy.deepcopy(model)
    plan = normswap.convert_model(there, placement="layernorm-scaling", exact=True, inputs=inputs)
    assert plan.claim == "exact"
    check_same(name, there, expected())
    steps = steps_of(there, name)
    assert {block.layer for blocks in steps for block in blocks if block.is_damped} == {1}
    # read as the table says, its own norms and the root of each layer's number are that function
    roots = [[(block.layer + 1) ** -0.5 for block in blocks] for blocks in steps]
    with LiftFloat32(), torch.no_grad():
        assert (reference(there, inputs, "layernorm-scaling", roots) - expected()).abs().max() < TOLERANCE
        assert (reference(there, inputs, "unmoved") - expected()).abs().max() > 0.01
    back = copy.deepcopy(there)
    normswap.convert_model(back, placement="sandwich" if name == "gemma2" else "pre", exact=True, inputs=inputs)
    check_same(name, back, expected())
    assert not any(block.is_damped for blocks in steps_of(back, name) for block in blocks)


@pytest.mark.parametrize("name", ["olmo2", *POST])
def test_norms_that_stand_elsewhere_are_not_damped(name):
    model, inputs, _ = observed(name)
    words = "is reordered: expected a pre-norm block" if name == "olmo2" else "go to pre or pre-normalized-skip"
    with pytest.raises(RefusedError, match=words):
        normswap.plan(model, placement="layernorm-scaling", inputs=inputs)
