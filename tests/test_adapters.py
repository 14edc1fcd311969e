"""LoRA adapters of a source, carried over: on the converted model they give what they gave on the source."""

import json
import re
import shutil
import sys

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import fresh
import normswap
from lora import adapter_of, apart, logits, opened, saved
from normswap.adapters.change import Change
from normswap.cli import main
from normswap.errors import DestinationError, RefusedError, SourceError, VerificationError
from normswap.planning.plans import Plan

ALL = {"target_modules": "all-linear"}
# model, conversion, adapter; worst measured: 2e-15
EXACT = {
    "Conv1D, and an embedding that is centred as it comes out": (
        "gpt2",
        dict(norm="rmsnorm"),
        dict(target_modules=["c_attn", "c_proj", "c_fc", "wte"]),
    ),
    "both ends of a tie that is given up, ranks and alphas by layer": (
        "gpt2",
        dict(norm="rmsnorm", tied="untie"),
        dict(
            target_modules=["c_proj", "wte", "lm_head"],
            use_rslora=True,
            rank_pattern={"mlp.c_proj": 5},
            alpha_pattern={"wte": 3},
        ),
    ),
    "a norm's bias that A and B owe a bias": (
        "gpt2",
        dict(fold=True, tied="untie"),
        dict(target_modules=["c_attn", "c_fc"]),
    ),
    "biases and norms that were trained, gains that stay behind": (
        "gpt2",
        dict(fold=True, tied="untie"),
        dict(target_modules=["c_attn"], bias="all", modules_to_save=["ln_f", "ln_1"]),
    ),
    "biases of B, and a head with none that gets one": (
        "gpt2",
        dict(norm="rmsnorm", fold=True, tied="untie"),
        dict(target_modules=["c_attn", "c_proj"], lora_bias=True, modules_to_save=["lm_head"]),
    ),
    "layers that grow a bias": ("stablelm", dict(fold=True), ALL),
    "layers that grow a bias, and are to store it": ("stablelm", dict(fold=True), dict(bias="lora_only", **ALL)),
    "gains 1 + w, trained": (
        "gemma2",
        dict(fold=True, tied="untie", partial=True),
        dict(target_modules="all-linear", modules_to_save=["input_layernorm", "pre_feedforward_layernorm"]),
    ),
    "rows of an embedding": (
        "llama",
        dict(rotate="random"),
        dict(target_modules="all-linear", trainable_token_indices=[3, 5]),
    ),
    "a rotated stream, its embedding and head trained whole": (
        "llama",
        dict(rotate="hadamard"),
        dict(target_modules=["q_proj", "down_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    ),
    "magnitudes": ("llama", dict(fold=True), dict(use_dora=True, **ALL)),
    "magnitudes of Conv1D, beside biases": (
        "gpt2",
        dict(fold=True, tied="untie"),
        dict(target_modules=["c_attn", "c_fc"], use_dora=True, bias="lora_only"),
    ),
    "experts, stacked in parameters": ("mixtral", dict(rotate="random"), ALL),
    "an encoder": ("bert", dict(fold=True, tied="untie", partial=True), ALL),
    "an encoder of images, its convolution": (
        "vit",
        dict(norm="rmsnorm"),
        dict(target_modules=["projection", "q_proj", "o_proj", "fc1", "fc2"], modules_to_save=["classifier"]),
    ),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Sources by model type, made when asked for."""
    root, made = tmp_path_factory.mktemp("sources"), {}

    def get(model_type: str):
        if model_type not in made:
            made[model_type] = saved(root / model_type, model_type)
        return made[model_type]

    return get


@pytest.mark.parametrize("name", EXACT)
def test_an_adapter_gives_the_same_outputs_on_the_converted_model(source, tmp_path, name):
    model_type, words, settings = EXACT[name]
    adapter = adapter_of(source(model_type), tmp_path / "mine", **settings)
    done = normswap.convert(source(model_type), tmp_path / "out", adapters=[adapter], verify="none", **words)
    assert done.plan.claim == "exact" and [one["name"] for one in done.adapters] == ["mine"]
    wanted = logits(opened(source(model_type), adapter))
    converted = opened(done.folder, done.folder / "adapters" / "mine")
    assert apart(wanted, logits(converted)) < 1e-10  # at most 2e-15
    # it does something, and as it was it would do something else here
    assert apart(logits(opened(source(model_type))), wanted) > 0.05
    if done.adapters[0]["changed"] and "untie" not in words.values():
        with_old = opened(done.folder, adapter)
        assert apart(wanted, logits(with_old)) > 1e-3


def test_space_is_checked_for_the_weights_and_the_adapters(source, tmp_path, monkeypatch):
    adapter = adapter_of(source("llama"), tmp_path / "mine", **ALL)
    usage, found = shutil.disk_usage(tmp_path), []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
    for given in ([], [adapter], [adapter_of(source("llama"), tmp_path / "other", **ALL), adapter]):
        with pytest.raises(DestinationError, match="are free") as refused:
            normswap.convert(source("llama"), tmp_path / "out", adapters=given, verify="none", fold=True)
        found.append(int(re.search(r"\((\d+) bytes\), 0\.00 GiB", str(refused.value)).group(1)))
    size = sum(tensor.nbytes for tensor in load_file(adapter / "adapter_model.safetensors").values())
    assert [more - found[0] for more in found] == [0, size, 2 * size] and size > 1000


def test_only_what_the_plan_meets_is_changed(source, tmp_path):
    adapter = adapter_of(source("llama"), tmp_path / "mine", **ALL)
    done = normswap.convert(source("llama"), tmp_path / "out", adapters=[adapter], verify="none", fold=True)
    before, after = (load_file(p / "adapter_model.safetensors") for p in (adapter, done.folder / "adapters/mine"))
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    # gains go into what reads a norm, along its input
    assert changed == {k for k in before if "lora_A" in k and not ("o_proj" in k or "down_proj" in k)}
    assert changed == set(done.adapters[0]["changed"]) and len(changed) == 10
    again = normswap.convert(source("llama"), tmp_path / "again", adapters=[adapter], verify="none", fold=True)
    assert again.adapters == done.adapters  # hashes of the files are in it
    config = json.loads((done.folder / "adapters/mine/adapter_config.json").read_text())
    assert config == json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}


def test_calibrated_conversions_carry_what_is_linear_and_say_what_it_costs(source, tmp_path):
    adapter = adapter_of(source("llama"), tmp_path / "mine", **ALL)
    done = normswap.convert(source("llama"), tmp_path / "out", adapters=[adapter], verify="fast", norm="layernorm")
    measured = done.adapters[0]["measured"]
    assert done.plan.claim == "calibrated" and 1e-6 < measured["error"] < 1 and measured["rows"] > 100
    assert json.loads((done.folder / "normswap.json").read_text())["adapters"] == list(done.adapters)


@pytest.fixture(scope="module")
def published(source, tmp_path_factory):
    """The GPT-2 converted on the command line with two adapters, and what was printed."""
    root = tmp_path_factory.mktemp("published")
    first = adapter_of(source("gpt2"), root / "first", target_modules=["c_attn", "wte"])
    second = adapter_of(source("gpt2"), root / "second", target_modules=["c_proj"], bias="lora_only")
    words = ["convert", source("gpt2"), root / "out", "--norm", "rmsnorm", "--adapter", first, "--adapter", second]
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return root, done


def test_what_was_measured_is_printed_and_kept(published):
    root, done = published
    assert "adapter first: 1 of 6 tensors changed; worst error" in done.stderr
    record = json.loads((root / "out/normswap.json").read_text())
    assert [one["name"] for one in record["adapters"]] == ["first", "second"]
    for one in record["adapters"]:
        assert one["measured"]["error"] < 1e-12 and one["measured"]["stored"] < 1e-12  # 1e-15
        assert one["measured"]["effect"] > 0.05
        assert set(one["files"]) == {"adapter_config.json", "adapter_model.safetensors"}
    card = (root / "out/README.md").read_text()
    assert 'PeftModel.from_pretrained(model, folder, subfolder="adapters/first")' in card
    assert "--adapter first --adapter second" in card and str(root) not in card


def test_stock_transformers_and_peft_load_it(published, source):
    root, _ = published
    script = """
import sys, torch
from transformers import AutoModelForCausalLM
from peft import PeftModel
folder, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto", attn_implementation="eager")
model = PeftModel.from_pretrained(model, folder, subfolder="adapters/first", autocast_adapter_dtype=False).eval()
ids = torch.arange(60)[None] % 99
torch.save(model(input_ids=ids).logits.detach(), out)
"""
    fresh.run(script, root / "out", root / "logits.pt")
    with torch.no_grad():
        wanted = opened(source("gpt2"), root / "first")(input_ids=torch.arange(60)[None] % 99).logits
    assert apart(wanted, torch.load(root / "logits.pt")) < 1e-10  # 1e-15


def test_undoing_leaves_adapters_behind_and_says_so(published):
    root, _ = published
    words = ["convert", root / "out", root / "back", "--undo", "--verify", "none"]
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    assert "adapters/first was left behind: it is of the converted model." in done.stderr
    assert not (root / "back/adapters").exists()
    again = logits(opened(root / "back", root / "first"))
    assert apart(again, logits(opened(root / "out", root / "out/adapters/first"))) < 1e-6  # the mean comes from float32


def test_an_adapter_that_does_something_else_is_not_published(source, tmp_path, monkeypatch):
    adapter = adapter_of(source("gpt2"), tmp_path / "mine", target_modules=["c_proj"])
    monkeypatch.setattr(Change, "factors", lambda self, found: (2 * self.before[found.a], self.before[found.b]))
    with pytest.raises(VerificationError, match="the adapter mine does something else on the converted model"):
        normswap.convert(source("gpt2"), tmp_path / "out", adapters=[adapter], verify="fast", norm="rmsnorm")
    assert not (tmp_path / "out").exists()


REFUSED = {
    "magnitudes of outputs that are mixed": (
        "gpt2",
        dict(norm="rmsnorm"),
        dict(target_modules=["c_proj"], use_dora=True),
        r"c_proj.lora_magnitude_vector: centre of .* mixes what makes its outputs",
    ),
    "a bias owed beside magnitudes": (
        "gpt2",
        dict(fold=True, tied="untie"),
        dict(target_modules=["c_attn"], use_dora=True),
        r"PEFT has none beside magnitudes",
    ),
    "a bias owed beside an embedding": (
        "gpt2",
        dict(fold=True, tied="untie"),
        dict(target_modules=["c_attn", "wte"]),
        r"c_attn.lora_B.weight has to have a bias, .* PEFT has none in an adapter that changes an embedding",
    ),
    "a norm that loses its weights": (
        "gpt2",
        dict(norm="rmsnorm", fold=True, tied="untie"),
        dict(target_modules=["c_attn"], modules_to_save=["ln_1"]),
        r"trained transformer.h.0.ln_1.bias, and the converted model has no such tensor",
    ),
    "rows that PEFT looks up past the centring": (
        "gpt2",
        dict(norm="rmsnorm"),
        dict(target_modules=["c_attn"], trainable_token_indices={"wte": [1, 2]}),
        r"wte.token_adapter.trainable_tokens_delta: the plan changes what transformer.wte computes",
    ),
    "rows of a tie that is given up": (
        "gpt2",
        dict(norm="rmsnorm", tied="untie"),
        dict(target_modules=["c_attn"], trainable_token_indices={"wte": [1, 2]}),
        r"rows of its own, which the adapter trained in one",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_carried_is_refused_by_name(source, tmp_path, name):
    model_type, words, settings, said = REFUSED[name]
    adapter = adapter_of(source(model_type), tmp_path / "mine", **settings)
    with pytest.raises(RefusedError, match=said) as refused:
        normswap.convert(source(model_type), tmp_path / "out", adapters=[adapter], verify="none", **words)
    assert "merge_and_unload" in str(refused.value) and not (tmp_path / "out").exists()


def test_weights_that_were_fitted_take_no_adapter(source, tmp_path):
    adapter = adapter_of(source("llama"), tmp_path / "mine", target_modules=["down_proj"])
    name = "model.layers.1.mlp.down_proj.weight"
    plan: Plan = normswap.plan(source("llama"), fold=True)
    plan = plan.with_fitted({name: torch.ones(32, 48)})
    with pytest.raises(RefusedError, match=r"layers.1.mlp.down_proj.lora_A: .* was fitted on data"):
        normswap.convert(source("llama"), tmp_path / "out", adapters=[adapter], verify="none", plan=plan)


@pytest.fixture
def damaged(source, tmp_path):
    """`damaged(change)`: an error's text for an adapter whose settings and tensors `change` got hold of."""
    adapter = adapter_of(source("llama"), tmp_path / "mine", target_modules=["q_proj"])

    def said(change) -> str:
        config, tensors = (adapter / "adapter_config.json"), adapter / "adapter_model.safetensors"
        settings, held = json.loads(config.read_text()), load_file(tensors)
        change(settings, held)
        config.write_text(json.dumps(settings))
        save_file(held, tensors)
        words = ["convert", source("llama"), tmp_path / "out", "--fold", "--adapter", adapter]
        done = CliRunner().invoke(main, [str(word) for word in words])
        assert done.exit_code == 2 and "Traceback" not in done.output and not (tmp_path / "out").exists()
        return done.stderr

    return said


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c, t: c.update(peft_type="IA3"), "found 'IA3', which is not carried"),
        (lambda c, t: c.update(r="many"), "r is 'many'"),
        (lambda c, t: c.update(lora_alpha=None), "lora_alpha is None"),
        (lambda c, t: c.update(target_modules={"a": 1}), "target_modules is {'a': 1}"),
        (lambda c, t: c.update(init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
        (lambda c, t: c.update(layer_replication=[[0, 1]]), "layer_replication is [[0, 1]], which is not known"),
        (lambda c, t: c.update(not_yet_invented=True), "not_yet_invented is True, which is not known"),
        (lambda c, t: c.update(target_modules=["none_such"]), "cannot be put on a LlamaForCausalLM"),
        (lambda c, t: c.update(target_modules="("), "cannot be put on a LlamaForCausalLM"),
        (lambda c, t: c.update(task_type=["x"], r=10**9), "cannot be put on a LlamaForCausalLM"),
        (lambda c, t: c.update(r=10**9), "is not of this base"),
        (
            lambda c, t: (
                c.update(trainable_token_indices=[98, 99]),
                t.update(
                    {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 32)}
                ),
            ),
            "is of row 99, and model.embed_tokens.weight has 99 rows",
        ),
        (lambda c, t: t.pop(KEY), f"lacks {KEY}"),
        (lambda c, t: t.update({KEY: torch.ones(3, 31)}), f"is not of this base: {KEY} has shape (3, 31)"),
        (lambda c, t: t.update(other=torch.ones(2)), "other has shape (2,), expected no such tensor"),
        (lambda c, t: t.update({KEY: t[KEY] * float("nan")}), "expected names of real, finite tensors"),
        (lambda c, t: t.update({KEY: t[KEY].long()}), "expected names of real, finite tensors"),
    ],
)
def test_a_damaged_adapter_is_refused(damaged, change, said):
    assert said in " ".join(damaged(change).split())


def test_nothing_is_unpickled_but_tensors(source, tmp_path):
    adapter = adapter_of(source("llama"), tmp_path / "mine", target_modules=["q_proj"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({**tensors, "more": CliRunner}, adapter / "adapter_model.bin")
    with pytest.raises(SourceError, match=r"adapter_model.bin cannot be read"):
        normswap.convert(source("llama"), tmp_path / "out", adapters=[adapter], fold=True)
    torch.save(tensors, adapter / "adapter_model.bin")
    done = normswap.convert(source("llama"), tmp_path / "out", adapters=[adapter], verify="none", fold=True)
    assert (done.folder / "adapters/mine/adapter_model.safetensors").exists()


def test_two_of_one_name_and_none_at_all(source, tmp_path, monkeypatch):
    adapter = adapter_of(source("llama"), tmp_path / "mine", target_modules=["q_proj"])
    shutil.copytree(adapter, tmp_path / "other/mine")
    both = [adapter, tmp_path / "other/mine"]
    with pytest.raises(SourceError, match="two adapters are in folders called mine"):
        normswap.convert(source("llama"), tmp_path / "out", adapters=both, fold=True)
    with pytest.raises(SourceError, match="is no adapter: expected a folder with adapter_config.json"):
        normswap.convert(source("llama"), tmp_path / "out", adapters=[source("llama")], fold=True)
    with pytest.raises(SourceError, match="the adapter org/none-such is no local folder and could not be had"):
        normswap.convert(source("llama"), tmp_path / "out", adapters=["org/none-such"], fold=True)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SourceError, match=r"PEFT, which is not installed: pip install 'normswap\[lora\]'"):
        normswap.convert(source("llama"), tmp_path / "out", adapters=[adapter], fold=True)
