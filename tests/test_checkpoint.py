"""Reading a checkpoint folder: what it finds, that reads are exact, and that every malformed file is refused."""

import hashlib
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from normswap.checkpoint.files import Checkpoint
from normswap.checkpoint.header import render_header
from normswap.errors import SourceError

ALL_DTYPES = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "i64": torch.int64,
    "i32": torch.int32,
    "i16": torch.int16,
    "i8": torch.int8,
    "u8": torch.uint8,
    "bool": torch.bool,
    "c64": torch.complex64,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}


def tensors_of_all_dtypes() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {
        name: torch.randint(0, 2, (3, 5), generator=generator).to(torch.float32).to(dtype)
        for name, dtype in ALL_DTYPES.items()
    }
    return made | {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "long": torch.arange(100_000)}


def folder_with(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text("{}")
    return path


def sharded(path: Path, shards: dict[str, dict[str, torch.Tensor]], **changes: str) -> Path:
    path.mkdir()
    (path / "config.json").write_text("{}")
    for name, tensors in shards.items():
        save_file(tensors, path / name)
    weight_map = {key: name for name, tensors in shards.items() for key in tensors} | changes
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def test_finds_and_reads_what_the_library_wrote(tmp_path):
    tensors = tensors_of_all_dtypes()
    with Checkpoint.open(folder_with(tmp_path / "m", tensors)) as checkpoint:
        assert checkpoint.tensors.keys() == tensors.keys()
        assert checkpoint.index is None
        assert [shard.metadata for shard in checkpoint.shards] == [{"format": "pt"}]
        for key, expected in tensors.items():
            info, found = checkpoint.tensors[key], checkpoint.read(key)
            assert (info.dtype, info.shape) == (expected.dtype, tuple(expected.shape)) == (found.dtype, found.shape)
            assert info.nbytes == expected.nbytes
            assert torch.equal(found.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))


def test_a_read_is_memory_of_its_own(tmp_path):
    with Checkpoint.open(folder_with(tmp_path / "m", {"w": torch.ones(4)})) as checkpoint:
        checkpoint.read("w").zero_()
        assert torch.equal(checkpoint.read("w"), torch.ones(4))
    assert torch.equal(load_file(tmp_path / "m" / "model.safetensors")["w"], torch.ones(4))


def test_rendered_header_is_the_library_s(tmp_path):
    """Written again from what was read, the file's header is the same bytes: order, padding, metadata."""
    path = folder_with(tmp_path / "m", tensors_of_all_dtypes()) / "model.safetensors"
    with Checkpoint.open(path.parent) as checkpoint:
        shard = checkpoint.shards[0]
        text = render_header(((t.key, t.dtype, t.shape) for t in shard.tensors), shard.metadata)
    assert path.read_bytes().startswith(text)
    assert shard.tensors[0].offset == len(text)


def test_hub_cache_links_are_followed(tmp_path):
    tensors = {"w": torch.randn(4, 4)}
    blobs, snapshot = folder_with(tmp_path / "blobs", tensors), tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for name in ("model.safetensors", "config.json"):
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    with Checkpoint.open(snapshot) as checkpoint:
        assert torch.equal(checkpoint.read("w"), tensors["w"])
    assert blobs.is_dir()


def test_sharded_folder(tmp_path):
    a, b = {"x": torch.randn(2), "z": torch.randn(3)}, {"y": torch.randn(4)}
    with Checkpoint.open(sharded(tmp_path / "m", {"m-1.safetensors": a, "m-2.safetensors": b})) as checkpoint:
        assert [shard.name for shard in checkpoint.shards] == ["m-1.safetensors", "m-2.safetensors"]
        assert {key: info.shard for key, info in checkpoint.tensors.items()} == checkpoint.index["weight_map"]
        assert torch.equal(checkpoint.read("y"), b["y"])


