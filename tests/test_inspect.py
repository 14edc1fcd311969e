"""`inspect` reads configurations rightly: kinds, gain forms, roles, placements, streams, writers and readers."""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM

import normswap
from models import WIDTH, tiny, tiny_config
from normswap.cli import main
from normswap.observe.inputs import example_inputs
from sweep.audit import audit

# name -> (model type, flags, streams, sites by (kind, gain, bias, role), placement of every block of the first stream)
PRE, PARALLEL = ["pre"] * 4, ["pre, parallel"] * 2
MAPS = {
    "llama": ("llama", {}, ["model.layers"], {("rmsnorm", "w", False): dict(stream=4, final=1)}, PRE),
    "mistral": ("mistral", {}, ["model.layers"], {("rmsnorm", "w", False): dict(stream=4, final=1)}, PRE),
    "mixtral": ("mixtral", {}, ["model.layers"], {("rmsnorm", "w", False): dict(stream=4, final=1)}, PRE),
    "gemma2": (
        "gemma2",
        {},
        ["model.layers"],
        {("rmsnorm", "1 + w", False): dict(stream=4, branch=4, final=1)},
        ["sandwich"] * 4,
    ),
    "olmo2": (
        "olmo2",
        {},
        ["model.layers"],
        {("rmsnorm", "w", False): dict(branch=4, qk=4, final=1)},
        ["reordered"] * 4,
    ),
    "bert": (
        "bert",
        {},
        ["bert.encoder.layer"],
        {("layernorm", "w", True): dict(embedding=1, stream=4, head=1)},
        ["post"] * 4,
    ),
    "t5": (
        "t5",
        {},
        ["encoder.block", "decoder.block"],
        {("rmsnorm", "w", False): dict(stream=4 + 6, final=2)},
        PRE,
    ),
    "bart": (
        "bart",
        {},
        ["model.encoder.layers", "model.decoder.layers"],
        {("layernorm", "w", True): dict(embedding=2, stream=4 + 6)},
        ["post"] * 4,
    ),
    "vit": ("vit", {}, ["vit.layers"], {("layernorm", "w", True): dict(stream=4, final=1)}, PRE),
    "gpt2": ("gpt2", {}, ["transformer.h"], {("layernorm", "w", True): dict(stream=4, final=1)}, PRE),
    "gpt_neox": ("gpt_neox", {}, ["gpt_neox.layers"], {("layernorm", "w", True): dict(stream=4, final=1)}, PARALLEL),
    "gpt_neox sequential": (
        "gpt_neox",
        dict(use_parallel_residual=False),
        ["gpt_neox.layers"],
        {("layernorm", "w", True): dict(stream=4, final=1)},
        PRE,
    ),
    "opt": ("opt", {}, ["model.decoder.layers"], {("layernorm", "w", True): dict(stream=4, final=1)}, PRE),
    "opt post-norm": (
        "opt",
        dict(do_layer_norm_before=False),
        ["model.decoder.layers"],
        {("layernorm", "w", True): dict(stream=4)},
        ["post"] * 4,
    ),
    "olmo": ("olmo", {}, ["model.layers"], {("layernorm", None, False): dict(stream=4, final=1)}, PRE),
    "bloom": (
        "bloom",
        {},
        ["transformer.h"],
        {("layernorm", "w", True): dict(embedding=1, stream=4, final=1)},
        PRE,
    ),
    "falcon": ("falcon", {}, ["transformer.h"], {("layernorm", "w", True): dict(stream=2, final=1)}, PARALLEL),
    "falcon new": (
        "falcon",
        dict(new_decoder_architecture=True, num_kv_heads=2),
        ["transformer.h"],
        {("layernorm", "w", True): dict(stream=4, final=1)},
        PARALLEL,
    ),
    "cohere": (
        "cohere",
        {},
        ["model.layers"],
        {("layernorm", "w", False): dict(stream=2, final=1)},
        ["pre, parallel"] * 4,
    ),
    "stablelm": ("stablelm", {}, ["model.layers"], {("layernorm", "w", True): dict(stream=4, final=1)}, PRE),
    "stablelm parallel": (
        "stablelm",
        dict(use_parallel_residual=True),
        ["model.layers"],
        {("layernorm", "w", True): dict(stream=2, final=1)},
        ["pre, parallel"] * 4,
    ),
    "stablelm qk norm": (
        "stablelm",
        dict(qk_layernorm=True),
        ["model.layers"],
        {("layernorm", "w", True): dict(stream=4, final=1), ("layernorm", "w", False): dict(qk=12)},
        PRE,
    ),
    "nemotron": ("nemotron", {}, ["model.layers"], {("layernorm", "1 + w", True): dict(stream=4, final=1)}, PRE),
    "phimoe": ("phimoe", {}, ["model.layers"], {("layernorm", "w", True): dict(stream=4, final=1)}, PRE),
    "gptj": ("gptj", {}, ["transformer.h"], {("layernorm", "w", True): dict(stream=2, final=1)}, PARALLEL),
}


