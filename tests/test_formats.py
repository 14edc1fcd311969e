"""Forms in which checkpoints come: several dtypes in one, and repositories of the Hub with one format or several."""

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from random import Random

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

import normswap
from fuzzing.corpus import CORPUS
from test_cli import run

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def test_each_tensor_keeps_its_dtype(small, tmp_path):
    """In float64, float32, float16 and bfloat16 at once; loading brings them all into the configuration's."""
    source = shutil.copytree(small["gpt2"], tmp_path / "mixed")
    random, tensors = Random(0), load_file(source / "model.safetensors")
    tensors = {key: value.to(random.choice(DTYPES)) for key, value in sorted(tensors.items())}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    done = normswap.convert(source, tmp_path / "out", norm="rmsnorm", verify="fast")
    assert done.report.mathematics.comparison.worst_error < 1e-12  # measured: 6.4e-16
    assert done.report.tensors_checked > 20
    made = load_file(tmp_path / "out" / "model.safetensors")
    assert {key: made[key].dtype for key in tensors} == {key: value.dtype for key, value in tensors.items()}
    edited = {made[t.key].dtype for t in done.written.tensors.values() if t.what == "edited"}
    assert edited == set(DTYPES)


class Hub:
    """Stands for the Hub: repositories are folders, and what is fetched of them is noted."""

    def __init__(self, root: Path, cache: Path):
        self.root, self.cache, self.asked = root, cache, []

    def snapshot_download(self, name, revision=None, allow_patterns=("*",), ignore_patterns=()):
        self.asked.append((name, revision))
        target = self.cache / name / "snapshots" / (revision or "main")
        target.mkdir(parents=True, exist_ok=True)
        for path in (self.root / name).iterdir():
            wanted = any(fnmatch(path.name, pattern) for pattern in allow_patterns)
            if wanted and not any(fnmatch(path.name, pattern) for pattern in ignore_patterns):
                shutil.copy(path, target)
        return str(target)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    made = Hub(tmp_path / "hub", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    for name, parts in {"new": ("whole", "pickled"), "old": ("pickled",), "old-sharded": ()}.items():
        (made.root / "org" / name).mkdir(parents=True)
        for part in parts:
            shutil.copytree(CORPUS / part, made.root / "org" / name, dirs_exist_ok=True)
        for other in ("tf_model.h5", "flax_model.msgpack", "training_args.bin"):
            (made.root / "org" / name / other).write_bytes(b"")
    folder, state = made.root / "org" / "old-sharded", torch.load(CORPUS / "pickled" / "pytorch_model.bin")
    shutil.copy(CORPUS / "whole" / "config.json", folder)
    place = {key: f"pytorch_model-0000{1 + n % 2}-of-00002.bin" for n, key in enumerate(state)}
    for name in set(place.values()):
        torch.save({key: value for key, value in state.items() if place[key] == name}, folder / name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": place}))
    return made


@pytest.mark.parametrize("name", ["new", "old", "old-sharded"])
def test_of_the_hub_one_format_is_fetched(hub, tmp_path, name):
    shown = run("inspect", f"org/{name}", "--revision", "v1")
    assert shown.exit_code == 0 and "on disk" not in shown.stdout  # without weights
    assert not list(hub.cache.rglob("*.bin")) and not list(hub.cache.rglob("*.safetensors"))
    done = run("convert", f"org/{name}", tmp_path / "out", "--norm", "rmsnorm", "--verify", "none", "--revision", "v1")
    assert done.exit_code == 0, done.output
    fetched = sorted(path.name for path in hub.cache.rglob("*") if path.suffix in (".bin", ".safetensors", ".h5"))
    parts = [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
    assert fetched == {"new": ["model.safetensors"], "old": ["pytorch_model.bin"], "old-sharded": parts}[name]
    assert {revision for _, revision in hub.asked} == {"v1"}
    record = json.loads((tmp_path / "out" / "normswap.json").read_text())
    assert record["source"]["name"] == f"org/{name}" and record["source"]["revision"] == "v1"
    assert "left behind" not in done.stderr
