"""The hand-written placements are right: where a move is exact, they give what the stock model gives."""

import pytest
import torch

from models import tiny
from normswap.verification.precision import LiftFloat32
from placement_families import Norm
from placement_references import reference, true_scales
from sweep import zoo

RAW = ["gpt2", "llama", "mixtral", "gpt_neox", "gemma2", "olmo2", "opt", "whisper", "vit", "dinov2"]
POST = ["bert", "bart", "opt-after"]
TEXT = {"gpt2", "llama", "mixtral", "gpt_neox", "gemma2", "olmo2", "opt", "bert", "bart", "opt-after"}


def prepared(name: str):
    """A float64 model and inputs without padding."""
    generator = torch.Generator().manual_seed(0)
    if name not in TEXT:
        model = zoo.build(name).double()
        inputs = {k: v for k, v in zoo.inputs_for(model).items() if isinstance(v, torch.Tensor) and "mask" not in k}
        return model, {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    model = (tiny("opt", do_layer_norm_before=False) if name == "opt-after" else tiny(name)).double()
    ids = torch.randint(3, 99, (2, 7), generator=generator)
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids.flip(1)[:, :5]} if name == "bart" else {})
    return model, inputs


@torch.no_grad()
def error(a, b) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("name", [*RAW, *POST])
def test_the_streams_of_a_family_are_the_models(name):
    model, inputs = prepared(name)
    with LiftFloat32(), torch.no_grad():
        assert error(reference(model, inputs, "unmoved"), model(**inputs).logits) < 1e-13  # 1e-15


@pytest.mark.parametrize("target", ["post", "deepnorm"])
@pytest.mark.parametrize("name", RAW)
def test_with_each_tokens_own_scale_a_moved_model_is_the_old_one(name, target):
    model, inputs = prepared(name)
    with LiftFloat32(), torch.no_grad():
        logits = model(**inputs).logits
        moved = reference(model, inputs, target, true_scales(model, inputs).scales)
        assert error(moved, logits) < 1e-12  # 2e-15
        assert error(reference(model, inputs, target), logits) > 0.05  # scales of 1 are another model


@pytest.mark.parametrize("moved", [[True, True, False, False], [False, True, False, True], [False] * 4])
def test_some_layers_moved_with_each_tokens_own_scale_is_the_old_model(moved):
    model, inputs = prepared("gpt2")
    with LiftFloat32(), torch.no_grad():
        logits = reference(model, inputs, "mixed", true_scales(model, inputs).scales, moved=[moved])
        assert error(logits, model(**inputs).logits) < 1e-12


def test_a_kept_first_norm_costs_no_more_than_its_eps():
    model, inputs = prepared("llama")
    with LiftFloat32(), torch.no_grad():
        scales = true_scales(model, inputs).scales
        kept = error(reference(model, inputs, "keel", scales), model(**inputs).logits)
        assert 1e-12 < kept < 1e-4


def test_a_sandwich_norm_that_is_the_identity_changes_nothing():
    model, inputs = prepared("gpt2")
    with LiftFloat32(), torch.no_grad():
        logits = model(**inputs).logits
        assert error(reference(model, inputs, "sandwich", norms=[[lambda x: x] * 4]), logits) < 1e-13
        norms = [[Norm(True, 1e-5)] * 4]
        assert error(reference(model, inputs, "sandwich", norms=norms), logits) > 0.05


def test_reordered_with_each_tokens_own_scale_and_no_branch_norm_is_the_old_model():
    model, inputs = prepared("llama")
    with LiftFloat32(), torch.no_grad():
        scales = true_scales(model, inputs).scales
        moved = reference(model, inputs, "reordered", scales, norms=[[lambda x: x] * 4])
        assert error(moved, model(**inputs).logits) < 1e-12


@pytest.mark.parametrize("name", POST)
def test_post_to_pre_loses_the_means_alone(name):
    model, inputs = prepared(name)
    with LiftFloat32(), torch.no_grad():
        logits = model(**inputs).logits
        found = true_scales(model, inputs)
        assert error(reference(model, inputs, "pre", found.scales, means=found.means), logits) < 1e-10
        assert error(reference(model, inputs, "pre", found.scales), logits) > 1e-3


@pytest.mark.parametrize("name", POST)
def test_post_to_a_normalised_skip_and_to_deepnorm_is_exact(name):
    model, inputs = prepared(name)
    with LiftFloat32(), torch.no_grad():
        logits = model(**inputs).logits
        assert error(reference(model, inputs, "pre-normalized-skip"), logits) < 1e-13
        assert error(reference(model, inputs, "deepnorm"), logits) < 1e-13