def save_config(folder, model_type, **flags):
    """A folder with a config.json and nothing else, as a Hub page shows it."""
    config = tiny_config(model_type, **flags)
    config.architectures = [type(tiny(model_type, **flags)).__name__]
    config.save_pretrained(folder)
    assert [path.name for path in folder.iterdir() if "generation" not in path.name] == ["config.json"]
    return folder


@pytest.mark.parametrize("name", MAPS)
def test_what_stands_where(name, tmp_path):
    model_type, flags, streams, sites, placements = MAPS[name]
    normmap = normswap.inspect(save_config(tmp_path, model_type, **flags))
    assert [stream.name for stream in normmap.streams] == streams
    assert all(stream.width == WIDTH for stream in normmap.streams)
    found = {}
    for site in normmap.sites.values():
        found.setdefault((site.spec.kind, site.spec.gain, site.spec.bias is not None), Counter())[site.role] += 1
        assert (site.stream is None) == (site.role in ("qk", "head")), site.path
    assert found == sites
    assert [block.placement for block in normmap.streams[0].blocks] == placements
    assert all(block.skip == block.branch == 1 for stream in normmap.streams for block in stream.blocks)


EPS = {"bert": ("layer_norm_eps", 1e-12), "llama": ("rms_norm_eps", 1e-5), "gpt2": ("layer_norm_epsilon", 2e-3)}


@pytest.mark.parametrize("name", EPS)
def test_eps_is_that_of_the_configuration(name):
    key, eps = EPS[name]
    assert {site.spec.eps for site in normswap.inspect(tiny(name, **{key: eps})).sites.values()} == {eps}


def readers(normmap, path):
    return {(reader.name, reader.axis) for reader in normmap.sites[path].readers}


def writers(stream):
    return {(writer.name, writer.axis) for writer in stream.writers}


def test_readers_and_writers_of_gpt2():
    """Conv1D weights lie the other way round; the head is the embedding."""
    normmap = normswap.inspect(tiny("gpt2"))
    h = "transformer.h.1"
    assert readers(normmap, f"{h}.ln_1") == {(f"{h}.attn.c_attn.weight", 0)}
    assert readers(normmap, "transformer.ln_f") == {("transformer.wte.weight", 1)}
    assert normmap.aliases == {"lm_head.weight": "transformer.wte.weight"}
    ends = [(f"transformer.h.{i}.{part}.c_proj.{p}", a) for i in (0, 1) for part in ("attn", "mlp") for p, a in PARTS]
    assert writers(normmap.streams[0]) == {("transformer.wte.weight", 1), ("transformer.wpe.weight", 1), *ends}


PARTS = (("weight", 1), ("bias", 0))


def test_readers_and_writers_of_experts():
    normmap = normswap.inspect(tiny("mixtral"))
    mlp = "model.layers.0.mlp"
    assert readers(normmap, "model.layers.0.post_attention_layernorm") == {
        (f"{mlp}.gate.weight", 1),
        (f"{mlp}.experts.gate_up_proj", 2),
    }
    assert (f"{mlp}.experts.down_proj", 1) in writers(normmap.streams[0])


def test_parallel_branches_read_one_norm():
    normmap = normswap.inspect(tiny("falcon"))
    layer = "transformer.h.0"
    assert readers(normmap, f"{layer}.input_layernorm") == {
        (f"{layer}.self_attention.query_key_value.weight", 1),
        (f"{layer}.mlp.dense_h_to_4h.weight", 1),
    }


def test_the_encoders_last_norm_is_read_by_the_decoder():
    normmap = normswap.inspect(tiny("t5"))
    expected = {(f"decoder.block.{i}.layer.1.EncDecAttention.{p}.weight", 1) for i in (0, 1) for p in "kv"}
    assert readers(normmap, "encoder.final_layer_norm") == expected
    assert normmap.sites["encoder.final_layer_norm"].stream == "encoder.block"


