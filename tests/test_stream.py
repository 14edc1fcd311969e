"""A plan on a checkpoint's files: what no edit touches stays bit for bit, what one touches is the float64 result
rounded once, and what stock transformers loads from the result is what the plan says."""

import hashlib
import json
import os
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2LMHeadModel,
    GPTNeoXForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
)

from models import randomise, tiny
from normswap.apply.stream import preview, write_tensors
from normswap.apply.values import Values
from normswap.checkpoint.files import Checkpoint
from normswap.checkpoint.header import render_header
from normswap.checkpoint.keymap import KeyMap
from normswap.checkpoint.publish import Staging
from normswap.errors import DestinationError, PlanError
from normswap.planning.edits import Centre, Drop, Fill, FoldBias, FoldGain, GrowBias, SetConfig, Untie
from normswap.planning.plans import Plan
from normswap.planning.request import Request

WTE, HEAD = "transformer.wte.weight", "lm_head.weight"
PROJECTION = "transformer.h.0.attn.c_proj.weight"


def plan_of(*edits) -> Plan:
    told = dict(architecture="Any", model_type="any", request=Request(), claim="exact", reasons=(), converted=())
    return Plan(edits=edits, **told)


def opened(folder, cls):
    """The checkpoint in `folder`, and its mapping onto a model without weights."""
    with torch.device("meta"):
        model = cls(cls.config_class.from_pretrained(folder))
    checkpoint = Checkpoint.open(folder)
    return checkpoint, KeyMap.build(model, checkpoint)


def convert(folder, cls, out, *edits, **options):
    out.mkdir()
    summary = write_tensors(*opened(folder, cls), plan_of(*edits), out, **options)
    return summary, stored(out)


def stored(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def with_config(source, out, **changes):
    """The source's configuration beside the new weights, as the step after this one writes it."""
    config = json.loads((source / "config.json").read_text()) | changes
    (out / "config.json").write_text(json.dumps(config))
    return out


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def centred(value: torch.Tensor, axis: int) -> torch.Tensor:
    wide = value.double()
    return (wide - wide.mean(axis, keepdim=True)).to(value.dtype)


@pytest.fixture
def gpt2(tmp_path):
    tiny("gpt2").save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.parametrize("shards", ["1GB", "10KB"])
def test_without_edits_the_files_are_the_same_bytes(tmp_path, shards):
    source, out = tmp_path / "source", tmp_path / "out"
    tiny("gpt2").save_pretrained(source, max_shard_size=shards)
    summary, _ = convert(source, GPT2LMHeadModel, out)
    names = sorted(path.name for path in source.glob("*.safetensors*"))
    assert len(names) == 1 or len(names) > 4
    for name in names:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert {tensor.what for tensor in summary.tensors.values()} == {"copied"}
    assert summary.hashes == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in source.glob("*.safetensors")
    }


