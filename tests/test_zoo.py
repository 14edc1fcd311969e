"""The zoo builds small models of transformers' types, on which mistakes show."""

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from sweep.shrink import PATCH, shrink
from sweep.zoo import OVERRIDES, CannotBuild, build, inputs_for, model_class, model_types, tiny_config

SPREAD = ("mamba2", "bart", "swin", "hubert", "clap", "deepseek_v3")


def test_every_type_of_the_mapping_is_there():
    assert model_types() == list(CONFIG_MAPPING.keys()) and len(model_types()) > 800


@pytest.mark.parametrize("model_type", SPREAD)
def test_models_are_small_finite_and_repeatable(model_type):
    model, again = build(model_type, seed=3), build(model_type, seed=3)
    assert sum(p.numel() for p in model.parameters()) < 5e6 and not model.training
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    with torch.no_grad():
        output = model(**inputs_for(model))
    floats = [v for v in output.values() if torch.is_tensor(v) and v.is_floating_point()]
    assert floats and all(v.isfinite().all() for v in floats)
    assert all(v.std() > 0 for v in floats if v.numel() > 1)


def test_what_agrees_in_the_default_agrees_in_the_small_one():
    config = tiny_config("llava")
    text, vision = config.text_config, config.vision_config
    assert text.hidden_size % text.num_attention_heads == 0 and vision.image_size % vision.patch_size == 0
    assert config.image_token_id < text.vocab_size
    assert text.hidden_size != vision.hidden_size != vision.intermediate_size


def test_every_kind_of_layer_is_kept_once():
    default, small = CONFIG_MAPPING["gemma3_text"](), tiny_config("gemma3_text")
    assert len(small.layer_types) == small.num_hidden_layers == 2 < default.num_hidden_layers
    assert set(small.layer_types) == set(default.layer_types)


@pytest.mark.parametrize(
    ("model_type", "derived"),
    [
        ("sam", lambda c: (c.prompt_encoder_config.image_embedding_size, c.vision_config.image_size // PATCH)),
        ("mobilebert", lambda c: (c.true_hidden_size, c.intra_bottleneck_size)),
        ("deepseek_v3", lambda c: (c.qk_head_dim, c.qk_nope_head_dim + c.qk_rope_head_dim)),
    ],
)
def test_what_a_configuration_derives_follows_from_the_small_values(model_type, derived):
    found, expected = derived(tiny_config(model_type))
    assert found == expected


def test_indices_of_all_layers_are_of_the_layers_that_are_kept():
    small = shrink({"num_hidden_layers": 12, "kv_source_layers": list(range(12)), "use_rope": [1, 1, 1, 0] * 3})
    assert small["kv_source_layers"] == [0, 1] and sorted(small["use_rope"]) == [0, 1]


@pytest.mark.parametrize("model_type", ["resnet", "t5", "clip"])
def test_models_are_well_conditioned(model_type):
    """The last bit of every weight moves the outputs by 3e-15 (resnet), 2e-15 (t5) and 2e-14 (clip)."""
    model = build(model_type).double()
    inputs = {
        k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs_for(model).items()
    }

    def outputs():
        with torch.no_grad():
            return [v for v in model(**inputs).values() if torch.is_tensor(v) and v.is_floating_point()]

    before = outputs()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 2**-52 * (torch.rand_like(parameter) > 0.5))
    assert before
    for old, new in zip(before, outputs(), strict=True):
        assert old.abs().max() < 100  # resnet 32, clip 6.5, t5 3.2
        assert (old - new).abs().max() < 1e-13 * old.abs().max()


def test_a_package_that_is_missing_is_said(monkeypatch):
    def missing(model_type):
        raise ImportError("\nModel requires the timm library but it was not found in your environment. Install it.")

    monkeypatch.setattr("sweep.zoo.model_class", missing)
    with pytest.raises(CannotBuild, match="^Model requires the timm library but it was not found in your environment$"):
        build("bert")


def test_doublings_stay_doublings():
    small = shrink({"hidden_sizes": [96, 192, 384, 768], "embed_dim": 96, "vocab_size": 50000})
    assert small["hidden_sizes"] == [small["embed_dim"] * 2**i for i in range(4)]
    assert small["vocab_size"] == 99


def test_a_type_without_a_model_says_so():
    with pytest.raises(CannotBuild, match="no model of Sam2MaskDecoderConfig"):
        model_class("sam2_mask_decoder")


def test_overrides_are_of_types_that_exist():
    assert OVERRIDES.keys() <= set(model_types())
