import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, NemotronConfig, NemotronForCausalLM

import fresh
import normswap
from hand_plans import folded_gpt2_plan, logits, plan_of, publish, rms_edits, rms_plan, small, swap, token_ids
from models import tiny
from normswap.apply.folding import expand, fold
from normswap.apply.modelling import load_generated, write_modelling
from normswap.errors import PlanError, SourceError
from normswap.norms.kinds.rms_norm import RMSNorm
from normswap.planning.edits import CentreInput, CentreOutput, GrowBias, SetConfig

FILE = "modeling_normswap.py"
# folder -> (trained checkpoint or model type, how the plan is made)
FOLDERS = {
    "untied": ("gpt2-shakespeare", lambda model: rms_plan(model, "untie")),
    "tied": ("gpt2-shakespeare", lambda model: rms_plan(model, "centre output")),
    "neox": ("gpt_neox-shakespeare", rms_plan),
    "weightless": ("gpt2", folded_gpt2_plan),
    "experts": ("phimoe", rms_plan),
}


@pytest.fixture(scope="module")
def published(tmp_path_factory, checkpoints) -> Path:
    """A folder of converted folders; beside each, as `<name>-source`, what it was made from."""
    root = tmp_path_factory.mktemp("published")
    for name, (source, make_plan) in FOLDERS.items():
        trained = (checkpoints / source).is_dir()
        model = AutoModelForCausalLM.from_pretrained(checkpoints / source) if trained else small(source).float()
        model.save_pretrained(root / f"{name}-source")
        publish(model, make_plan(model), root / name, base_output_unchanged=name != "weightless")
        for file in (checkpoints / source).glob("tokenizer*") if trained else ():
            (root / name / file.name).write_bytes(file.read_bytes())
            (root / f"{name}-source" / file.name).write_bytes(file.read_bytes())
    return root


def text_of(folder: Path) -> str:
    return (folder / FILE).read_text()


# ---- the text


@pytest.mark.parametrize("name", FOLDERS)
def test_the_file_is_formatted_and_stands_alone(published, name, pytestconfig):
    path = published / name / FILE
    settings = ["--config", str(pytestconfig.rootpath / "pyproject.toml"), "--no-cache"]
    for command in (["format", "--check", *settings], ["check", *settings]):
        done = subprocess.run([sys.executable, "-m", "ruff", *command, path], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    imports = re.findall(r"^(?:import|from) (\w+)", text_of(published / name), re.M)
    assert set(imports) == {"re", "torch", "transformers"}


def test_the_table_is_literal_and_folded_over_layers(published):
    text = text_of(published / "untied")
    assert text.startswith('"""GPT2LMHeadModel with other norms, written by normswap.\n')
    assert "Claim: exact." in text and "- every writer of the stream is centred" in text
    assert text.count("dict(kind") == 3
    assert (
        '    "h.*.ln_1": dict(kind="rmsnorm", width=160, eps=1e-05, gain="w", bias=True, casting="float32"),\n' in text
    )


def test_only_what_is_needed_is_written(published):
    parts = {
        "class RMSNorm": {"untied", "tied", "neox", "weightless", "experts"},
        "class Centred": {"tied"},
        "def grow_biases": {"weightless"},
        'HEAD_BIASES = {\n    "lm_head": 99,\n}': {"weightless"},
        'OUTPUTS = {\n    "wte": -1,\n}': {"tied"},
        '    "normswap_phimoe": "phimoe",\n': {"experts"},
        '    "NormswapGPTNeoXForCausalLM": "GPTNeoXForCausalLM",\n': {"neox"},
    }
    for part, names in parts.items():
        assert {name for name in FOLDERS if part in text_of(published / name)} == names, part


def test_layers_that_differ_are_listed_one_by_one(tmp_path):
    model = small("gpt2")
    edits = [edit for edit in rms_edits(model, "untie") if getattr(edit, "module", "") != "transformer.h.1.ln_2"]
    edits = [e.model_copy(update={"eps": 1e-3}) if getattr(e, "module", "").endswith("1.ln_1") else e for e in edits]
    publish(model, plan_of(model, edits), tmp_path / "out")
    table = re.findall(r'^    "(.*)": dict\(kind="rmsnorm", width=32, eps=(.*?),', text_of(tmp_path / "out"), re.M)
    assert table == [("h.0.ln_1", "1e-05"), ("h.0.ln_2", "1e-05"), ("h.1.ln_1", "0.001"), ("ln_f", "1e-05")]


def test_folding_names_the_given_paths_and_no_others():
    paths = [f"s.{i}.b.{j}.{n}" for i in range(3) for j in range(2) for n in ("norm", "fc")] + ["norm", "s.0.norm"]
    values = {p: f"width {p[2]}" if p.count(".") == 4 else "last" for p in paths if p.endswith("norm")}
    del values["s.2.b.1.norm"], values["s.0.norm"]
    folded = fold(values, paths)
    assert folded == {
        "s.0.b.*.norm": "width 0",
        "s.1.b.*.norm": "width 1",
        "s.2.b.0.norm": "width 2",
        "norm": "last",
    }
    assert {path: value for pattern, value in folded.items() for path in expand(pattern, paths)} == values


def test_lines_too_long_are_broken_as_ruff_does(tmp_path):
    model = small("gpt2")
    path = "transformer.h.0.a_name_so_long_that_a_table_entry_for_it_does_not_fit_on_one_line"
    model.get_submodule("transformer.h.0").add_module(path.rpartition(".")[2], nn.LayerNorm(32))
    plan = plan_of(model, [swap(path, nn.LayerNorm(32), 32)], reasons=("long " * 50, 'a "quote", a \\d and """'))
    write_modelling(tmp_path, type(model), model.config, plan, model)
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "format", "--check", "--no-cache", "--line-length=120", tmp_path / FILE],
        capture_output=True,
    )
    assert done.returncode == 0
    assert 'line": dict(\n        kind="rmsnorm", width=32' in text_of(tmp_path)
    assert max(map(len, text_of(tmp_path).splitlines())) <= 120


