"""Inputs are made for every kind of model that transformers has, and reach every part of it."""

import pytest
import torch
from torch.utils._pytree import tree_map

from normswap.errors import ObserveError
from normswap.observe.inputs import example_inputs
from normswap.observe.placeholders import check_gathered
from normswap.verification.run import evaluation_inputs
from sweep.zoo import build, model_class, tiny_config

KINDS = {
    "t5": {"input_ids", "decoder_input_ids"},
    "vit": {"pixel_values"},
    "timesformer": {"pixel_values"},
    "siglip2_vision_model": {"pixel_values", "spatial_shapes", "pixel_attention_mask"},
    "qwen2_vl_vision": {"hidden_states", "grid_thw"},
    "clip": {"input_ids", "pixel_values"},
    "llava": {"input_ids", "pixel_values"},
    "idefics3": {"input_ids", "pixel_values"},
    "qwen2_5_vl": {"input_ids", "pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"},
    "whisper": {"input_features", "decoder_input_ids"},
    "wav2vec2": {"input_values"},
    "audioflamingo3": {"input_ids", "input_features"},
    "patchtst": {"past_values"},
    "time_series_transformer": {"past_values", "past_time_features", "future_values"},
    "layoutlm": {"input_ids", "bbox"},
    "inkling2_vision": {"pixel_values", "image_grid_thw"},  # blocks of merged patches
    "mllama_text_model": {"cross_attention_states"},  # optional, but parts of it do not run otherwise
    "instructblip_qformer": {"query_embeds", "encoder_hidden_states"},  # two that only help together
    "moshi_depth": {"input_ids", "last_hidden_state"},  # has a default, and is needed
    "sam3_detr_encoder": {"vision_features", "vision_pos_embeds", "text_features"},  # lists of maps
    "pop2piano": {"input_features", "decoder_input_ids"},  # takes text or sound, not both
    "musicflamingo": {"input_ids", "input_features"},  # its features cannot be made without the placeholders
    "qwen2_audio_encoder": {"input_features"},  # its mask has the form that attention takes
}


@pytest.mark.parametrize("model_type", KINDS)
def test_every_part_of_the_model_runs(model_type):
    model = build(model_type).double()
    inputs = example_inputs(model)
    assert KINDS[model_type] <= inputs.keys()
    ran = set()
    for path, module in model.named_modules():
        module.register_forward_hook(lambda *_, path=path: ran.add(path))
    with torch.no_grad():
        model(**tree_map(lambda v: v.double() if torch.is_tensor(v) and v.is_floating_point() else v, inputs))
    norms = {path for path, module in model.named_modules() if "norm" in type(module).__name__.lower()}
    assert norms and norms <= ran


def test_each_picture_has_as_many_placeholders_as_features():
    model = build("llava")
    inputs = example_inputs(model)
    side = model.config.vision_config.image_size // model.config.vision_config.patch_size
    assert ((inputs["input_ids"] == model.config.image_token_id).sum(1) == side * side).all()
    assert len(inputs["input_ids"]) == len(inputs["pixel_values"]) > 1


def test_inputs_are_the_same_each_time_and_differ_within():
    model = build("llava")
    state = torch.get_rng_state()
    first, second = example_inputs(model), example_inputs(model)
    assert torch.equal(state, torch.get_rng_state())
    assert first.keys() == second.keys()
    tensors = [name for name, value in first.items() if torch.is_tensor(value)]
    assert tensors and all(torch.equal(first[name], second[name]) for name in tensors)
    assert len(first["input_ids"].unique()) > 2 and first["pixel_values"].std() > 0.5


def test_models_on_the_meta_device_get_the_same_inputs():
    real = build("qwen2_5_vl")
    with torch.device("meta"):
        empty = type(real)(real.config)
    made, expected = example_inputs(empty), example_inputs(real)
    assert made.keys() == expected.keys() and len(made) > 4
    assert all(torch.equal(made[name], value) for name, value in expected.items() if torch.is_tensor(value))


def test_verification_draws_other_pixels_and_keeps_the_placeholders():
    model = build("llava")
    batches, shape, _ = evaluation_inputs(model, None, None, 64)
    example = example_inputs(model)
    assert len(batches) > 1 and shape[0] == len(batches) * len(example["pixel_values"])
    token = model.config.image_token_id
    places = example["input_ids"] == token
    assert places.any() and all(torch.equal(batch["input_ids"] == token, places) for batch in batches)
    assert not torch.equal(batches[0]["pixel_values"], batches[1]["pixel_values"])


def test_what_cannot_be_known_is_named():
    with pytest.raises(ObserveError, match="needs num_patches.*Pass `inputs`"):
        example_inputs(build("deepseek_ocr2_encoder"))


def test_a_model_without_a_forward_is_refused():
    with pytest.raises(ObserveError, match="BarkModel has no forward of its own"):
        example_inputs(model_class("bark")(tiny_config("bark")))


def test_a_mask_of_integers_taken_for_row_numbers_is_stopped():
    """Each of its entries would be a row: of an image of 224 x 224, 35 GiB."""
    image, mask = torch.empty(5, 3, 224, 224), torch.ones(5, 224, 224, dtype=torch.long)
    with pytest.raises(IndexError, match="more than small inputs are for"):
        check_gathered("__getitem__", (image, mask))
    check_gathered("__getitem__", (image, mask[0, 0]))
    check_gathered("__getitem__", (image, torch.ones(5, 3, 224, 224, dtype=torch.bool)))