def test_post_norm_streams_are_read_raw_and_by_readers():
    normmap = normswap.inspect(tiny("bert"))
    site = normmap.sites["bert.encoder.layer.0.attention.output.LayerNorm"]
    assert [reader.name for reader in site.readers] == ["bert.encoder.layer.0.intermediate.dense.weight"]
    assert len(site.other_consumers) == 1 and "add in bert.encoder.layer.0.output" in site.other_consumers[0]


def test_slots_of_a_sandwich():
    block = normswap.inspect(tiny("gemma2")).streams[0].blocks[3]
    layer = "model.layers.1"
    assert (block.n_in, block.n_branch, block.n_out) == (
        [f"{layer}.pre_feedforward_layernorm"],
        [f"{layer}.post_feedforward_layernorm"],
        [],
    )


def test_a_headless_model_is_read_too(tmp_path):
    config = tiny_config("gpt2")
    with_head = normswap.inspect(tiny("gpt2"))
    model = AutoModel.from_config(config)
    normmap = normswap.inspect(model)
    assert [f"transformer.{path}" for path in normmap.sites] == list(with_head.sites)
    assert "it is an output of the model" in normmap.sites["ln_f"].other_consumers


# -- streams in unusual forms ------------------------------------------------------------------------------------------


HYPER = dict(
    vocab_size=99,
    hidden_size=48,
    moe_intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    head_dim=12,
    q_lora_rank=24,
    num_experts_per_tok=2,
    n_routed_experts=4,
    max_position_embeddings=64,
    layer_types=["heavily_compressed_attention", "compressed_sparse_attention"],
    mlp_layer_types=["hash_moe", "moe"],
    sliding_window=4,
    o_lora_rank=24,
    index_n_heads=4,
    index_head_dim=12,
    index_topk=8,
    qk_rope_head_dim=8,
)


def test_copies_of_a_stream_mixed_by_a_matrix_are_one_stream():
    """Hyper-connections keep several copies and mix them before each block."""
    config = CONFIG_MAPPING["deepseek_v4"](**HYPER)
    normmap = normswap.inspect(AutoModelForCausalLM.from_config(config))
    (stream,) = normmap.streams
    assert [block.placement for block in stream.blocks] == ["pre"] * 4 and stream.width == HYPER["hidden_size"]


def test_queries_are_told_from_values_and_experts():
    normmap = normswap.inspect(tiny("olmo2"))
    roles = {path.rpartition(".")[2]: site.role for path, site in normmap.sites.items()}
    assert roles["q_norm"] == roles["k_norm"] == "qk"


def test_a_norm_that_runs_twice_keeps_the_place_of_its_first_run():
    """One weightless norm stands after the embedding and at the end; the first block reads what it gave first."""
    config = CONFIG_MAPPING["nanochat"](
        hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, vocab_size=99
    )
    normmap = normswap.inspect(AutoModelForCausalLM.from_config(config))
    assert normmap.sites["model.norm"].role == "embedding"
    assert normmap.sites["model.layers.0.input_layernorm"].role == "stream"
    assert [block.placement for block in normmap.streams[0].blocks] == ["pre"] * 4


def test_what_resembles_a_norm_is_told():
    class Odd(nn.Module):
        def forward(self, x):
            return nn.functional.normalize(x, dim=-1)

    model = nn.Sequential(nn.Linear(5, 6), Odd(), nn.LayerNorm(6))
    normmap = normswap.inspect(model, inputs=dict(input=torch.randn(3, 5)))
    assert list(normmap.sites) == ["2"]
    assert [note for note in normmap.notes if note.startswith("1 resembles a norm")]


# -- an audit by names and attributes, which the package does not read -------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "olmo2", "nemotron", "t5", "vit", "cohere", "phimoe"])
def test_the_formula_of_every_site_is_the_module(name):
    model = tiny(name).double()
    inputs = example_inputs(model)
    inputs = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
    normmap = normswap.inspect(model, inputs=inputs)
    assert len(normmap.sites) >= 3
    assert audit(model, inputs, normmap) == []


WRONG = {
    "kind": ("rmsnorm", "off by"),
    "eps": (1e-3, "eps is 1e-05"),
    "weight": (None, "has weight and bias"),
    "axes": ((-2,), "normalises the last 1 axes"),
}


@pytest.mark.parametrize("field", WRONG)
def test_the_audit_sees_what_is_wrong(field):
    model, (value, words) = tiny("gpt2").double(), WRONG[field]
    inputs = example_inputs(model)
    normmap = normswap.inspect(model, inputs=inputs)
    site = normmap.sites["transformer.h.1.ln_2"]
    site.spec = site.spec.model_copy(update={field: value})
    found = audit(model, inputs, normmap)
    assert found and all(text.startswith("transformer.h.1.ln_2: ") for text in found)
    assert any(words in text for text in found)