# ---- the classes


def test_a_head_tied_to_an_edited_embedding_is_not_offered(tmp_path):
    """A base model's plan centres the embedding itself; a head that stock transformers ties to it would read that."""
    model = small("gpt2").float().base_model
    plan = normswap.plan(model, norm="rmsnorm")
    assert "wte.weight" in plan.tensor_edits()
    autos = write_modelling(tmp_path, type(model), model.config, plan, model, base_output_unchanged=True)["auto_map"]
    assert "AutoModelForSequenceClassification" in autos
    assert not {"AutoModelForCausalLM", "AutoModelForPreTraining"} & autos.keys()


def test_every_task_class_is_offered_where_the_base_model_computes_the_same(published):
    config = json.loads((published / "tied" / "config.json").read_text())
    assert config["model_type"] == "normswap_gpt2"
    assert config["architectures"] == ["NormswapGPT2LMHeadModel"]
    assert config["auto_map"] == {
        "AutoConfig": "modeling_normswap.NormswapGPT2Config",
        "AutoModel": "modeling_normswap.NormswapGPT2Model",
        "AutoModelForPreTraining": "modeling_normswap.NormswapGPT2LMHeadModel",
        "AutoModelForCausalLM": "modeling_normswap.NormswapGPT2LMHeadModel",
        "AutoModelForSequenceClassification": "modeling_normswap.NormswapGPT2ForSequenceClassification",
        "AutoModelForQuestionAnswering": "modeling_normswap.NormswapGPT2ForQuestionAnswering",
        "AutoModelForTokenClassification": "modeling_normswap.NormswapGPT2ForTokenClassification",
    }
    assert config["tokenizer_class"] == "GPT2Tokenizer"
    assert config["tie_word_embeddings"] is True
    assert json.loads((published / "untied" / "config.json").read_text())["tie_word_embeddings"] is False

    folded = json.loads((published / "weightless" / "config.json").read_text())
    assert set(folded["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForPreTraining", "AutoModelForCausalLM"}


@pytest.mark.parametrize("name", FOLDERS)
def test_load_generated_opens_what_was_published(published, name):
    cls = load_generated(published / name)
    eager = dict(attn_implementation="eager", experts_implementation="eager" if name == "experts" else None)
    model, report = cls.from_pretrained(published / name, output_loading_info=True, **eager)
    assert not any(report.values())
    source = AutoModelForCausalLM.from_pretrained(published / f"{name}-source", **eager)
    ids = token_ids()
    expected = logits(source, ids)
    # float32; measured: 1.4e-6 to 6.4e-6
    assert (logits(model, ids) - expected).abs().max() / expected.std() < 5e-5
    assert sum(isinstance(m, nn.LayerNorm) for m in source.modules()) == sum(
        type(m).__name__ == "RMSNorm" for m in model.modules()
    )
    assert not (published / name / "__pycache__").exists()


def test_two_folders_are_two_modules(published):
    one, two = load_generated(published / "tied"), load_generated(published / "untied")
    assert one.__name__ == two.__name__ and one.__module__ != two.__module__
    assert one is load_generated(published / "tied")


def test_load_generated_says_what_is_wrong(published, tmp_path):
    with pytest.raises(SourceError, match=FILE):
        load_generated(tmp_path)
    (tmp_path / FILE).write_text(text_of(published / "tied"))
    (tmp_path / "config.json").write_text('{"architectures": ["GPT3"]}')
    with pytest.raises(SourceError, match="does not define GPT3"):
        load_generated(tmp_path)
    (tmp_path / FILE).write_text("import re\nraise ZeroDivisionError\n")
    before = set(sys.modules)
    with pytest.raises(ZeroDivisionError):
        load_generated(tmp_path)
    assert set(sys.modules) == before


def test_a_file_for_another_version_of_the_class_does_not_load(published, tmp_path):
    (tmp_path / FILE).write_text(text_of(published / "tied").replace('"ln_f"', '"final_norm"'))
    (tmp_path / "config.json").write_text((published / "tied" / "config.json").read_text())
    cls = load_generated(tmp_path)
    config = cls.config_class.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="GPT2Model has no module final_norm: this file is for another version"):
        cls(config)