def test_edits_of_a_sharded_checkpoint_keep_its_layout(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    tiny("gpt2").save_pretrained(source, max_shard_size="10KB")
    summary, after = convert(
        source, GPT2LMHeadModel, out, Centre(tensor=PROJECTION, axis=1), Centre(tensor=WTE, axis=1)
    )
    before = stored(source)
    assert torch.equal(after.pop(PROJECTION), centred(before.pop(PROJECTION), 1))
    assert torch.equal(after.pop(WTE), centred(before.pop(WTE), 1))
    assert len(before) > 20 and all(same_bits(after[key], before[key]) for key in before)
    for shard in Checkpoint.open(source).shards:
        with safe_open(out / shard.name, "pt") as file:
            assert file.metadata() == shard.metadata == {"format": "pt"}
            assert file.offset_keys() == [tensor.key for tensor in shard.tensors]
        assert hashlib.sha256((out / shard.name).read_bytes()).hexdigest() == summary.hashes[shard.name]
    index = "model.safetensors.index.json"
    assert (out / index).read_bytes() == (source / index).read_bytes()


def test_bf16_is_rounded_once_from_float64(tmp_path):
    """All edits of a tensor act in float64 before the one rounding; rounding in between would give other bits."""
    source, ln = tmp_path / "source", "transformer.h.0.ln_1.weight"
    tiny("gpt2").bfloat16().save_pretrained(source)
    name = "transformer.h.0.attn.c_attn.weight"
    edits = FoldGain(tensor=name, axis=0, weight=ln, form="w"), Centre(tensor=name, axis=1, groups=3)
    _, after = convert(source, GPT2LMHeadModel, tmp_path / "out", *edits)
    before = stored(source)
    folded = before[name].double() * before[ln].double()[:, None]
    parts = folded.reshape(32, 3, 32)
    expected = (parts - parts.mean(2, keepdim=True)).reshape(32, 96)
    assert after[name].dtype == torch.bfloat16
    assert same_bits(after[name], expected.bfloat16())
    twice = folded.bfloat16().double().reshape(32, 3, 32)
    assert not same_bits(after[name], (twice - twice.mean(2, keepdim=True)).reshape(32, 96).bfloat16())


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_computing_some_rows_at_a_time_gives_the_same_bits(tmp_path, monkeypatch, rows):
    source = tmp_path / "source"
    tiny("gpt2", vocab_size=999, n_embd=36, n_head=3).save_pretrained(source)
    edits = [
        Untie(tensor=HEAD, source=WTE),
        Centre(tensor=WTE, axis=1, groups=2),
        FoldGain(tensor=WTE, axis=1, weight="transformer.ln_f.weight", form="1 + w"),
        FoldGain(tensor=HEAD, axis=1, weight="transformer.ln_f.weight", form="w"),
        Centre(tensor=PROJECTION, axis=0),
    ]
    _, whole = convert(source, GPT2LMHeadModel, tmp_path / "whole", *edits)
    parts, compute = Counter(), Values._compute
    monkeypatch.setattr("normswap.apply.values.AT_ONCE", rows * 36)
    monkeypatch.setattr("normswap.apply.values._COLUMNS", 5)
    monkeypatch.setattr("normswap.apply.values._PIECE_BYTES", 2 * rows * 36 * 4)
    monkeypatch.setattr(
        Values, "_compute", lambda self, name, *rest: parts.update([name]) or compute(self, name, *rest)
    )
    _, after = convert(source, GPT2LMHeadModel, tmp_path / "parts", *edits)
    # the projection in columns, 5 or 36 of them at once
    assert parts == {WTE: -(-999 // rows), HEAD: -(-999 // rows), PROJECTION: 1 if rows == 40 else 8}
    assert all(same_bits(after[key], whole[key]) for key in whole)


def test_reads_are_original_values_whatever_happens_to_them(tmp_path):
    """The gain and bias are neutral afterwards, and the reader is scaled, yet each fold sees what was there before."""
    source, out = tmp_path / "source", tmp_path / "out"
    tiny("gpt_neox").save_pretrained(source, max_shard_size="10KB")
    gain, bias = "gpt_neox.layers.0.input_layernorm.weight", "gpt_neox.layers.0.input_layernorm.bias"
    reader = "gpt_neox.layers.0.attention.query_key_value"
    _, after = convert(
        source,
        GPTNeoXForCausalLM,
        out,
        Fill(tensor=gain, value=1),
        Fill(tensor=bias, value=0),
        FoldGain(tensor=f"{reader}.weight", axis=1, weight=gain, form="1 + w"),
        FoldBias(tensor=f"{reader}.bias", reader=f"{reader}.weight", axis=1, bias=bias),
    )
    before = {key: value.double() for key, value in stored(source).items()}
    weight = before[f"{reader}.weight"]
    assert torch.equal(after[gain], torch.ones(32)) and torch.equal(after[bias], torch.zeros(32))
    assert torch.equal(after[f"{reader}.weight"], (weight * (1 + before[gain])).float())
    torch.testing.assert_close(after[f"{reader}.bias"], (before[f"{reader}.bias"] + weight @ before[bias]).float())


def test_a_grown_bias_lies_beside_its_reader_and_a_dropped_one_is_gone(tmp_path):
    """The model's `lm_head` is `embed_out` in the files, and so is its bias."""
    source, out = tmp_path / "source", tmp_path / "out"
    tiny("gpt_neox").save_pretrained(source, max_shard_size="10KB")
    norm = "gpt_neox.final_layer_norm.bias"
    summary, after = convert(
        source,
        GPTNeoXForCausalLM,
        out,
        GrowBias(module="lm_head", size=99),
        FoldBias(tensor="lm_head.bias", reader="lm_head.weight", axis=1, bias=norm),
        Drop(tensor=norm),
    )
    before = stored(source)
    expected = before["embed_out.weight"].double() @ before[norm].double()
    torch.testing.assert_close(after["embed_out.bias"], expected.float())
    assert after.keys() == before.keys() - {norm} | {"embed_out.bias"}
    index, old = (json.loads((f / "model.safetensors.index.json").read_text()) for f in (out, source))
    assert index["weight_map"]["embed_out.bias"] == index["weight_map"]["embed_out.weight"]
    assert norm not in index["weight_map"] and len(index["weight_map"]) == len(after)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in after.values())
    assert index["metadata"]["total_parameters"] == old["metadata"]["total_parameters"] + 99 - 32
    assert (summary.parameters_added, summary.parameters_removed) == (99, 32)
    assert (summary.tensors[norm].what, summary.tensors["embed_out.bias"].what) == ("removed", "added")


@pytest.mark.parametrize("alias", [WTE, HEAD])
def test_a_tied_parameter_is_edited_through_any_alias(tmp_path, gpt2, alias):
    _, after = convert(gpt2, GPT2LMHeadModel, tmp_path / "out", Centre(tensor=alias, axis=1))
    assert HEAD not in after
    assert torch.equal(after[WTE], centred(stored(gpt2)[WTE], 1))


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_an_untied_head_is_its_own_tensor_and_loads(tmp_path, prefix):
    """Also where the checkpoint was saved without the base model's prefix, as GPT-2's on the Hub."""
    source, out = tmp_path / "source", tmp_path / "out"
    model = tiny("gpt2")
    model.save_pretrained(source)
    bare = {prefix + key.removeprefix("transformer."): value for key, value in stored(source).items()}
    save_file(bare, source / "model.safetensors", {"format": "pt"})
    gain, wte = "transformer.ln_f.weight", model.transformer.wte.weight.detach()
    summary, after = convert(
        source,
        GPT2LMHeadModel,
        out,
        Untie(tensor=HEAD, source=WTE),
        Centre(tensor=WTE, axis=1),
        FoldGain(tensor=HEAD, axis=1, weight=gain, form="w"),
        SetConfig(key="tie_word_embeddings", value=False),
    )
    assert after.keys() == bare.keys() | {HEAD}
    assert summary.untied == (HEAD,)
    loaded, info = GPT2LMHeadModel.from_pretrained(
        with_config(source, out, tie_word_embeddings=False), output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(loaded.transformer.wte.weight, centred(wte, 1))
    expected = wte.double() * model.transformer.ln_f.weight.detach().double()
    assert torch.equal(loaded.lm_head.weight, expected.float())


def test_untying_the_name_that_is_stored_adds_the_other(tmp_path, gpt2):
    tensors = stored(gpt2)
    wte = tensors.pop(WTE)
    save_file(tensors | {HEAD: wte}, gpt2 / "model.safetensors", {"format": "pt"})
    out = tmp_path / "out"
    _, after = convert(gpt2, GPT2LMHeadModel, out, Untie(tensor=HEAD, source=WTE), Centre(tensor=WTE, axis=1))
    assert torch.equal(after[HEAD], wte) and torch.equal(after[WTE], centred(wte, 1))
    _, alone = convert(gpt2, GPT2LMHeadModel, tmp_path / "alone", Untie(tensor=HEAD, source=WTE))
    assert torch.equal(alone[HEAD], wte) and torch.equal(alone[WTE], wte)


def test_a_tied_parameter_that_is_stored_twice_is_edited_twice(tmp_path, gpt2):
    tensors = stored(gpt2)
    save_file(tensors | {HEAD: tensors[WTE].clone()}, gpt2 / "model.safetensors", {"format": "pt"})
    _, after = convert(gpt2, GPT2LMHeadModel, tmp_path / "out", Centre(tensor=WTE, axis=1))
    assert torch.equal(after[WTE], centred(tensors[WTE], 1)) and torch.equal(after[HEAD], after[WTE])

    save_file(tensors | {HEAD: tensors[WTE] + 1}, gpt2 / "model.safetensors", {"format": "pt"})
    with pytest.raises(PlanError, match="expected .* to be equal"):
        convert(gpt2, GPT2LMHeadModel, tmp_path / "refused", Centre(tensor=WTE, axis=1))
    assert not os.listdir(tmp_path / "refused")


MOE = {"mixtral": (MixtralConfig, MixtralForCausalLM), "phimoe": (PhimoeConfig, PhimoeForCausalLM)}


@pytest.mark.parametrize("shards", ["1GB", "4KB"])
@pytest.mark.parametrize("name", MOE)
def test_experts_stored_apart_are_edited_as_the_model_merges_them(tmp_path, name, shards):
    config_class, cls = MOE[name]
    config = config_class(
        vocab_size=31,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=11,
    )
    source, out = tmp_path / "source", tmp_path / "out"
    model = randomise(cls(config)).bfloat16()
    model.save_pretrained(source, max_shard_size=shards)
    experts, gain = "model.layers.0.mlp.experts", "model.layers.0.post_attention_layernorm.weight"
    summary, after = convert(
        source,
        cls,
        out,
        Centre(tensor=f"{experts}.down_proj", axis=1),
        FoldGain(tensor=f"{experts}.gate_up_proj", axis=2, weight=gain, form="w"),
    )
    before = stored(source)
    touched = {key for key, tensor in summary.tensors.items() if tensor.what == "edited"}
    assert len(touched) == 33 and all(".0.block_sparse_moe.experts." in key for key in touched)
    assert after.keys() == before.keys()
    assert all(same_bits(after[key], before[key]) for key in before.keys() - touched)

    live = model.model.layers[0].mlp.experts
    scale = model.state_dict()[gain].double()
    expected = {"down_proj": centred(live.down_proj.detach(), 1)}
    expected["gate_up_proj"] = (live.gate_up_proj.detach().double() * scale).bfloat16()
    loaded, info = cls.from_pretrained(with_config(source, out), dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for part, value in expected.items():
        assert same_bits(getattr(loaded.model.layers[0].mlp.experts, part).detach(), value)
        other = getattr(loaded.model.layers[1].mlp.experts, part)
        assert same_bits(other.detach(), getattr(model.model.layers[1].mlp.experts, part).detach())


def test_dtype_casts_real_tensors_only(tmp_path, gpt2):
    extra = {"count": torch.arange(5), "mask": torch.tensor([True, False, True]), "codes": torch.zeros(3).char()}
    tensors = stored(gpt2)
    save_file(tensors | extra, gpt2 / "model.safetensors", {"format": "pt"})
    edits = Centre(tensor=WTE, axis=1), Untie(tensor=HEAD, source=WTE)
    summary, after = convert(gpt2, GPT2LMHeadModel, tmp_path / "out", *edits, dtype=torch.bfloat16)
    assert all(same_bits(after[key], extra[key]) for key in extra)
    wide = tensors[WTE].double()
    assert same_bits(after.pop(WTE), (wide - wide.mean(1, keepdim=True)).bfloat16())
    assert same_bits(after.pop(HEAD), tensors[WTE].bfloat16())
    cast = after.keys() - extra.keys()
    assert len(cast) > 20 and all(same_bits(after[key], tensors[key].bfloat16()) for key in cast)
    assert all(summary.tensors[key].what == "cast" for key in cast)


def test_a_value_too_large_for_the_dtype_is_refused(tmp_path, gpt2):
    tensors = stored(gpt2)
    tensors["transformer.ln_f.bias"][3] = 1e5
    save_file(tensors, gpt2 / "model.safetensors", {"format": "pt"})
    with pytest.raises(PlanError, match=r"transformer\.ln_f\.bias: expected all values to fit torch\.float16.*1e\+05"):
        convert(gpt2, GPT2LMHeadModel, tmp_path / "out", dtype=torch.float16)


def test_tensors_stay_where_their_dtype_can_be_mapped(tmp_path, gpt2):
    """After an odd number of bytes, a float would lie across words: then the library's order is taken."""
    tensors = stored(gpt2)
    odd = {"codes": torch.zeros(3, dtype=torch.int8)}
    entries = [(k, v.dtype, tuple(v.shape)) for k, v in (tensors | odd).items()]
    data = b"".join(v.numpy().tobytes() for v in (tensors | odd).values())
    (gpt2 / "model.safetensors").write_bytes(render_header(entries, {"format": "pt"}) + data)
    out = tmp_path / "out"
    convert(gpt2, GPT2LMHeadModel, out, Untie(tensor=HEAD, source=WTE))
    with Checkpoint.open(with_config(gpt2, out)) as result:
        order = [tensor.key for tensor in result.shards[0].tensors]
        assert order == [*tensors, HEAD, "codes"]
        assert all(t.offset % t.dtype.itemsize == 0 for t in result.tensors.values())


REFUSED = {
    "nothing of this name": (Centre(tensor="transformer.h.9.nothing", axis=1), "h.9.nothing: centre expects"),
    "a bias nobody grows": (
        FoldBias(tensor="lm_head.bias", reader=WTE, axis=1, bias="transformer.ln_f.bias"),
        "lm_head.bias: fold_bias expects",
    ),
    "reads what is not there": (FoldGain(tensor=WTE, axis=1, weight="no.norm", form="w"), "no.norm, which"),
    "axis out of range": (Centre(tensor=WTE, axis=2), r"wte.weight of shape \(99, 32\): .* does not fit"),
    "groups do not divide": (Centre(tensor=WTE, axis=1, groups=5), "does not fit"),
    "gain of another width": (
        FoldGain(tensor=WTE, axis=0, weight="transformer.ln_f.weight", form="w"),
        "does not fit",
    ),
    "not tied": (Untie(tensor=WTE, source="transformer.wpe.weight"), "tied to lm_head.weight"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_plan_that_does_not_fit_is_refused_before_anything_is_written(tmp_path, gpt2, name):
    edit, message = REFUSED[name]
    first = Centre(tensor=PROJECTION, axis=1)
    with pytest.raises(PlanError, match=message):
        convert(gpt2, GPT2LMHeadModel, tmp_path / "out", first, edit)
    assert not os.listdir(tmp_path / "out")
    with pytest.raises(PlanError, match=message):
        preview(*opened(gpt2, GPT2LMHeadModel), plan_of(first, edit))


def test_quantised_values_are_not_edited(tmp_path, gpt2):
    tensors = stored(gpt2)
    tensors[PROJECTION] = tensors[PROJECTION].to(torch.float8_e4m3fn)
    save_file(tensors, gpt2 / "model.safetensors", {"format": "pt"})
    with pytest.raises(PlanError, match="c_proj.weight: expected one of float64.*float8_e4m3fn.*Dequantise"):
        convert(gpt2, GPT2LMHeadModel, tmp_path / "out", Centre(tensor=PROJECTION, axis=1))
    _, after = convert(gpt2, GPT2LMHeadModel, tmp_path / "cast", dtype=torch.bfloat16)
    assert same_bits(after[PROJECTION], tensors[PROJECTION])


def test_experts_cannot_be_removed_one_merged_tensor_at_a_time(tmp_path):
    config = MixtralConfig(
        vocab_size=31, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path / "source")
    drop = Drop(tensor="model.layers.0.mlp.experts.down_proj")
    with pytest.raises(PlanError, match="stored in parts .* found that they remove it"):
        preview(*opened(tmp_path / "source", MixtralForCausalLM), plan_of(drop))


def test_preview_is_what_is_written_and_reads_no_weights(tmp_path, gpt2, monkeypatch):
    edits = Centre(tensor=WTE, axis=1), Untie(tensor=HEAD, source=WTE), Drop(tensor="transformer.ln_f.bias")
    written, after = convert(gpt2, GPT2LMHeadModel, tmp_path / "out", *edits, dtype=torch.float16)
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("weights were read"))
    told = preview(*opened(gpt2, GPT2LMHeadModel), plan_of(*edits), torch.float16)
    assert told.tensors == written.tensors and told.untied == written.untied and told.hashes == {}
    assert told.bytes_after == sum(value.nbytes for value in after.values())
    assert told.bytes_before == sum(value.nbytes for value in stored(gpt2).values())
    kept = {key: tensor for key, tensor in told.tensors.items() if tensor.what != "removed"}
    assert {key: (t.dtype, t.shape) for key, t in kept.items()} == {k: (v.dtype, v.shape) for k, v in after.items()}


def test_progress_ends_at_the_total(tmp_path, gpt2):
    calls = []
    edits = Centre(tensor=WTE, axis=1), Untie(tensor=HEAD, source=WTE)
    summary, _ = convert(gpt2, GPT2LMHeadModel, tmp_path / "out", *edits, progress=lambda *c: calls.append(c))
    assert calls == sorted(calls) and len(calls) == len(summary.tensors)
    assert calls[-1] == (summary.bytes_after, summary.bytes_after)


def test_files_get_the_users_mode_and_never_replace_others(tmp_path, gpt2):
    out, old = tmp_path / "out", os.umask(0o027)
    try:
        convert(gpt2, GPT2LMHeadModel, out)
    finally:
        os.umask(old)
    assert (out / "model.safetensors").stat().st_mode & 0o777 == 0o640
    with pytest.raises(DestinationError, match="File exists"):
        write_tensors(*opened(gpt2, GPT2LMHeadModel), plan_of(), out)


def test_a_full_disk_is_named(tmp_path, gpt2, monkeypatch):
    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(DestinationError, match=r"model\.safetensors: cannot be written: No space left"):
        convert(gpt2, GPT2LMHeadModel, tmp_path / "out")


def test_a_file_that_does_not_read_back_is_refused(tmp_path, gpt2, monkeypatch):
    """As when the disk, or another process, changes the file between writing and reading."""
    header = render_header

    def renamed(entries, metadata):
        return header(entries, metadata).replace(b"wte", b"etw")

    monkeypatch.setattr("normswap.apply.shard.render_header", renamed)
    with pytest.raises(DestinationError, match="found nothing on reading back|expected nothing, found"):
        convert(gpt2, GPT2LMHeadModel, tmp_path / "out")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_crash_in_the_middle_leaves_no_destination(tmp_path, error):
    source, done = tmp_path / "source", []
    tiny("gpt2").save_pretrained(source, max_shard_size="10KB")
    before = {path.name: path.read_bytes() for path in source.iterdir()}

    def stop(count, total):
        done.append(count)
        if count > total / 2:
            raise error

    with pytest.raises(error), Staging(tmp_path / "out", source) as folder:
        write_tensors(*opened(source, GPT2LMHeadModel), plan_of(Centre(tensor=WTE, axis=1)), folder, progress=stop)
    assert len(done) > 5
    assert os.listdir(tmp_path) == ["source"]
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


def peak_above_now() -> int:
    """Bytes by which this process's resident memory has been larger than it is now, since `reset_peak`."""
    with open("/proc/self/status") as status:
        sizes = dict(line.split(":", 1) for line in status if line.startswith(("VmHWM", "VmRSS")))
    return (int(sizes["VmHWM"].split()[0]) - int(sizes["VmRSS"].split()[0])) * 1024


def reset_peak() -> int:
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's peak memory counter")
def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    """600 MB in one file, half of it edited, half copied: what is resident grows by a few tensors' worth."""
    source, out = tmp_path / "source", tmp_path / "out"
    layers = 48
    model = tiny("gpt2", n_embd=512, n_layer=1)
    model.config.n_layer = layers
    model.config.save_pretrained(source)
    block = {k: v for k, v in model.state_dict().items() if k.startswith("transformer.h.0.")}
    rest = {k: v for k, v in model.state_dict().items() if k not in block and k != HEAD}
    shapes = {k.replace(".0.", f".{i}.", 1): tuple(v.shape) for i in range(layers) for k, v in block.items()}
    shapes |= {k: tuple(v.shape) for k, v in rest.items()}
    header = render_header([(key, torch.float32, shape) for key, shape in shapes.items()], {"format": "pt"})
    total = 4 * sum(int(np.prod(shape)) for shape in shapes.values())
    with open(source / "model.safetensors", "wb") as file:
        file.write(header)
        file.truncate(len(header) + total)
    edits = [Centre(tensor=key, axis=1) for key in shapes if key.endswith(("c_fc.weight", "attn.c_attn.weight"))]
    out.mkdir()
    checkpoint, keymap = opened(source, GPT2LMHeadModel)
    before = reset_peak()
    summary = write_tensors(checkpoint, keymap, plan_of(*edits), out, workers=2)
    with open("/proc/self/statm") as statm:
        now = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    grown = now + peak_above_now() - before
    edited = sum(tensor.bytes_after for tensor in summary.tensors.values() if tensor.what == "edited")
    largest = max(tensor.bytes_after for tensor in summary.tensors.values() if tensor.what == "edited")
    assert total > 590e6 and edited > total / 2 and largest == 4 * 512 * 2048
    # Blocks of the source and buffers of the result, 134 MB of each: measured 234 MB here, 226 MB of a file of 400 MB,
    # 249 MB of one of 800 MB.
    assert grown < 290e6