def test_the_audit_misses_no_norm():
    model = tiny("gpt2").double()
    inputs = example_inputs(model)
    normmap = normswap.inspect(model, inputs=inputs)
    del normmap.sites["transformer.ln_f"]
    assert audit(model, inputs, normmap) == ["transformer.ln_f: a LayerNorm ran and is no site"]


# -- the command -------------------------------------------------------------------------------------------------------


def run(*arguments):
    result = CliRunner().invoke(main, list(map(str, arguments)), env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.output


def test_json_has_all_of_the_map(tmp_path):
    folder = save_config(tmp_path, "gemma2")
    normmap = normswap.inspect(folder)
    read = json.loads(run("inspect", folder, "--json"))
    assert read == json.loads(json.dumps(normmap.summary()))
    assert read["architecture"] == "Gemma2ForCausalLM" and read["tied"] == normmap.aliases
    (stream,) = read["streams"]
    assert len(stream["blocks"]) == 4 and stream["blocks"][0]["placement"] == "sandwich"
    assert len(stream["writers"]) == 5 and {"name", "axis", "kind", "module"} <= stream["writers"][0].keys()
    assert len(read["sites"]) == 9
    site = read["sites"][0]
    assert site["path"] == "model.layers.0.input_layernorm" and site["readers"][0]["axis"] == 1
    told = {key: site[key] for key in ("kind", "gain", "bias", "eps", "axes", "width", "role", "casting")}
    assert told == dict(
        kind="rmsnorm", gain="1 + w", bias=None, eps=1e-6, axes=[-1], width=WIDTH, role="stream", casting="float32"
    )


def test_repeated_layers_are_one_line(tmp_path):
    folder = save_config(tmp_path, "gpt_neox", num_hidden_layers=6)
    lines = run("inspect", folder).splitlines()
    norms = [line for line in lines if "input_layernorm" in line and "layernorm " in line]
    assert any(line.startswith(" gpt_neox.layers.0-5.input_layernorm") for line in norms)
    assert not any("layers.3." in line for line in lines) and len(lines) < 40
    assert any("layers.0-5" in line and "pre, parallel" in line for line in lines)
    assert any("11" not in line and "13 layernorm" in line for line in lines)


def test_a_config_file_itself_will_do(tmp_path):
    folder = save_config(tmp_path, "olmo2")
    assert "reordered" in run("inspect", folder / "config.json")


# -- size, and order ---------------------------------------------------------------------------------------------------

BIG = {
    "llama": dict(
        hidden_size=8192,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        intermediate_size=28672,
        vocab_size=128256,
    ),
    "gpt_neox": dict(
        hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, intermediate_size=32768, vocab_size=50432
    ),
}
MEASURE = """
import hashlib, json, resource, sys, time
import torch
torch.set_num_threads(1)
start = time.process_time()
import normswap
normmap = normswap.inspect(sys.argv[1])
seconds = time.process_time() - start
small = json.dumps(normswap.inspect(sys.argv[2]).summary())
print(json.dumps(dict(
    seconds=seconds,
    gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    sites=len(normmap.sites),
    blocks=len(normmap.streams[0].blocks),
    small=hashlib.sha256(small.encode()).hexdigest(),
)))
"""


def test_seventy_billion_parameters_and_the_same_answer_each_time(tmp_path):
    measured = {}
    small = save_config(tmp_path / "small", "gemma2")
    for seed, (name, sizes) in enumerate(BIG.items()):
        config = tiny_config(name, **sizes)
        config.architectures = [type(tiny(name)).__name__]
        config.save_pretrained(tmp_path / name)
        result = subprocess.run(
            [sys.executable, "-c", MEASURE, tmp_path / name, small],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": str(seed), "HF_HUB_OFFLINE": "1"},
        )
        assert result.returncode == 0, result.stderr
        measured[name] = json.loads(result.stdout.splitlines()[-1])
    for name, found in measured.items():
        # measured: 3.5 to 7 s of one core (imports included) and 0.59 GiB
        assert found["seconds"] < 20 and found["gib"] < 2, measured
        assert found["sites"] == 161 and found["blocks"] == (160 if name == "llama" else 80), measured
    assert measured["llama"]["small"] == measured["gpt_neox"]["small"]