def test_norms_outside_the_base_model_have_a_table_of_their_own(tmp_path):
    torch.manual_seed(0)
    model = BertForMaskedLM(
        BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    )
    head, inner = "cls.predictions.transform.LayerNorm", "bert.encoder.layer.1.output.LayerNorm"
    plan = plan_of(model, [swap(path, model.get_submodule(path), 8) for path in (head, inner)])
    model = publish(model, plan, tmp_path / "out")
    text = text_of(tmp_path / "out")
    assert re.findall(r'^(\w*NORMS) = {\n    "(.*?)"', text, re.M) == [
        ("NORMS", "encoder.layer.1.output.LayerNorm"),
        ("HEAD_NORMS", head),
    ]
    cls = load_generated(tmp_path / "out")
    again = cls.from_pretrained(tmp_path / "out").eval()
    assert type(again.get_submodule(head)).__name__ == type(again.get_submodule(inner)).__name__ == "RMSNorm"
    ids = torch.randint(0, 20, (1, 5))
    assert torch.equal(logits_of(again, ids), logits_of(model.eval(), ids))
    # the base model of a class without that head has its own norms only
    other = sys.modules[cls.__module__].NormswapBertForSequenceClassification(again.config)
    assert [p for p, m in other.named_modules() if type(m).__name__ == "RMSNorm"] == [inner]


def test_a_task_class_that_builds_its_base_by_auto_model_is_converted_once(tmp_path):
    model = small("phi").float()
    plan = plan_of(model, [*rms_edits(model), CentreOutput(module="model.embed_tokens")])
    model = publish(model, plan, tmp_path / "out")
    cls = load_generated(tmp_path / "out")
    config = cls.config_class.from_pretrained(tmp_path / "out")
    classifier = sys.modules[cls.__module__].NormswapPhiForSequenceClassification.from_pretrained(
        tmp_path / "out", config=config
    )
    assert type(classifier.model).__name__ == "NormswapPhiModel"
    assert type(classifier.model.embed_tokens).__name__ == "CentredOutputEmbedding"
    assert type(classifier.model.embed_tokens).__mro__[2] is nn.Embedding
    with torch.no_grad():
        found, expected = (m.model(token_ids()).last_hidden_state for m in (classifier.eval(), model))
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def logits_of(model, ids):
    return model(input_ids=ids).logits


def test_a_fresh_model_has_neutral_gains(tmp_path):
    sizes = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
    )
    model = NemotronForCausalLM(NemotronConfig(vocab_size=20, head_dim=8, **sizes))
    norms = [path for path, module in model.named_modules() if "LayerNorm" in type(module).__name__]
    plan = plan_of(model, [swap(path, model.get_submodule(path), 16, gain="1 + w") for path in norms])
    publish(model, plan, tmp_path / "out")
    cls = load_generated(tmp_path / "out")
    fresh = cls._from_config(cls.config_class.from_pretrained(tmp_path / "out"))
    found = [fresh.get_submodule(path) for path in norms]
    assert len(found) == 3
    x = torch.tensor([[3.0, -3.0] * 8])
    for norm in found:
        assert (norm.weight == 0).all() and (norm.bias == 0).all()
        torch.testing.assert_close(norm(x), x / 3)


