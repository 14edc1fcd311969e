"""Checkpoints of torch.save: found, read and converted as safetensors are; what a pickle asks for is never done."""

import io
import json
import os
import pickle
import shutil
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import normswap
from normswap.checkpoint.files import Checkpoint
from normswap.errors import SourceError
from normswap.verification import on_disk
from test_cli import run

LEGACY = {"_use_new_zipfile_serialization": False}


def folder_of(path: Path, state, **options) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text("{}")
    torch.save(state, path / "pytorch_model.bin", **options)
    return path


def views() -> OrderedDict[str, torch.Tensor]:
    """Every dtype, and every way in which a tensor lies in its storage."""
    w = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    made = OrderedDict(w=w, rows=w[2:4], turned=w.T, columns=w[:, 2:5], every=w[::2, ::3], block=w[1:5].T[3:7])
    made |= {"parameter": torch.nn.Parameter(w.clone()), "empty": torch.zeros(0, 4), "number": torch.tensor(2.5)}
    made |= {"one": w[3:4, 1:2], "row": w[:1].expand(1, 8)}
    dtypes = "float64 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64 uint16 float8_e4m3fn"
    made |= {name: torch.ones(3).to(getattr(torch, name)) for name in dtypes.split()}
    made._metadata = OrderedDict({"": {"version": 1}})
    return made


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
def test_tensors_are_found_and_read_as_torch_loads_them(tmp_path, options):
    state, checked = views(), 0
    with Checkpoint.open(folder_of(tmp_path / "m", state, **options)) as checkpoint:
        assert list(checkpoint.tensors) == list(state) and checkpoint.shards[0].name == "model.safetensors"
        for key, expected in state.items():
            info, found = checkpoint.tensors[key], checkpoint.read(key)
            assert (info.dtype, info.shape, info.nbytes) == (expected.dtype, expected.shape, expected.nbytes)
            expected = expected.detach().contiguous()
            data = bytes(expected.reshape(-1).view(torch.uint8).numpy())
            assert bytes(found.reshape(-1).view(torch.uint8).numpy()) == data, key
            copy, third = np.empty(info.nbytes, np.uint8), info.nbytes // 3
            checkpoint.read_into(copy[:third], key, 0)
            checkpoint.read_into(copy[third:], key, third)
            assert bytes(copy) == data, key
            if found.ndim == 2 and len(found) > 1:
                assert torch.equal(checkpoint.read(key, range(1, len(found))), expected[1:]), key
                checked += 1
    assert checked == 7


@pytest.fixture(scope="module")
def converted(small, tmp_path_factory) -> tuple[Path, Path]:
    """A safetensors checkpoint without tied weights, and what it is converted to."""
    out = tmp_path_factory.mktemp("safetensors") / "out"
    normswap.convert(small["gpt2"], out, norm="rmsnorm", verify="none")
    return small["gpt2"], out


