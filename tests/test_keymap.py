"""Checkpoint keys against model names: the mapping is the one that from_pretrained uses, and it can be undone."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, GPT2LMHeadModel, GPT2Model, MixtralConfig, MixtralForCausalLM
from transformers.core_model_loading import ConversionOps, WeightConverter

from models import randomise, tiny
from normswap.checkpoint.files import Checkpoint
from normswap.checkpoint.keymap import Group, KeyMap
from normswap.errors import PlanError, SourceError


def mixtral(experts: int = 12):
    # more than ten experts, so that sorting their keys as text would stack them in the wrong order
    config = MixtralConfig(
        vocab_size=31,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=experts,
    )
    return randomise(MixtralForCausalLM(config))


def bert():
    config = BertConfig(vocab_size=31, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2)
    return randomise(BertForMaskedLM(config))


MODELS = {
    "gpt2": lambda: tiny("gpt2"),
    "gpt_neox": lambda: tiny("gpt_neox"),
    "mixtral": mixtral,
    "bert": bert,
}


def on_meta(cls, config):
    with torch.device("meta"):
        return cls(config)


def save(model, path, rename=lambda key: key, extra=None, drop=()):
    """The model's own save, then its keys renamed, tensors added and left out."""
    model.save_pretrained(path)
    file = path / "model.safetensors"
    tensors = {rename(key): value for key, value in load_file(file).items() if key not in drop}
    save_file(tensors | (extra or {}), file, {"format": "pt"})
    return path


@pytest.mark.parametrize("name", MODELS)
def test_makes_every_parameter_and_undoes_it(tmp_path, name):
    model = MODELS[name]()
    checkpoint = Checkpoint.open(save(model, tmp_path / "m"))
    keymap = KeyMap.build(on_meta(type(model), model.config), checkpoint)
    state, made = model.state_dict(), {}
    for group in keymap.groups:
        sources = {key: checkpoint.read(key) for key in group.sources}
        targets = keymap.to_model(group, sources)
        assert tuple(targets) == group.targets
        made |= targets
        back = keymap.to_source(group, targets)
        assert back.keys() == sources.keys()
        assert all(torch.equal(back[key], sources[key]) for key in sources)
    assert sorted(key for group in keymap.groups for key in group.sources) == sorted(checkpoint.tensors)
    assert all(torch.equal(made[key], state[key]) for key in made)
    aliases = {alias for key in made for alias in keymap.names_of(key)}
    assert state.keys() <= aliases and len(made) > 10


def test_experts_are_merged_in_the_order_of_their_numbers(tmp_path):
    model = mixtral()
    checkpoint = Checkpoint.open(save(model, tmp_path / "m"))
    keymap = KeyMap.build(on_meta(MixtralForCausalLM, model.config), checkpoint)
    group = keymap.group_of["model.layers.1.mlp.experts.down_proj"]
    numbers = [int(key.split(".experts.")[1].split(".")[0]) for key in group.sources]
    assert numbers == list(range(12))
    gate_up = keymap.group_of["model.layers.1.mlp.experts.gate_up_proj"]
    assert len(gate_up.sources) == 24 and not set(gate_up.sources) & set(group.sources)


def test_keys_without_the_base_model_s_prefix(tmp_path):
    """Hub checkpoints are often saved from the base model."""
    model = tiny("gpt2")
    folder = save(model, tmp_path / "m", rename=lambda key: key.removeprefix("transformer."))
    checkpoint = Checkpoint.open(folder)
    keymap = KeyMap.build(on_meta(GPT2LMHeadModel, model.config), checkpoint)
    assert keymap.group_of["transformer.h.1.ln_1.weight"].sources == ("h.1.ln_1.weight",)
    assert all(group.targets for group in keymap.groups)


def test_keys_with_a_prefix_that_the_base_model_lacks(tmp_path):
    model = tiny("gpt2", tie_word_embeddings=False)
    checkpoint = Checkpoint.open(save(model, tmp_path / "m"))
    keymap = KeyMap.build(on_meta(GPT2Model, model.config), checkpoint)
    assert keymap.group_of["h.1.ln_1.weight"].sources == ("transformer.h.1.ln_1.weight",)
    assert [group.sources for group in keymap.groups if not group.targets] == [("lm_head.weight",)]


def test_legacy_names(tmp_path):
    def legacy(key):
        return key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    model = bert()
    checkpoint = Checkpoint.open(save(model, tmp_path / "m", rename=legacy))
    keymap = KeyMap.build(on_meta(BertForMaskedLM, model.config), checkpoint)
    name = "bert.encoder.layer.0.output.LayerNorm.weight"
    assert keymap.group_of[name].sources == ("bert.encoder.layer.0.output.LayerNorm.gamma",)


def test_what_the_model_has_no_place_for_is_a_group_of_its_own(tmp_path):
    model = tiny("gpt2")
    folder = save(model, tmp_path / "m", extra={"mtp.0.weight": torch.ones(3), "h.0.attn.masked_bias": torch.ones(1)})
    keymap = KeyMap.build(on_meta(GPT2LMHeadModel, model.config), Checkpoint.open(folder))
    unmatched = {group.sources for group in keymap.groups if not group.targets}
    assert unmatched == {("mtp.0.weight",), ("h.0.attn.masked_bias",)}


