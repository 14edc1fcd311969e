"""A local checkpoint folder: which tensors it holds and where, from headers alone, and reads of single tensors."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from normswap.checkpoint.hashing import hash_from
from normswap.checkpoint.header import CODES, TensorInfo, nbytes_of, read_header, unique_keys
from normswap.errors import SourceError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"

CHUNK = 16 * 2**20
# What a kernel or file system answers when it cannot copy between these two files itself.
_NO_KERNEL_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its name, its tensors in data order, its `__metadata__` (None: it has none)."""

    name: str
    tensors: tuple[TensorInfo, ...]
    metadata: dict[str, str] | None


class Checkpoint:
    """A checkpoint folder opened for reading; use as a context manager. The files are never written to.

    Every file stays open from `open` on, so what is read later is what was checked, even when a name is replaced.

    Attributes:
        folder: where it is.
        shards: the files that hold weights, in the order of their names.
        tensors: every tensor by key.
        index: the parsed `model.safetensors.index.json`, None when one file holds everything.
    """

    def __init__(self, folder: Path, shards: list[Shard], index: dict[str, Any] | None, files: dict[str, BinaryIO]):
        self.folder = folder
        self.shards = shards
        self.index = index
        self.tensors: dict[str, TensorInfo] = {info.key: info for shard in shards for info in shard.tensors}
        self._files = files

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Open a folder with `config.json` and safetensors weights, reading and checking the headers only.

        Raises:
            SourceError: something is missing, malformed, or two files disagree.
        """
        folder = Path(folder)
        names, index = _weight_files(folder)
        shards: list[Shard] = []
        files: dict[str, BinaryIO] = {}
        with ExitStack() as opened:
            for name in names:
                path = folder / name
                try:
                    files[name] = opened.enter_context(path.open("rb"))
                    shards.append(Shard(name, *_header(files[name], path)))
                except OSError as error:
                    raise SourceError(_unreadable(path, error, index is not None)) from error
            _check_unique(folder, shards)
            if index is not None:
                _check_index(folder / INDEX, index["weight_map"], shards)
            opened.pop_all()
        return cls(folder, shards, index, files)

    def read(self, key: str, rows: range | None = None) -> torch.Tensor:
        """One tensor as stored, or some `rows` of it (of its first axis), in memory of its own."""
        info = self.tensors[key]
        shape = info.shape if rows is None else (len(rows), *info.shape[1:])
        begin = 0 if rows is None else rows.start * (info.nbytes // info.shape[0])
        data = torch.empty(nbytes_of(info.dtype, shape), dtype=torch.uint8)
        view, done = memoryview(data.numpy()), 0
        while done < len(view):
            # One call reads at most 2 GiB.
            with _readable(self.folder / info.shard):
                count = os.preadv(self._files[info.shard].fileno(), [view[done:]], info.offset + begin + done)
            if count == 0:
                raise self._shrunk(info)
            done += count
        return data.view(info.dtype).reshape(shape)

    def copy_bytes(self, key: str, out: int, offset: int, span: range | None = None) -> None:
        """Copy a tensor's bytes to `offset` (bytes) of the open file `out`, inside the kernel where it can do so.

        Args:
            span: which of its bytes; `offset` is where the first of these goes.
        """
        info = self.tensors[key]
        first, size = (0, info.nbytes) if span is None else (span.start, len(span))
        fd, done, in_kernel = self._files[info.shard].fileno(), 0, True
        while done < size:
            begin, want = info.offset + first + done, min(size - done, CHUNK)
            if in_kernel:
                try:
                    count = os.copy_file_range(fd, out, want, begin, offset + done)
                except OSError as error:
                    if error.errno not in _NO_KERNEL_COPY:
                        raise
                    count = 0
                # Some network file systems answer 0 instead of an error, so 0 too means: not by the kernel.
                in_kernel = count > 0
            else:
                count = os.pwrite(out, os.pread(fd, want, begin), offset + done)
                if count == 0:
                    raise self._shrunk(info)
            done += count

    def fingerprint(self) -> str:
        """SHA-256 over every tensor's key, dtype and shape, whatever file it lies in; reads no weights."""
        described = sorted((info.key, CODES[info.dtype], info.shape) for info in self.tensors.values())
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()

    def hash_file(self, shard: str, stopped: Callable[[], bool] = lambda: False) -> str:
        """SHA-256 of a shard's file; reads all of it, or until `stopped`."""
        fd = self._files[shard].fileno()
        size = os.fstat(fd).st_size
        ends = (min(end, size) for end in range(CHUNK, size + CHUNK, CHUNK))
        with _readable(self.folder / shard):
            return hash_from(fd, takewhile(lambda _: not stopped(), ends))

    def states(self) -> dict[str, list[int]]:
        """What tells whether a shard's file was written to since: its size, and when it last changed (ns)."""
        found = {name: os.fstat(file.fileno()) for name, file in self._files.items()}
        return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in found.items()}

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _shrunk(self, info: TensorInfo) -> SourceError:
        return SourceError(
            f"{self.folder / info.shard}: the file ends inside tensor {info.key}, which was not so when it was opened. "
            "Something else is writing to it: wait for that to end and run again."
        )