def as_pickled(source: Path, to: Path, shards: int) -> Path:
    """The checkpoint as torch.save writes it, with what is tied stored twice, as old ones have it."""
    shutil.copytree(source, to, ignore=shutil.ignore_patterns("*.safetensors"))
    state = AutoModelForCausalLM.from_pretrained(source).state_dict()
    if shards == 1:
        torch.save(state, to / "pytorch_model.bin")
        return to
    names = [f"pytorch_model-{n + 1:05}-of-{shards:05}.bin" for n in range(shards)]
    place = {key: names[n * shards // len(state)] for n, key in enumerate(state)}
    for name in names:
        torch.save({key: state[key] for key in state if place[key] == name}, to / name)
    index = {"metadata": {"total_size": 0}, "weight_map": place}
    (to / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return to


@pytest.mark.parametrize("shards", [1, 3])
def test_a_conversion_gives_the_same_as_of_safetensors(converted, tmp_path, monkeypatch, shards):
    source, expected = converted
    monkeypatch.setattr(
        on_disk, "IN_MEMORY", 0
    )  # weights are read from the files where they are used, as of a large one
    done = normswap.convert(
        as_pickled(source, tmp_path / "m", shards),
        tmp_path / "out",
        norm="rmsnorm",
        verify="fast" if shards > 1 else "none",
    )
    names = sorted(path.name for path in (tmp_path / "out").glob("model[.-]*"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text()) if shards > 1 else None
    if shards == 1:
        assert names == ["model.safetensors"]
    else:
        parts = [f"model-{n:05}-of-00003.safetensors" for n in (1, 2, 3)]
        assert names == [*parts, "model.safetensors.index.json"]
        assert done.report.claim == "exact"
    found = {key: value for name in done.written.hashes for key, value in load_file(tmp_path / "out" / name).items()}
    if index is not None:
        assert index["weight_map"].keys() == found.keys() and index["metadata"]["total_size"] > 0
    tied = found.pop("lm_head.weight")
    assert torch.equal(tied, found["transformer.wte.weight"])
    wanted = load_file(expected / "model.safetensors")
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert not done.skipped and not list((tmp_path / "out").glob("*.bin*"))
    record = json.loads((tmp_path / "out" / "normswap.json").read_text())
    hashed = record["source"]["files"]  # of a conversion that is not verified none are taken
    assert all(name.endswith(".bin") for name in hashed) and len(hashed) == (shards if shards > 1 else 0)


def test_every_command_reads_them(small, tmp_path):
    source = as_pickled(small["llama"], tmp_path / "m", 1)
    shown = run("inspect", source)
    assert "21 float32" in shown.stdout and shown.exit_code == 0, shown.output
    shown = run("plan", source, "--norm", "layernorm", "--exact", "-o", tmp_path / "plan.json")
    assert "on disk: " in shown.stdout, shown.output
    shown = run("verify", source, small["llama"], "--tokens", "16")
    assert "No difference beyond rounding" in shown.stdout, shown.output


def test_safetensors_come_first(tmp_path):
    folder = folder_of(tmp_path / "m", {"old": torch.ones(2)})
    save_file({"new": torch.ones(2)}, folder / "model.safetensors")
    with Checkpoint.open(folder) as checkpoint:
        assert list(checkpoint.tensors) == ["new"]


# -- pickles with payloads ---------------------------------------------------------------------------------------------


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("options", [{}, LEGACY, {"pickle_protocol": 4}], ids=["zip", "legacy", "protocol 4"])
def test_a_payload_is_named_and_not_run(small, tmp_path, options):
    source = shutil.copytree(small["gpt2"], tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors"))
    state = {"w": torch.ones(2), "x": Payload(tmp_path / "sprung")}
    torch.save(state, source / "pytorch_model.bin", **options)
    before = sorted(tmp_path.rglob("*"))
    for line in (("inspect", source), ("verify", source, source), ("convert", source, tmp_path / "out", "--fold")):
        refused = run(*line)
        assert refused.exit_code == 2 and refused.stdout == "" and refused.stderr.count("\n") == 1
        assert (
            "it asks for 'posix.system'" if len(options) < 1 or options == LEGACY else "of protocol 4"
        ) in refused.stderr
        assert "Traceback" not in refused.stderr
    assert sorted(tmp_path.rglob("*")) == before


GLOBALS = {
    "memory": (b"cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x7f\x85R.", "asks for 'builtins.bytearray'"),
    "eval": (b"cbuiltins\neval\nX\x01\x00\x00\x001\x85R.", "asks for 'builtins.eval'"),
    "of torch": (b"ctorch\nload\nX\x01\x00\x00\x001\x85R.", "asks for 'torch.load'"),
    "an escape": (b"c\x1b[2J\nx\n.", r"asks for '\\x1b\[2J.x'"),
    "an instance": (b"(iposix\nsystem\n.", "has the instruction INST"),
    "a number": (b"\x80\x02K\x01.", "expected tensors by name, found a int"),
    "a tensor's place": (b"}X\x01\x00\x00\x00aK\x01s.", "found a int under 'a'"),
    "no name": (b"}K\x01K\x01s.", "expected names that are text"),
    "twice": (b"}(X\x01\x00\x00\x00aNX\x01\x00\x00\x00aNu.", "the name 'a' stands twice"),
    "cut off": (b"}", "pickle is damaged|cut off"),
    "nothing": (b"", "damaged"),
    "too much taken": (b"\x85\x85.", "a value is missing"),
    "no mark": (b"t.", "a mark is missing"),
    "a call of a number": (b"K\x01)R.", "it calls a int"),
    "a tuple of 2^40 numbers": (
        b"K\x01q\x00" + b"h\x00\x86q\x00" * 40 + b"Q.",
        "expected a storage, found another tuple",
    ),
    "memory by place": (b"}r\xff\xff\xff\xff.", None),
    "a long text": (b"X\xff\xff\xff\xff.", "damaged"),
}


@pytest.mark.parametrize("name", GLOBALS)
def test_what_no_state_dict_takes_is_refused(tmp_path, name):
    program, message = GLOBALS[name]
    folder = folder_of(tmp_path / "m", {})
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
        archive.writestr("m/data.pkl", program)
    if message is None:
        assert Checkpoint.open(folder).tensors == {}
        return
    with pytest.raises(SourceError, match=message) as refused:
        Checkpoint.open(folder)
    assert "pytorch_model.bin: expected a state dict" in str(refused.value) and str(refused.value).isprintable()


# -- archives that lie -------------------------------------------------------------------------------------------------


def rewritten(source: bytes, change) -> bytes:
    """The archive with its entries, `{name: (data, compressed)}`, changed."""
    entries = {info.filename: zipfile.ZipFile(io.BytesIO(source)).read(info) for info in
               zipfile.ZipFile(io.BytesIO(source)).infolist()}  # fmt: skip
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, data, how in change(entries):
            archive.writestr(name, data, how)
    return made.getvalue()


def stored(entries):
    return [(name, data, zipfile.ZIP_STORED) for name, data in entries.items()]


ARCHIVES = {
    "compressed": (lambda e: [(n, d, zipfile.ZIP_DEFLATED) for n, d in e.items()], "is compressed or encrypted"),
    "a storage short": (lambda e: stored({n: d[:-1] if n.endswith("/0") else d for n, d in e.items()}), "has 7"),
    "a storage long": (lambda e: stored({n: d + b"0" if n.endswith("/0") else d for n, d in e.items()}), "has 9"),
    "no storage": (lambda e: stored({n: d for n, d in e.items() if not n.endswith("/0")}), "does not have"),
    "no pickle": (lambda e: stored({n: d for n, d in e.items() if not n.endswith(".pkl")}), "without one data.pkl"),
    "two pickles": (lambda e: stored({**e, "other/data.pkl": b"}."}), "without one data.pkl"),
    "a program": (lambda e: stored({**e, "pytorch_model/constants.pkl": b"}."}), "TorchScript"),
    "byte order": (lambda e: stored(e | {"pytorch_model/byteorder": b"big"}), "byte order b'big'"),
    "twice": (lambda e: [*stored(e), *stored(e)], "twice"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ARCHIVES)
def test_archives_that_do_not_fit_are_refused(tmp_path, name):
    change, message = ARCHIVES[name]
    folder = folder_of(tmp_path / "m", {"a": torch.ones(2)})
    path = folder / "pytorch_model.bin"
    path.write_bytes(rewritten(path.read_bytes(), change))
    with pytest.raises(SourceError, match=message):
        Checkpoint.open(folder)


class Place:
    """Pickled as a tensor of that offset, shape and strides of a storage of four numbers."""

    def __init__(self, *place):
        self.place = place

    def __reduce__(self):
        storage = torch.ones(4).untyped_storage()
        offset, shape, strides = self.place
        typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
        return torch._utils._rebuild_tensor_v2, (typed, offset, shape, strides, False, OrderedDict())


PLACES = {
    "good": ((1, (3,), (1,)), None),
    "beyond": ((2, (3,), (1,)), "reaches beyond its storage"),
    "a stride beyond": ((0, (2,), (4,)), "reaches beyond its storage"),
    "negative offset": ((-1, (3,), (1,)), "no part of a storage"),
    "negative size": ((0, (-1,), (1,)), "no part of a storage"),
    "negative stride": ((3, (3,), (-1,)), "no part of a storage"),
    "repeated": ((0, (1000, 1000), (0, 0)), "repeats the values"),
    "huge": ((0, (2**62, 2**62), (1, 1)), "reaches beyond its storage"),
    "sizes unlike strides": ((0, (2, 2), (1,)), "2 sizes and 1 strides"),
    "true": ((0, (True,), (1,)), "no part of a storage"),
}


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", PLACES)
def test_a_tensor_lies_in_its_storage(tmp_path, name, options):
    place, message = PLACES[name]
    folder = folder_of(tmp_path / "m", {"a": Place(*place)}, **options)
    if message is None:
        assert torch.equal(Checkpoint.open(folder).read("a"), torch.ones(3))
        return
    with pytest.raises(SourceError, match=message):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "data", [b"", b"PK\x03\x04", b"\x80\x02}.", pickle.dumps({"a": 1}), b"\x00" * 100, b"PK\x03\x04" * 99]
)
def test_other_files_are_not_taken_for_checkpoints(tmp_path, data):
    folder = folder_of(tmp_path / "m", {})
    (folder / "pytorch_model.bin").write_bytes(data)
    with pytest.raises(SourceError, match="expected a state dict that torch.save wrote"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
def test_cut_off_anywhere_it_is_refused(tmp_path, options):
    folder = folder_of(tmp_path / "m", {"a": torch.ones(64), "b": torch.zeros(2)}, **options)
    whole = (folder / "pytorch_model.bin").read_bytes()
    for end in range(0, len(whole), 37):
        (folder / "pytorch_model.bin").write_bytes(whole[:end])
        with pytest.raises(SourceError, match="expected a state dict"):
            Checkpoint.open(folder)
