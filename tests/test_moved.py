"""Norms moved by plans written by hand: in a live model, in a folder, and in a process without normswap."""

import copy
import inspect
import json
import re
import subprocess
import sys
import traceback

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import fresh
from hand_plans import plan_of
from models import tiny
from moved import (
    bert_pre,
    bert_reference,
    convert,
    gpt2_reference,
    gpt2_sandwich,
    llama_post,
    llama_reference,
    norm,
    rewrite,
)
from normswap.apply.live import apply_plan
from normswap.apply.modelling import FILE, load_generated
from normswap.errors import PlanError
from normswap.norms.centred import centre_input
from normswap.observe.run import observe
from normswap.planning.edits import Change, SetScale
from normswap.planning.plans import Plan
from normswap.source.methods import Method
from normswap.verification.precision import LiftFloat32

CASES = {
    "llama": (llama_post, llama_reference),
    "gpt2": (gpt2_sandwich, gpt2_reference),
    "bert": (bert_pre, bert_reference),
}
IDS = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(0))


def logits(model, ids=IDS):
    with LiftFloat32() if next(model.parameters()).dtype == torch.float64 else torch.no_grad():
        return model(input_ids=ids, **({} if model.config.model_type == "bert" else {"use_cache": False})).logits


def relative(found, expected):
    return float(((found - expected).abs().max() / expected.std()).detach())


