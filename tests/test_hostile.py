"""Folders made to do harm: each gets one clear error, and nothing is executed, read elsewhere, or written."""

import json
import os
import shutil
import socket
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fuzzing.corpus import CORPUS
from normswap import limits
from normswap.checkpoint import documents, source
from normswap.checkpoint.documents import load_json
from normswap.errors import NormswapError, PlanError
from normswap.planning.edits import Change
from normswap.planning.plans import Plan
from test_cli import run


@pytest.fixture
def folder(tmp_path) -> Path:
    """The smallest GPT-2, to be spoilt."""
    return shutil.copytree(CORPUS / "whole", tmp_path / "model")


def edit(path: Path, **changes) -> Path:
    """A JSON file with other values."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


def refused(*line) -> str:
    """What one command line says that is refused as it has to be."""
    begun, result = time.monotonic(), run(*line)
    assert result.exit_code == 2 and result.stdout == "", result.output
    assert result.stderr.startswith(("Error: ", "Refused: ")) and result.stderr.count("\n") == 1, result.stderr
    assert "Traceback" not in result.stderr and result.stderr.rstrip("\n").isprintable()
    assert time.monotonic() - begun < 10
    return result.stderr


def converting(folder: Path) -> str:
    """What `convert` says of a folder, which stays as it is, with nothing beside it."""
    before = {path: path.lstat().st_mtime_ns for path in folder.parent.rglob("*")}
    said = refused("convert", folder, folder.parent / "out", "--norm", "rmsnorm", "--verify", "none")
    after = {path: path.lstat().st_mtime_ns for path in folder.parent.rglob("*")}
    assert before.keys() == after.keys() and {p for p in before if before[p] != after[p]} <= {folder.parent}
    return said


# -- links, pipes and devices ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "model.safetensors", "config.json", "extra/vocab.txt", "data", "gone"]
)
def test_links_out_of_the_folder_are_refused(folder, tmp_path, name):
    secret = tmp_path / "secret"
    if name == "data":
        secret.mkdir()
    elif name != "gone":
        shutil.copy(folder / name, secret) if (folder / name).is_file() else secret.write_text("{}")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(os.path.relpath(secret, (folder / name).parent))
    said = converting(folder)
    assert f"{name} is a link to {secret}, out of the folder" in said and "a copy of it in the link's place" in said


def test_a_folder_of_the_hubs_cache_gives_files(tmp_path):
    """Snapshots hold links to blobs beside them; what is made of them are files."""
    hub = tmp_path / "models--a--b"
    snapshot, blobs = hub / "snapshots" / "0a1b", hub / "blobs"
    for part in (snapshot / "1_Pooling", blobs):
        part.mkdir(parents=True)
    shutil.copytree(CORPUS / "whole", tmp_path / "plain")
    (tmp_path / "plain" / "tokenizer_config.json").write_text("{}")
    (tmp_path / "plain" / "1_Pooling").mkdir()
    (tmp_path / "plain" / "1_Pooling" / "config.json").write_text('{"a": 1}')
    for path in [path for path in (tmp_path / "plain").rglob("*") if path.is_file()]:
        name = path.relative_to(tmp_path / "plain")
        blob = blobs / str(name).replace("/", "-")
        path.rename(blob)
        (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    done = run("convert", snapshot, tmp_path / "out", "--norm", "rmsnorm", "--verify", "none")
    assert done.exit_code == 0, done.output
    made = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(made) >= 7 and not any(path.is_symlink() for path in made)
    assert (tmp_path / "out" / "1_Pooling" / "config.json").read_text() == '{"a": 1}'
    (snapshot / "tokenizer_config.json").unlink()
    (snapshot / "tokenizer_config.json").symlink_to("../../refs")
    assert "out of the folder" in refused("inspect", snapshot)


def test_pipes_and_sockets_are_refused(folder, monkeypatch):
    os.mkfifo(folder / "tokenizer.json")
    assert "tokenizer.json is a named pipe" in converting(folder)
    (folder / "tokenizer.json").unlink()
    monkeypatch.chdir(folder)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("s")
        assert "s is a socket" in converting(folder)


# -- documents ---------------------------------------------------------------------------------------------------------

DOCUMENTS = {
    "deep": (b'{"a":' * 100_000, "too deep"),
    "twice": (b'{"model_type": "gpt2", "model_type": "llama"}', "'model_type' stands twice"),
    "a number of 5000 digits": (b'{"a": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
    "no text": (b'{"a": "\xff"}', "can't decode"),
    "nothing": (b"", "Expecting value"),
}


@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json", "normswap.json"])
def test_documents_are_read_whole_or_refused(folder, name, file):
    text, message = DOCUMENTS[name]
    if "index" in file:
        (folder / "model.safetensors").unlink()
    (folder / file).write_bytes(text)
    assert message in (said := converting(folder)) and file in said


def test_documents_have_bounds(folder, monkeypatch, tmp_path):
    os.truncate(folder / "config.json", 300 * 2**20)  # of zeros, that take no place on the disk
    assert "config.json has 314572800 bytes" in converting(folder)
    monkeypatch.setattr(documents, "MAX_BYTES", 100)
    shutil.copy(CORPUS / "whole" / "config.json", folder)
    assert "config.json cannot be read as JSON: it has more than 100 bytes" in converting(folder)
    monkeypatch.setattr(documents, "MAX_VALUES", 3)
    load_json(b'{"a": [1]}')
    with pytest.raises(ValueError, match="about 4 values, more than the 3"):
        load_json(b'{"a": [1, 2]}')


def test_names_twice_are_found_in_no_time():
    """Of many names the last is there twice; each was once looked for among all."""
    text = json.dumps({str(n): 0 for n in range(100_000)})[:-1] + ', "99999": 1}'
    begun = time.process_time()
    with pytest.raises(ValueError, match="'99999' stands twice"):
        load_json(text.encode())
    assert time.process_time() - begun < 5  # measured: 0.2


# -- configurations ----------------------------------------------------------------------------------------------------

CONFIGS = {
    "layers": (dict(n_layer=10**9), "more than 1800 modules"),
    "layers of text": (dict(n_layer="2"), "cannot be loaded"),
    "no width": (dict(n_embd=0), ""),
    "half a width": (dict(n_embd=8.5), "cannot be loaded"),
    "width": (dict(n_embd=10**12), ""),
    "vocabulary": (dict(vocab_size=10**15), "config.json is not of these weights"),
    "vocabulary beyond torch": (dict(vocab_size=10**30), "cannot be built"),
    "heads": (dict(n_head=0), "cannot be built"),
    "a list": (dict(n_head=[4]), "cannot be loaded"),
    "activation": (dict(activation_function="__import__"), "cannot be built"),
    "dtype": (dict(dtype="os.system"), ""),
    "classes": (dict(architectures="GPT2LMHeadModel"), "expected names of classes"),
    "class of another kind": (dict(architectures=["GPT2Config"]), "which cannot be built"),
    "no class at all": (dict(architectures=["__version__"]), "which cannot be built"),
    "class of another model": (dict(architectures=["BertModel"]), ""),
    "type": (dict(model_type=["gpt2"]), "cannot be loaded"),
    "type of escapes": (dict(model_type="\x1b]0;x\x07\u202e\n2"), "cannot be loaded"),
    "code": (dict(auto_map=7, model_type="x"), "add --trust-remote-code"),
    "a kernel": (dict(attn_implementation="evil/attention"), "code that would be fetched and run"),
    "a kernel inside": (
        dict(text_config={"attn_implementation": {"": "evil/a"}}),
        "code that would be fetched and run",
    ),
    "other files": (dict(configuration_files=["config.4.0.0.json"]), "names other files to read in its place"),
    "quantised inside": (dict(text_config={"quantization_config": {"quant_method": "fp8"}}), "is quantised (fp8)"),
    "compressed": (dict(compression_config={"quant_method": "compressed-tensors"}), "quantised (compressed-tensors)"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_with_wrong_values_are_refused(folder, name):
    changes, message = CONFIGS[name]
    edit(folder / "config.json", **changes)
    assert message in converting(folder)


@pytest.mark.parametrize("changes", [dict(num_labels=10**9), dict(n_layer=10**9)])
def test_without_weights_a_number_is_bounded_too(tmp_path, monkeypatch, changes):
    monkeypatch.setattr(source, "limited", partial(limits.limited, nbytes=2**27, seconds=4))
    monkeypatch.setattr(source, "MAX_MODULES", 500)
    shutil.copy(CORPUS / "whole" / "config.json", tmp_path)
    said = refused("inspect", edit(tmp_path / "config.json", **changes))
    assert "far too large" in said and "more than " in said


def test_a_quantisation_of_nothing_is_none(folder):
    edit(folder / "config.json", quantization_config=None)
    assert run("inspect", folder).exit_code == 0


# -- bounds ------------------------------------------------------------------------------------------------------------


def test_work_is_stopped_at_its_bounds():
    with pytest.raises(limits.TooMuch, match="more than 0.2 seconds"), limits.limited(seconds=0.2):
        while True:
            pass
    with pytest.raises(limits.TooMuch, match="of memory"), limits.limited(nbytes=2**25):
        kept = [b"x" * (2**16 + n % 2) for n in range(10**6)]
    with pytest.raises(limits.TooMuch, match="more than 3 modules"), limits.limited(modules=3):
        torch.nn.Sequential(*(torch.nn.ReLU() for _ in range(4)))
    with limits.limited(modules=3):
        torch.nn.Sequential(*(torch.nn.ReLU() for _ in range(3)))
    with pytest.raises(KeyError), limits.limited():
        {}["a"]
    torch.nn.Sequential(*(torch.nn.ReLU() for _ in range(9)))  # and nothing is counted any more
    assert "kept" not in locals()


def test_what_takes_a_stop_for_an_error_of_its_own_is_stopped_again():
    stops = 0
    with pytest.raises(limits.TooMuch), limits.limited(seconds=0.1):
        while True:
            try:
                while True:
                    pass
            except BaseException:
                stops += 1
                if stops == 3:
                    raise
    assert stops == 3


# -- other formats -----------------------------------------------------------------------------------------------------

FORMATS = {
    "model.Q4_K_M.gguf": "GGUF, for llama.cpp",
    "onnx_model.onnx": "ONNX",
    "tf_model.h5": "from_tf=True",
    "flax_model.msgpack": "from_flax=True",
    "adapter_model.safetensors": "merge_and_unload",
    "model.fp16.safetensors": "safetensors of another name",
    "consolidated.00.pth": "save it again as safetensors",
}


@pytest.mark.parametrize("name", FORMATS)
def test_other_formats_are_refused_by_name(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    said = converting(folder)
    assert name in said and FORMATS[name] in said


# -- plans and records -------------------------------------------------------------------------------------------------


def moved(tmp_path: Path, change) -> Path:
    """A folder with a move, its record changed."""
    folder = shutil.copytree(CORPUS / "moved", tmp_path / "model")
    record = json.loads((folder / "normswap.json").read_text())
    change(record)
    (folder / "normswap.json").write_text(json.dumps(record))
    return folder


def changes_of(record: dict) -> list[dict]:
    return [change for e in record["plan"]["edits"] if e["edit"] == "rewrite" for change in e["changes"]]


def edit_of(record: dict, kind: str) -> dict:
    return next(e for e in record["plan"]["edits"] if e["edit"] == kind)


def calls(name):
    def change(record):
        next(c for c in changes_of(record) if c["kind"] == "wrap")["name"] = name

    return change


def is_now(kind, name):
    def change(record):
        changes_of(record)[0].update(kind=kind, name=name)

    return change


RECORDS = {
    "a method that writes": (calls("save_pretrained"), "calls save_pretrained: expected a norm"),
    "what a function knows": (calls("forward.__globals__.get"), "expected a name of an attribute"),
    "a call": (calls("a(b)"), "expected a name of an attribute"),
    "a keyword": (calls("lambda"), "expected a name of an attribute"),
    "a line": (calls("a\nimport os"), "expected a name of an attribute"),
    "a method of a norm": (is_now("merge-left", "ln_1.forward"), "makes the change merge-left"),
    "a number that was there": (is_now("scale", "training"), "multiplies by training"),
    "a method's name": (lambda r: edit_of(r, "rewrite").update(method="f(x)"), "expected a name of an attribute"),
    "a kernel": (lambda r: r["source_config"].update(attn_implementation="a/b"), "fetched and run"),
    "a setting": (
        lambda r: r["plan"]["edits"].append(dict(edit="set_config", key="_x.__y", value=1)),
        "expected a name of an attribute",
    ),
    "a text as a setting": (
        lambda r: r["plan"]["edits"].append(dict(edit="set_config", key="x", value="a/kernel")),
        "set_config.value",
    ),
    "a width": (lambda r: edit_of(r, "swap_norm").update(width=10**12), "less than or equal to 67108864"),
    "a shape": (lambda r: edit_of(r, "swap_norm").update(shape=[10**7, 10**7]), "at most 67108864 gains"),
    "a kind": (lambda r: r["plan"]["request"]["norms"][0].update(kind="x"), "expected kinds of norm"),
    "layers": (lambda r: r["source_config"].update(n_layer=10**9), "modules"),
}  # fmt: skip


@pytest.mark.parametrize("name", RECORDS)
def test_records_may_not_have_anything_called(tmp_path, name):
    change, message = RECORDS[name]
    folder = moved(tmp_path, change)
    for line in (("inspect", folder), ("verify", folder, CORPUS / "whole", "--tokens", "16")):
        assert message in refused(*line)


def test_the_record_is_good_before_it_is_spoilt(tmp_path):
    assert run("inspect", moved(tmp_path, lambda record: None)).exit_code == 0


def test_saved_plans_are_held_to_the_same(tmp_path):
    plan = json.loads((CORPUS / "plans" / "place.json").read_text())
    calls("save_pretrained")({"plan": plan})
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    said = refused("convert", CORPUS / "whole", tmp_path / "out", "--plan", tmp_path / "plan.json")
    assert "calls save_pretrained: expected a norm" in said and not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="name of an attribute"):
        Change(kind="wrap", name="x\n", span=(0, 0, 0, 1))
    (tmp_path / "plan.json").write_bytes(b"[" * 10**6)
    with pytest.raises(PlanError, match="is not a plan written by"):
        Plan.load(tmp_path / "plan.json")


MANY = {
    "edits": (lambda p: p.update(edits=[{}] * 70_000), "edits.0: Unable to extract tag"),
    "fields": (lambda p: p.update({str(n): n for n in range(70_000)}), "expected an object with the fields of a plan"),
    "names": (lambda p: p["edits"].append({str(n): n for n in range(70_000)}), "an object has 70000 names"),
    "items": (lambda p: p["edits"][0].update(sums=[[]] * 70_000), "a list has 70000 items, expected at most 65536"),
}


@pytest.mark.parametrize("name", MANY)
def test_what_does_not_fit_many_times_is_told_once(tmp_path, name):
    """Each of so many errors was noted, a kilobyte for three bytes."""
    change, message = MANY[name]
    plan = json.loads((CORPUS / "plans" / "kind.json").read_text())
    change(plan)
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(PlanError, match=message) as found:
        Plan.load(tmp_path / "plan.json")
    assert len(str(found.value)) < 1000


# -- the terminal ------------------------------------------------------------------------------------------------------

NAMES = ["h." + "9" * 5000, "\x1b[2J\x1b]0;owned\x07", "a\nError: b", "\u202egnp.exe", "\ud800", "\x9b31m", "a\x00b"]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_names_in_files_do_not_reach_the_terminal(tmp_path, name):
    folder = shutil.copytree(CORPUS / "sharded", tmp_path / "model")
    path = folder / "model-00001-of-00002.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header[name] = header.pop(next(key for key in header if key != "__metadata__"))
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    alone = "surrogates not allowed" if name == "\ud800" else None
    assert (alone or "expected names of tensors that can be printed") in converting(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for where in ("key", "file"):
        weight_map = index["weight_map"] | {name if where == "key" else "a": "x" if where == "key" else name}
        edit(folder / "model.safetensors.index.json", weight_map=weight_map)
        assert (alone or documents.shown(name)[:100]) in converting(folder)


def test_names_of_files_do_not_reach_the_terminal(folder):
    for name in ("\x1b[2J\n.bin", "\u202e.onnx", os.fsdecode(b"\xff\xfe.gguf")):
        (folder / name).write_bytes(b"")
    done = run("convert", folder, folder.parent / "out", "--norm", "rmsnorm", "--verify", "none")
    assert done.exit_code == 0 and all(c == "\n" or c.isprintable() or c == "\xa0" for c in done.output)
    left = next(line for line in done.stderr.splitlines() if line.startswith("left behind"))
    assert "?[2J?.bin" in left and "?.onnx" in left and "??.gguf" in left
    shown = run("convert", folder, folder.parent / "two", "--norm", "rmsnorm", "--verify", "none", "--json")
    assert len(json.loads(shown.stdout)["skipped"]) == 3


@pytest.mark.parametrize("name", ["a\x00b", "x" * 5000, "~nobody-of-this-name/x", "\x1b[2J"])
def test_names_of_models_do_not_reach_the_terminal(name):
    refused("inspect", name)


def test_errors_of_the_library_are_of_one_family(folder):
    save_file({"x": torch.ones(2)}, folder / "model.safetensors")
    with pytest.raises(NormswapError):
        source.Source.open(folder).build()
        raise NormswapError("a model that lacks its weights is refused where they are needed")


# -- code that comes along ---------------------------------------------------------------------------------------------


def test_code_of_tokenizers_and_of_generation_is_copied_and_not_run(small, tmp_path):
    folder, spring = shutil.copytree(small["gpt2"], tmp_path / "model"), tmp_path / "sprung"
    trap = f"open({str(spring)!r}, 'w')\n"
    (folder / "tokenization_evil.py").write_text(trap + "class EvilTokenizer: pass\n")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(trap + "def generate(*args, **kwargs): pass\n")
    edit(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["tokenization_evil.EvilTokenizer", None]},
        tokenizer_class="EvilTokenizer",
        chat_template="{{ ''.__class__.__mro__[1].__subclasses__() }}",
    )
    edit(folder / "generation_config.json", custom_generate="custom_generate", trust_remote_code=True)
    done = run("convert", folder, tmp_path / "out", "--norm", "rmsnorm", "--verify", "fast")
    assert done.exit_code == 0, done.output
    assert not spring.exists()
    for name in ("tokenization_evil.py", "custom_generate/generate.py", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