def _weight_files(folder: Path) -> tuple[list[str], dict[str, Any] | None]:
    """Names of the files with weights and the index, looked for in the order `from_pretrained` looks."""
    if not folder.is_dir():
        raise SourceError(f"{folder}: expected a folder with {CONFIG} and {WEIGHTS}; there is no such folder.")
    if not (folder / CONFIG).is_file():
        raise SourceError(f"{folder}: expected {CONFIG}, found none; give the folder that save_pretrained wrote.")
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS], None
    if (folder / INDEX).is_file():
        index = _read_index(folder / INDEX)
        return sorted(set(index["weight_map"].values())), index
    others = sorted(path.name for path in folder.iterdir() if path.suffix in {".bin", ".safetensors", ".pt", ".pth"})
    raise SourceError(
        f"{folder}: expected {WEIGHTS} or {INDEX}, found {', '.join(others[:8]) or 'no weights'}. If transformers "
        "loads this folder, save it again as safetensors: AutoModelForCausalLM.from_pretrained(folder)"
        ".save_pretrained(new_folder), with the Auto class of the model's task."
    )


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads(path.read_bytes(), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: the index is no valid JSON ({error}); fetch it again.") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{path}: expected weight_map, from tensor to file name; found none. Fetch the index again.")
    if not isinstance(index.get("metadata", {}), dict):
        raise SourceError(f"{path}: expected metadata to be an object, found {index['metadata']!r:.80}.")
    for key, name in weight_map.items():
        # A name with a folder in it could lead out of the checkpoint, and out of the destination when it is written.
        if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", "..") or "\0" in name:
            raise SourceError(
                f"{path}: tensor {key}: expected the name of a file in {path.parent}, found {name!r:.200}. "
                "Put all shards beside the index and name them without folders."
            )
    return index


def _header(file: BinaryIO, path: Path) -> tuple[tuple[TensorInfo, ...], dict[str, str] | None]:
    tensors, metadata = read_header(file, path)
    return tuple(tensors), metadata


def _check_unique(folder: Path, shards: list[Shard]) -> None:
    seen: dict[str, str] = {}
    for shard in shards:
        for info in shard.tensors:
            if info.key in seen:
                raise SourceError(
                    f"{folder}: expected each tensor once, found {info.key} in both {seen[info.key]} and {shard.name}; "
                    "save the model again with save_pretrained."
                )
            seen[info.key] = shard.name


def _check_index(path: Path, weight_map: dict[str, str], shards: list[Shard]) -> None:
    stored = {info.key: shard.name for shard in shards for info in shard.tensors}
    for key in sorted(weight_map.keys() | stored.keys()):
        if weight_map.get(key) != stored.get(key):
            raise SourceError(
                f"{path}: tensor {key}: the index says {weight_map.get(key, 'nothing')}, the files' headers say "
                f"{stored.get(key, 'nothing')}. The index and the shards are of different saves: fetch both again."
            )


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}. Is the disk sound? Fetch it again.") from error


def _unreadable(path: Path, error: OSError, sharded: bool) -> str:
    named = f"named by {INDEX}, " if sharded else ""
    return f"{path}: {named}cannot be read: {error.strerror}. Fetch the checkpoint again, with all its files."