@pytest.mark.parametrize("name", CASES)
def test_a_live_model_computes_what_is_written_out_by_hand(name):
    make, reference = CASES[name]
    model = tiny(name).double()
    original = copy.deepcopy(model)
    apply_plan(model, Plan.model_validate_json(make(model).model_dump_json()))
    with LiftFloat32():
        expected = reference(original, IDS)
    found = logits(model)
    # measured: 1e-15 to 6e-15
    assert relative(found, expected) < 1e-12 and relative(logits(original), expected) > 0.1
    # the linear layers are the same in both, and so are their gradients
    mine, theirs = dict(model.named_modules()), dict(original.named_modules())
    paths = [path for path, module in mine.items() if isinstance(module, nn.Linear | Conv1D)]
    mine = torch.autograd.grad(found.square().sum(), [mine[path].weight for path in paths], allow_unused=True)
    other = torch.autograd.grad(expected.square().sum(), [theirs[path].weight for path in paths], allow_unused=True)
    checked = 0
    for a, b in zip(mine, other, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b.abs().max() > 0:
            # measured: up to 2e-14
            assert float((a - b).abs().max() / b.abs().max()) < 1e-10
            checked += 1
    assert checked >= 8


def test_classes_are_shared_and_show_their_source():
    model = tiny("llama", num_hidden_layers=3)
    stock = type(model.model.layers[0])
    apply_plan(model, llama_post(model))
    classes = [type(layer) for layer in model.model.layers]
    assert [cls.__name__ for cls in classes] == ["RewrittenLlamaDecoderLayer", *["RewrittenLlamaDecoderLayer2"] * 2]
    assert classes[1] is classes[2] and all(issubclass(cls, stock) for cls in classes)
    assert "self.input_layernorm(self.skip * residual + hidden_states)  # changed" in inspect.getsource(
        classes[1].forward
    )
    assert set(model._no_split_modules) == {stock.__name__, *(cls.__name__ for cls in classes)}
    again = copy.deepcopy(model)
    assert [type(layer) for layer in again.model.layers] == classes and torch.equal(logits(again), logits(model))
    # the source that a traceback shows, and what a second rewrite would start from
    del model.model.layers[1].skip
    with pytest.raises(AttributeError) as caught:
        logits(model)
    assert "self.skip * residual" in "".join(traceback.format_exception(caught.value))
    assert "self.skip * residual" in Method.of(classes[1], "forward").text


def test_a_moved_model_is_observed_like_any_other():
    model = tiny("llama")
    apply_plan(model, llama_post(model))
    trace = observe(model, dict(input_ids=IDS, use_cache=False))
    sums = [op for op in trace.operations if op.name == "add" and op.module == "model.layers.1"]
    method = Method.of(type(model.model.layers[1]), "forward")
    assert [method.source(method.locate(op.span)) for op in sums] == [
        "self.skip * residual + hidden_states",
        "self.skip_mlp * residual + hidden_states",
    ]


def test_a_module_that_is_centred_stays_so():
    model, plain = tiny("llama"), tiny("llama")
    plan = llama_post(model)
    apply_plan(plain, plan)
    for layer in (*model.model.layers, *plain.model.layers):
        centre_input(layer)
    apply_plan(model, plan)
    assert type(model.model.layers[1]).__name__ == "CentredInputRewrittenLlamaDecoderLayer2"
    assert torch.equal(logits(model), logits(plain))


def test_a_rewritten_model_goes_by_its_stock_name_and_can_be_rewritten_again():
    model = tiny("gpt2")
    stock = type(model.transformer)
    apply_plan(model, gpt2_sandwich(model))
    cls = type(model.transformer)
    assert cls is not stock and (cls.__name__, str(cls)) == (stock.__name__, str(stock))
    assert len(model(input_ids=IDS, output_hidden_states=True).hidden_states) == 3
    expected = logits(model)
    call = "self.entry_norm(inputs_embeds + position_embeds.to(inputs_embeds.device))"
    again = rewrite(model.transformer, "transformer", "forward", ("wrap", "nothing", call, 0))
    apply_plan(model, plan_of(model, [again, norm("transformer.nothing", "identity", gain=None)]))
    source = inspect.getsource(type(model.transformer).forward)
    assert re.search(r"self\.nothing\(.*\s*self\.entry_norm\(", source)
    assert torch.equal(logits(model), expected)


def test_added_norms_are_as_their_neighbours():
    model = tiny("gpt2").to(torch.bfloat16)
    apply_plan(model, gpt2_sandwich(model))
    added = model.transformer.h[1].ln_2_out
    assert added.weight.dtype == added.bias.dtype == torch.bfloat16 and not added.training
    assert (added.bias == 0).all()


def test_hidden_states_and_checkpointing_go_on_with_the_new_classes():
    model = tiny("llama")
    apply_plan(model, llama_post(model))
    seen = model(input_ids=IDS, output_hidden_states=True).hidden_states
    assert len(seen) == 3 and torch.allclose(seen[1].square().mean(-1).sqrt().mean(), torch.tensor(1.0), atol=0.9)
    expected = logits(model)
    model.train().gradient_checkpointing_enable()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert torch.equal(logits(model.eval()), expected)


def test_what_does_not_fit_is_refused_and_leaves_the_model_as_it_was():
    model = tiny("llama")
    before, classes = logits(model), [type(m) for m in model.modules()]
    good = llama_post(model)
    layer = "model.layers.1"
    other = rewrite(model.model.layers[1], layer, "forward")
    misfits = {
        "expected the source that the plan was made for": [other.model_copy(update={"digest": "0" * 64})],
        "two edits rewrite its method forward": [other],
        "has it already": [norm(f"{layer}.mlp", "rmsnorm")],
        "which the model does not have": [norm("model.layers.7.norm", "rmsnorm")],
        "has it already: its norms have moved": [SetScale(module=layer, name="mlp", value=1.0)],
        "expects an expression": [
            other.model_copy(update={"changes": (Change(kind="wrap", span=(0, 0, 0, 1), name="mlp"),)})
        ],
    }
    for message, edits in misfits.items():
        kept = [e for e in good.edits if message.startswith("two") or getattr(e, "module", "") != layer]
        with pytest.raises(PlanError, match=message):
            apply_plan(model, plan_of(model, [*kept, *edits]))
        assert torch.equal(logits(model), before) and [type(m) for m in model.modules()] == classes


# -- folders -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("moved")
    for name, (make, _) in CASES.items():
        model = tiny(name)
        model.save_pretrained(root / f"{name}-source", max_shard_size="20KB")
        convert(root / f"{name}-source", type(model), make(model), root / name)
    return root


@pytest.mark.parametrize("name", CASES)
def test_the_file_shows_the_stock_method_with_its_changes(folders, name, pytestconfig):
    path = folders / name / FILE
    settings = ["--config", str(pytestconfig.rootpath / "pyproject.toml"), "--no-cache"]
    for command in (["format", "--check", *settings], ["check", "--ignore-noqa", "--select=F,I", *settings]):
        done = subprocess.run([sys.executable, "-m", "ruff", *command, path], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    text = path.read_text()
    assert set(re.findall(r"^(?:import|from) (\w+)", text, re.M)) == {"re", "torch", "transformers"}
    live = tiny(name)
    apply_plan(live, CASES[name][0](live))
    made = {type(m) for m in live.modules() if type(m).__name__.startswith("Rewritten")}
    assert made
    for cls in made:  # the very text that the live model runs
        own = [f for f in vars(cls).values() if getattr(f, "__qualname__", "").startswith(cls.__name__)]
        assert own and all(inspect.getsource(f) in text for f in own)


@pytest.mark.parametrize("name", CASES)
def test_the_folder_holds_the_live_models_weights(folders, name):
    live = tiny(name)
    apply_plan(live, CASES[name][0](live))
    cls = load_generated(folders / name)
    model, report = cls.from_pretrained(
        folders / name, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    assert not any(report.values())
    mine, theirs = model.state_dict(), live.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert torch.equal(logits(model.eval()), logits(live))
    # a new tensor lies with those of its layer
    index = json.loads((folders / name / "model.safetensors.index.json").read_text())["weight_map"]
    source = json.loads((folders / f"{name}-source" / "model.safetensors.index.json").read_text())["weight_map"]
    added = index.keys() - source.keys()
    assert added and len(set(index.values())) > 1
    layers = {key: found.group() for key in added if (found := re.match(r".*?\.\d+\.", key))}
    assert len(layers) > 0
    for key, layer in layers.items():
        assert index[key] in {source[k] for k in source if k.startswith(layer)}


SCRIPT = """
import json, os, sys, tempfile
sys.modules["normswap"] = None
import torch
from accelerate import infer_auto_device_map
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

root, trust = sys.argv[1], dict(trust_remote_code=True)
torch.set_num_threads(1)
ids = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(0))
result = {}
for name in ("llama", "gpt2", "bert"):
    out, r = os.path.join(root, name), result.setdefault(name, {})
    auto = AutoModelForMaskedLM if name == "bert" else AutoModelForCausalLM
    model = auto.from_pretrained(out, attn_implementation="eager", **trust)
    with torch.no_grad():
        found = model(input_ids=ids, output_hidden_states=True)
    r["logits"], r["states"] = found.logits.tolist(), len(found.hidden_states or ())
    r["base"] = type(AutoModel.from_pretrained(out, **trust)).__name__
    if name != "bert":
        options = dict(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
        cached, plain = (model.generate(ids[:1], use_cache=use, **options) for use in (True, False))
        r["generates"] = bool(torch.equal(cached, plain)) and cached.shape[1] == 24
    again = tempfile.mkdtemp()
    model.save_pretrained(again)
    saved = auto.from_pretrained(again, attn_implementation="eager", **trust)
    with torch.no_grad():
        r["saved"] = bool(torch.equal(saved(input_ids=ids).logits, model(input_ids=ids).logits))
    r["whole"] = sorted(model._no_split_modules)
    r["classes"] = sorted({type(m).__name__ for m in model.modules() if type(m).__name__.startswith("Rewritten")})
    r["split"] = sorted(infer_auto_device_map(
        model, {0: 60_000, 1: 60_000, "cpu": 10**9}, no_split_module_classes=list(model._no_split_modules)))
    torch.manual_seed(0)
    fresh = auto.from_config(AutoConfig.from_pretrained(out, **trust), **trust).train()
    step = torch.optim.AdamW(fresh.parameters(), 3e-3)
    losses = []
    for _ in range(12):
        losses.append(fresh(input_ids=ids, labels=ids).loss)
        step.zero_grad()
        losses[-1].backward()
        step.step()
    r["losses"] = [losses[0].item(), losses[-1].item()]
print(json.dumps(result))
"""


def test_a_process_without_normswap_loads_runs_trains_and_saves(folders):
    found = json.loads(fresh.run(SCRIPT, folders))
    layers = {"llama": "LlamaDecoderLayer", "gpt2": "GPT2Block", "bert": "BertLayer"}
    for name, (_, reference) in CASES.items():
        original, r = tiny(name).double(), found[name]
        with torch.no_grad():
            expected = reference(original, IDS)
        # float32; measured: 3e-7 to 1e-6
        assert relative(torch.tensor(r["logits"], dtype=torch.float64), expected) < 2e-5
        assert r["states"] == 3 and r["saved"] and r.get("generates", True) and r["base"].startswith("Normswap")
        assert {layers[name], f"Rewritten{layers[name]}"} <= set(r["whole"]) and f"Rewritten{layers[name]}" in r[
            "classes"
        ]
        # no layer was cut in two
        assert not [path for path in r["split"] if re.search(r"\.\d+\.", path)]
        assert r["losses"][1] < 0.9 * r["losses"][0]