def test_what_needs_no_file_or_cannot_have_one_is_refused(tmp_path):
    model = small("gpt2")
    with pytest.raises(PlanError, match="changes no module"):
        write_modelling(tmp_path, type(model), model.config, plan_of(model, [SetConfig(key="n_inner", value=1)]), model)
    plan = rms_plan(model, "untie")
    remote = type("GPT2LMHeadModel", (type(model),), {"__module__": "transformers_modules.some.modeling"})
    with pytest.raises(PlanError, match="comes with its checkpoint"):
        write_modelling(tmp_path, remote, model.config, plan, model)
    with pytest.raises(PlanError, match="lm_tail"):
        write_modelling(
            tmp_path, type(model), model.config, plan_of(model, [GrowBias(module="lm_tail", size=1)]), model
        )
    assert not list(tmp_path.iterdir())
    assert model.config.tie_word_embeddings and not any(isinstance(m, RMSNorm) for m in model.modules())


# ---- a fresh process, without normswap

SCRIPT = '''
import json, os, sys, tempfile
sys.modules["normswap"] = None
import torch
from transformers import (
    AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline
)

root, trust = sys.argv[1], dict(trust_remote_code=True)
torch.set_num_threads(1)


def silent(load, *args, **kwargs):
    """What a load without trust gives: the message of its error, or the class that it gave."""
    try:
        return f"loaded {type(load(*args, **kwargs)).__name__}"
    except ValueError as error:
        return str(error)


def kinds(model):
    found = [type(m).__name__ for m in model.modules()]
    return {name: found.count(name) for name in ("LayerNorm", "RMSNorm", "CentredOutputEmbedding") if name in found}


def same_tokens(model, source, **ids):
    options = dict(max_new_tokens=40, do_sample=False, use_cache=True, pad_token_id=0, eos_token_id=None)
    mine, theirs = model.generate(**ids, **options), source.generate(**ids, **options)
    return bool(torch.equal(mine, theirs)) and mine.shape[1] == ids["input_ids"].shape[1] + 40


result = {}
for name in ("untied", "tied", "neox", "weightless", "experts"):
    out, source = os.path.join(root, name), os.path.join(root, name + "-source")
    r = result[name] = {}
    r["untrusted"] = [
        silent(auto.from_pretrained, out, **choice)
        for auto in (AutoConfig, AutoModel, AutoModelForCausalLM) for choice in ({}, {"trust_remote_code": False})
    ] + [silent(pipeline, "text-generation", model=out)]
    # first, while transformers knows no other class of the folder
    if name == "weightless":
        r["classifier"] = silent(AutoModelForSequenceClassification.from_pretrained, out, **trust)
    else:
        classifier = AutoModelForSequenceClassification.from_pretrained(out, **trust)
        r["classifier"] = [type(classifier).__name__, kinds(classifier)]
    eager = dict(experts_implementation="eager") if name == "experts" else {}
    model, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True, **trust, **eager)
    stock = AutoModelForCausalLM.from_pretrained(source, **eager)
    r["report"] = sorted(k for k, v in report.items() if v)
    r["kinds"], r["stock kinds"] = kinds(model), kinds(stock)
    ids = dict(input_ids=torch.tensor([[5, 17, 29, 40, 8, 61]]))
    r["generates"] = same_tokens(model, stock, **ids)
    r["loss"] = [model.loss_type, stock.loss_type]
    r["can generate"] = model.can_generate()
    base = AutoModel.from_pretrained(out, **trust)
    r["base"] = [type(base).__name__, kinds(base)]
    config = AutoConfig.from_pretrained(out, **trust)
    r["config"] = [type(config).__name__, config.tie_word_embeddings]
    fresh = AutoModelForCausalLM.from_config(config, **trust)
    r["fresh"] = [kinds(fresh), all(bool((m.weight == 1).all()) for m in fresh.modules()
                  if type(m).__name__ == "RMSNorm" and m.weight is not None)]
    again = tempfile.mkdtemp()
    model.save_pretrained(again)
    r["saved"] = sorted(os.listdir(again))
    saved = AutoModelForCausalLM.from_pretrained(again, **trust, **eager)
    with torch.no_grad():
        r["same after saving"] = bool(torch.equal(saved(**ids).logits, model(**ids).logits))
    half = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16, device_map="cpu", **trust)
    r["dtypes"] = sorted({str(p.dtype) for p in half.parameters()})
    model.gradient_checkpointing_enable()
    model.train()(**ids, labels=ids["input_ids"], use_cache=False).loss.backward()
    r["gradients"] = all(p.grad is not None for n, p in model.named_parameters() if "norm" in n or "ln_" in n)
    if os.path.exists(os.path.join(out, "tokenizer.json")):
        text = "ROMEO: what light?"
        mine = [AutoTokenizer.from_pretrained(out, **choice) for choice in ({}, trust)]
        theirs = AutoTokenizer.from_pretrained(source)
        r["tokenizer"] = [type(t) is type(theirs) and t(text) == theirs(text) for t in mine]
        p = pipeline("text-generation", model=out, **trust)
        r["pipeline"] = p("ROMEO:", max_new_tokens=5, do_sample=False)[0]["generated_text"]
        r["stock pipeline"] = pipeline("text-generation", model=source)("ROMEO:", max_new_tokens=5, do_sample=False)[0][
            "generated_text"
        ]
    model.resize_token_embeddings(model.config.vocab_size + 3)
    r["resized"] = type(model.get_input_embeddings()).__name__
print()  # behind questions about trust
print(json.dumps(result))
'''