def test_fingerprint_sees_shapes_and_ignores_sharding(tmp_path):
    x, y = torch.zeros(2, 3), torch.zeros(4)
    folders = [
        folder_with(tmp_path / "one", {"x": x, "y": y}),
        sharded(tmp_path / "two", {"m-1.safetensors": {"y": y}, "m-2.safetensors": {"x": x + 1}}),
        folder_with(tmp_path / "shape", {"x": x.T.contiguous(), "y": y}),
        folder_with(tmp_path / "dtype", {"x": x, "y": y.half()}),
        folder_with(tmp_path / "key", {"x": x, "z": y}),
    ]
    prints = [Checkpoint.open(folder).fingerprint() for folder in folders]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 4


def test_file_hashes_are_of_the_bytes(tmp_path):
    folder = folder_with(tmp_path / "m", {"x": torch.randn(1000)})
    expected = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert Checkpoint.open(folder).hash_file("model.safetensors") == expected


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(SourceError, match="no such folder"):
        Checkpoint.open(tmp_path / "nowhere")
    with pytest.raises(SourceError, match=r"expected config\.json"):
        Checkpoint.open(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.pth").write_bytes(b"pickle")
    with pytest.raises(SourceError, match=r"found model\.pth.*save_pretrained"):
        Checkpoint.open(tmp_path)


# Hostile files: a header of one's own over `data` zero bytes. `{"a": ...}` stands for a valid entry of 8 bytes.
GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def entry(**changes) -> dict:
    return {"a": GOOD | changes}


HOSTILE = {
    "not json": (b"{'a'", 8, "no valid JSON"),
    "not utf-8": (b'{"\xff":1}', 8, "no valid JSON"),
    "deep nesting": (b"[" * 100_000, 8, "no valid JSON"),
    "a list": (b"[1]", 8, "JSON object"),
    "key twice": (b'{"a":%s,"a":%s}' % ((json.dumps(GOOD).encode(),) * 2), 8, "'a' stands twice"),
    "entry no object": ({"a": 3}, 8, "tensor a: expected the fields"),
    "field missing": ({"a": {"dtype": "F32", "shape": [2]}}, 8, "tensor a: expected the fields"),
    "field too many": (entry(more=1), 8, "tensor a: expected the fields"),
    "unknown dtype": (entry(dtype="F31"), 8, "tensor a: expected a dtype among F64.*'F31'"),
    "dtype no text": (entry(dtype=["F32"]), 8, "tensor a: expected a dtype"),
    "negative size": (entry(shape=[-2]), 8, "tensor a: expected a shape"),
    "size true": (entry(shape=[2, True]), 8, "tensor a: expected a shape"),
    "size no integer": (entry(shape=[2.0]), 8, "tensor a: expected a shape"),
    "huge shape": (entry(shape=[2**62, 2**62]), 8, "tensor a: F32 of shape"),
    "offsets backwards": (entry(data_offsets=[8, 0]), 8, r"tensor a: expected data_offsets \[begin, end\]"),
    "offsets negative": (entry(data_offsets=[-8, 0]), 8, "tensor a: expected data_offsets"),
    "three offsets": (entry(data_offsets=[0, 4, 8]), 8, "tensor a: expected data_offsets"),
    "bytes unlike the shape": (entry(data_offsets=[0, 4]), 4, "takes 8 bytes.*hold 4"),
    "beyond the file": (entry(), 7, "describes .* bytes, the file has"),
    "bytes left over": (entry(), 9, "describes .* bytes, the file has"),
    "no tensors but data": ({}, 8, "describes .* bytes, the file has"),
    "hole": (entry() | {"b": GOOD | {"data_offsets": [12, 20]}}, 20, "tensor b should start at byte"),
    "hole at the start": (entry(data_offsets=[4, 12]), 12, "tensor a should start at byte"),
    "overlap": (entry() | {"b": GOOD | {"data_offsets": [4, 12]}}, 12, "tensor b should start at byte"),
    "same place": (entry() | {"b": GOOD}, 8, "tensor b should start at byte"),
    "metadata no text": (entry() | {"__metadata__": {"format": 1}}, 8, "__metadata__"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_header_is_refused(tmp_path, name):
    header, data, message = HOSTILE[name]
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))
    with pytest.raises(SourceError, match=message) as refused:
        Checkpoint.open(tmp_path)
    assert "model.safetensors" in str(refused.value)


def test_the_hostile_entry_is_good_before_it_is_spoilt(tmp_path):
    text = json.dumps(entry()).encode()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    assert torch.equal(Checkpoint.open(tmp_path).read("a"), torch.zeros(2))


@pytest.mark.parametrize(
    "content",
    [b"", b"\x02", struct.pack("<Q", 2), struct.pack("<Q", 0) + b"{}", struct.pack("<Q", 100) + b"{}", b"\xff" * 64],
    ids=["empty", "one byte", "length only", "length zero", "length beyond", "length huge"],
)
def test_length_is_not_believed(tmp_path, content):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(SourceError, match="header length"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("name", ["../m-1.safetensors", "/etc/passwd", "sub/m.safetensors", "..", ".", "", "a\0b", 3])
def test_index_may_not_lead_elsewhere(tmp_path, name):
    folder = sharded(tmp_path / "m", {"m-1.safetensors": {"x": torch.zeros(2)}}, x=name)
    with pytest.raises(SourceError, match="tensor x: expected the name of a file"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y": "m-1.safetensors"}, "tensor y: the index says m-1.safetensors, the files' headers say nothing"),
        ({"x": "m-2.safetensors"}, "tensor x: the index says m-2.safetensors, the files' headers say m-1.safetensors"),
        ({"y": "m-3.safetensors"}, "m-3.safetensors: named by .*No such file"),
    ],
)
def test_index_has_to_agree_with_the_files(tmp_path, changes, message):
    one = {"w": torch.zeros(2), "x": torch.zeros(2)}
    shards = {"m-1.safetensors": one, "m-2.safetensors": {"z": torch.zeros(2)}}
    with pytest.raises(SourceError, match=message):
        Checkpoint.open(sharded(tmp_path / "m", shards, **changes))


def test_tensor_that_the_index_omits_is_refused(tmp_path):
    folder = sharded(tmp_path / "m", {"m-1.safetensors": {"x": torch.zeros(2), "y": torch.zeros(2)}})
    index = {"weight_map": {"x": "m-1.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SourceError, match="tensor y: the index says nothing"):
        Checkpoint.open(folder)


def test_tensor_in_two_shards_is_refused(tmp_path):
    one, two = {"x": torch.zeros(2), "w": torch.zeros(2)}, {"x": torch.zeros(2), "y": torch.zeros(2)}
    shards = {"m-1.safetensors": one, "m-2.safetensors": two}
    with pytest.raises(SourceError, match=r"found x in both m-1\.safetensors and m-2\.safetensors"):
        Checkpoint.open(sharded(tmp_path / "m", shards))


@pytest.mark.parametrize(
    "text", ["{", '{"weight_map": []}', "[]", '{"weight_map": {}}', '{"weight_map": {"x": "a", "x": "b"}}']
)
def test_malformed_index_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(SourceError, match=r"model\.safetensors\.index\.json"):
        Checkpoint.open(tmp_path)


def test_a_file_that_shrinks_while_it_is_read_is_noticed(tmp_path):
    folder = folder_with(tmp_path / "m", {"x": torch.zeros(100_000)})
    with Checkpoint.open(folder) as checkpoint:
        os.truncate(folder / "model.safetensors", 1000)
        with pytest.raises(SourceError, match="ends inside tensor x"):
            checkpoint.read("x")
        with pytest.raises(SourceError, match="ends inside tensor x"):
            checkpoint.read_into(np.empty(400_000, np.uint8), "x", 0)