def test_a_tied_parameter_is_found_where_its_alias_is_stored(tmp_path):
    model = tiny("gpt2")
    checkpoint = Checkpoint.open(save(model, tmp_path / "m"))
    keymap = KeyMap.build(on_meta(GPT2LMHeadModel, model.config), checkpoint)
    assert "lm_head.weight" not in checkpoint.tensors
    assert set(keymap.names_of("lm_head.weight")) == {"lm_head.weight", "transformer.wte.weight"}
    assert keymap.stored_group("lm_head.weight").sources == ("transformer.wte.weight",)
    assert keymap.names_of("transformer.wpe.weight") == ("transformer.wpe.weight",)
    assert keymap.stored_group("nothing.like.this") is None


def test_weights_of_another_configuration_are_refused(tmp_path):
    checkpoint = Checkpoint.open(save(tiny("gpt2"), tmp_path / "m"))
    other = on_meta(GPT2LMHeadModel, tiny("gpt2", vocab_size=100).config)
    with pytest.raises(SourceError, match=r"wte.weight of shape \(100, 32\).*found \(99, 32\)"):
        KeyMap.build(other, checkpoint)


@pytest.mark.parametrize("part", ["w1", "w2"])
def test_a_missing_expert_is_noticed(tmp_path, part):
    model = mixtral(3)
    folder = save(model, tmp_path / "m", drop={f"model.layers.0.block_sparse_moe.experts.1.{part}.weight"})
    with pytest.raises(SourceError, match=r"layers\.0\.(mlp|block_sparse_moe)\.experts"):
        KeyMap.build(on_meta(MixtralForCausalLM, model.config), Checkpoint.open(folder))


def test_two_tensors_for_one_parameter_are_refused(tmp_path):
    model = tiny("gpt2")
    folder = save(model, tmp_path / "m", extra={"h.0.ln_1.weight": torch.ones(32)})
    with pytest.raises(SourceError, match=r"transformer\.h\.0\.ln_1\.weight, found .*h\.0\.ln_1\.weight"):
        KeyMap.build(on_meta(GPT2LMHeadModel, model.config), Checkpoint.open(folder))


@pytest.mark.parametrize(
    ("prefix", "name", "key"),
    [
        ("transformer.", "lm_head.weight", "lm_head.weight"),
        ("", "lm_head.weight", "lm_head.weight"),
        ("transformer.", "transformer.h.1.attn.extra", "transformer.h.1.attn.extra"),
        ("", "transformer.h.1.attn.extra", "h.1.attn.extra"),
        ("", "lm_head.bias", "lm_head.bias"),
    ],
)
def test_a_new_parameter_is_named_as_its_relatives_are(tmp_path, prefix, name, key):
    model = tiny("gpt2")
    folder = save(model, tmp_path / "m", rename=lambda k: prefix + k.removeprefix("transformer."))
    keymap = KeyMap.build(on_meta(GPT2LMHeadModel, model.config), Checkpoint.open(folder))
    assert keymap.key_for_new(name) == key


def test_a_new_parameter_of_a_renamed_module_follows_it(tmp_path):
    """The file calls the module `block_sparse_moe`, the model `mlp`."""
    model = mixtral(3)
    keymap = KeyMap.build(on_meta(MixtralForCausalLM, model.config), Checkpoint.open(save(model, tmp_path / "m")))
    gate = keymap.group_of["model.layers.1.mlp.gate.weight"].sources[0]
    assert gate == "model.layers.1.block_sparse_moe.gate.weight"
    assert keymap.key_for_new("model.layers.1.mlp.gate.bias") == "model.layers.1.block_sparse_moe.gate.bias"


def test_no_key_for_a_parameter_that_is_there(tmp_path):
    model = tiny("gpt2")
    keymap = KeyMap.build(on_meta(GPT2LMHeadModel, model.config), Checkpoint.open(save(model, tmp_path / "m")))
    with pytest.raises(PlanError, match=r"new parameter transformer\.wpe\.weight"):
        keymap.key_for_new("transformer.wpe.weight")


class OneWay(ConversionOps):
    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
        return {target_patterns[0]: next(iter(input_dict.values()))[0] * 2}


class Misnamed(OneWay):
    @property
    def reverse_op(self):
        return Elsewhere()


class Elsewhere(OneWay):
    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
        return {"elsewhere": next(iter(input_dict.values()))[0]}


@pytest.mark.parametrize(("operation", "message"), [(OneWay, "cannot be written back"), (Misnamed, "found elsewhere")])
def test_a_conversion_that_cannot_be_undone_is_refused(tmp_path, operation, message):
    model = tiny("gpt2")
    keymap = KeyMap.build(on_meta(GPT2LMHeadModel, model.config), Checkpoint.open(save(model, tmp_path / "m")))
    converter = WeightConverter("old", "new", [operation()])
    group = Group(("transformer.old",), ("transformer.new",), converter)
    with pytest.raises(PlanError, match=message) as refused:
        keymap.to_source(group, {"transformer.new": torch.ones(2)})
    assert "transformer.new" in str(refused.value) and "transformer.old" in str(refused.value)


def test_sharding_makes_no_difference(tmp_path):
    model = mixtral()
    whole = Checkpoint.open(save(model, tmp_path / "one"))
    model.save_pretrained(tmp_path / "many", max_shard_size="4KB")
    many = Checkpoint.open(tmp_path / "many")
    assert len(many.shards) > 5 and json.loads((tmp_path / "many" / "config.json").read_text())
    meta = on_meta(MixtralForCausalLM, model.config)
    found = [{(group.sources, group.targets) for group in KeyMap.build(meta, c).groups} for c in (whole, many)]
    assert found[0] == found[1]
