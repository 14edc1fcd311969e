import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hand_plans import folded_gpt2_plan, logits, publish, rms_plan, small, token_ids
from normswap.errors import NormswapError, SourceError
from normswap.loading import load

CASES = {
    "untied": ("gpt2", lambda model: rms_plan(model, "untie")),
    "tied": ("gpt2", lambda model: rms_plan(model, "centre output")),
    "weightless": ("gpt2", folded_gpt2_plan),
    "neox": ("gpt_neox", rms_plan),
    "experts": ("phimoe", rms_plan),
}


def converted(tmp_path, name="weightless"):
    """A published folder, its live model, and what the source computes."""
    model_type, make_plan = CASES[name]
    model = small(model_type, dtype=torch.float32)
    expected = logits(model, token_ids())
    return publish(model, make_plan(model), tmp_path / "out"), tmp_path / "out", expected


def edit_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", CASES)
def test_load_gives_the_converted_model(tmp_path, name):
    live, folder, expected = converted(tmp_path, name)
    # no code of the folder is needed or run
    (folder / "modeling_normswap.py").write_text("raise SystemExit")
    model = load(
        folder, attn_implementation="eager", **({"experts_implementation": "eager"} if name == "experts" else {})
    )
    assert type(model).__name__ == type(live).__name__ and isinstance(model, type(live)) and not model.training
    assert not any(isinstance(module, nn.LayerNorm) for module in model.modules())
    before, after = live.state_dict(), model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    # float32; measured: 2.1e-6 to 6.4e-6
    assert (logits(model, token_ids()) - expected).abs().max() / expected.std() < 5e-5
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (name == "tied") == model.config.tie_word_embeddings


def test_experts_are_stored_one_by_one(tmp_path):
    _, folder, _ = converted(tmp_path, "experts")
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in load_file(folder / "model.safetensors")


def test_arguments_reach_transformers(tmp_path):
    _, folder, _ = converted(tmp_path)
    model = load(folder, dtype=torch.bfloat16, device_map="cpu", attn_implementation="sdpa")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "sdpa"


def test_a_model_that_the_stock_class_cannot_hold_is_not_saved_as_one(tmp_path):
    _, folder, _ = converted(tmp_path)
    with pytest.raises(NormswapError, match="trust_remote_code=True"):
        load(folder).save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_idle_tensors_of_the_source_are_let_be(tmp_path):
    _, folder, expected = converted(tmp_path)
    edit_weights(folder, lambda tensors: tensors.update({"mtp.weight": torch.ones(3)}))
    model = load(folder, attn_implementation="eager")
    # float32; measured: 3.3e-6
    assert (logits(model, token_ids()) - expected).abs().max() / expected.std() < 5e-5


LN = "transformer.h.0.ln_1"
WRONG_WEIGHTS = {
    "a missing tensor": (lambda t: t.pop("lm_head.bias"), r"missing: lm_head.bias \(1 in all\)"),
    "another shape": (
        lambda t: t.update({"lm_head.bias": torch.ones(98)}),
        r"of another shape: lm_head.bias \(98,\), expected \(99,\)",
    ),
    "what the plan dropped": (lambda t: t.update({f"{LN}.bias": torch.ones(32)}), f"not expected: {LN}.bias"),
}


@pytest.mark.parametrize("name", WRONG_WEIGHTS)
def test_weights_of_another_plan_are_refused(tmp_path, name):
    change, message = WRONG_WEIGHTS[name]
    _, folder, _ = converted(tmp_path)
    edit_weights(folder, change)
    with pytest.raises(SourceError, match=message):
        load(folder)


def set_key(key, value):
    def change(record):
        record[key] = value
        return record

    return change


def without(key):
    return lambda record: {k: v for k, v in record.items() if k != key}


def config_key(**changes):
    return lambda record: {**record, "source_config": {**record["source_config"], **changes}}


def plan_key(**changes):
    return lambda record: {**record, "plan": {**record["plan"], **changes}}


WRONG_RECORDS = {
    "no plan": (without("plan"), "it has no key 'plan'"),
    "no configuration": (without("source_config"), "it has no key 'source_config'"),
    "a list": (lambda record: [record], "is damaged"),
    "a plan with an unknown key": (plan_key(colour="red"), "colour"),
    "a configuration that is none": (set_key("source_config", []), "no model configuration"),
    "an unknown model type": (config_key(model_type="gpt9"), "a gpt9, which transformers"),
    "an unknown class": (plan_key(architecture="GPT9Model"), "a GPT9Model, which transformers"),
}


@pytest.mark.parametrize("name", WRONG_RECORDS)
def test_a_damaged_record_is_refused(tmp_path, name):
    change, message = WRONG_RECORDS[name]
    _, folder, _ = converted(tmp_path)
    record = json.loads((folder / "normswap.json").read_text())
    (folder / "normswap.json").write_text(json.dumps(change(record)))
    with pytest.raises(SourceError, match=message):
        load(folder)


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(SourceError, match="is not a folder that normswap wrote"):
        load(tmp_path)
    (tmp_path / "normswap.json").write_text("{")
    with pytest.raises(SourceError, match="is damaged"):
        load(tmp_path)