@pytest.fixture(scope="module")
def found_there(published) -> dict:
    """What a process without normswap finds in the published folders."""
    return json.loads(fresh.run(SCRIPT, published).splitlines()[-1])


@pytest.mark.parametrize("name", FOLDERS)
def test_without_trust_nothing_loads(found_there, name):
    assert len(found_there[name]["untrusted"]) == 7
    assert all("trust_remote_code=True" in message for message in found_there[name]["untrusted"])


@pytest.mark.parametrize("name", FOLDERS)
def test_with_trust_the_auto_classes_give_the_converted_model(found_there, name):
    found = found_there[name]
    norms = found["stock kinds"]["LayerNorm"]
    expected = {"RMSNorm": norms} | ({"CentredOutputEmbedding": 1} if name == "tied" else {})
    assert norms >= 5 and found["report"] == []
    assert found["kinds"] == found["base"][1] == found["fresh"][0] == expected
    assert found["base"][0].startswith("Normswap") and found["base"][0].endswith("Model")
    assert found["config"][0].startswith("Normswap") and found["config"][1] is (name == "tied")
    assert found["fresh"][1] and found["can generate"] and found["gradients"]
    assert found["loss"][0] == found["loss"][1]
    assert found["dtypes"] == ["torch.bfloat16"]
    assert found["resized"] == ("CentredOutputEmbedding" if name == "tied" else "Embedding")
    if name == "weightless":
        assert "NormswapGPT2Config" in found["classifier"]
    else:
        assert "ForSequenceClassification" in found["classifier"][0] and found["classifier"][1] == expected


@pytest.mark.parametrize("name", FOLDERS)
def test_generation_with_cache_gives_the_same_tokens(found_there, name):
    assert found_there[name]["generates"] is True


@pytest.mark.parametrize("name", FOLDERS)
def test_what_was_loaded_can_be_saved_and_loaded(found_there, name):
    assert {"config.json", FILE, "model.safetensors"} <= set(found_there[name]["saved"])
    assert found_there[name]["same after saving"] is True


@pytest.mark.parametrize("name", ["untied", "tied", "neox"])
def test_tokenizer_and_pipeline(found_there, name):
    assert found_there[name]["tokenizer"] == [True, True]
    assert found_there[name]["pipeline"] == found_there[name]["stock pipeline"] != "ROMEO:"


def test_centred_inputs_and_norms_of_each_head_are_written(tmp_path, pytestconfig):
    model = tiny("cohere", use_qk_norm=True)
    plan = normswap.plan(model, norm="rmsnorm")
    # centred already, so that one more subtraction changes nothing
    plan = plan.model_copy(update={"edits": (*plan.edits, CentreInput(module="model.layers.1"))})
    want = logits_of(model, token_ids())
    publish(model, plan, tmp_path / "out")
    text = text_of(tmp_path / "out")
    assert 'INPUTS = {\n    "layers.1": -1,\n}' in text and "shape=(4, 8)" in text
    settings = ["--config", str(pytestconfig.rootpath / "pyproject.toml"), "--no-cache"]
    done = subprocess.run([sys.executable, "-m", "ruff", "format", "--check", *settings, tmp_path / "out" / FILE])
    assert done.returncode == 0
    again = load_generated(tmp_path / "out").from_pretrained(tmp_path / "out").eval()
    assert type(again.model.layers[1]).__name__ == "CentredInputCohereDecoderLayer"
    assert again.model.layers[0].self_attn.q_norm.weight.shape == (4, 8)
    # measured: 1e-7
    torch.testing.assert_close(logits_of(again, token_ids()), want, rtol=1e-5, atol=1e-5)
