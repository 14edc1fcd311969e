"""A local checkpoint folder: which tensors it holds and where, from headers alone, and reads of single tensors.

Weights are safetensors, or what torch.save wrote. Both say where in the file each tensor lies; nothing else differs.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch

from normswap.checkpoint.blocks import Blocks
from normswap.checkpoint.direct import AT_ONCE
from normswap.checkpoint.documents import shown
from normswap.checkpoint.folder import check_inside
from normswap.checkpoint.header import CODES, TensorInfo, read_header
from normswap.checkpoint.pickled import read_pickled
from normswap.checkpoint.sharing import can_share
from normswap.checkpoint.weights import CONFIG, INDEX, WEIGHTS, find_weights, has_weights
from normswap.errors import SourceError
from normswap.pages import huge

__all__ = ["CONFIG", "INDEX", "WEIGHTS", "Checkpoint", "Shard", "has_weights"]

# Bytes from which memory for a read is worth pages of its own.
_LARGE = 4 * 2**20


@dataclass(frozen=True)
class Shard:
    """One file of weights.

    Attributes:
        name: what it is called as safetensors: its own name, or, of what torch.save wrote, the one that it gets.
        tensors: in data order; of what torch.save wrote, as listed there.
        metadata: its `__metadata__` (None: it has none).
        file: its own name.
    """

    name: str
    tensors: tuple[TensorInfo, ...]
    metadata: dict[str, str] | None
    file: str


class Place(NamedTuple):
    """An open file, and an offset in it (bytes)."""

    fd: int
    offset: int


class Checkpoint:
    """A checkpoint folder opened for reading; use as a context manager. The files are never written to.

    Every file stays open from `open` on, so what is read later is what was checked, even when a name is replaced.

    Attributes:
        folder: where it is.
        shards: the files that hold weights, in the order of their names.
        tensors: every tensor by key.
        index: the parsed index, None when one file holds everything.
        read_files: names of the files that hold weights, and of their index.
    """

    def __init__(
        self,
        folder: Path,
        shards: list[Shard],
        index: dict[str, Any] | None,
        files: dict[str, BinaryIO],
        index_file: str | None = None,
    ):
        self.folder = folder
        self.shards = shards
        self.index = index
        self.read_files = frozenset(shard.file for shard in shards) | ({index_file} - {None})
        self.tensors: dict[str, TensorInfo] = {info.key: info for shard in shards for info in shard.tensors}
        self._files = files
        self._blocks = Blocks()

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Open a folder with `config.json` and safetensors weights, reading and checking the headers only.

        Raises:
            SourceError: something is missing, malformed, or two files disagree.
        """
        folder = Path(folder)
        found = find_weights(folder)
        shards: list[Shard] = []
        files: dict[str, BinaryIO] = {}
        with ExitStack() as opened:
            for own, name in zip(found.files, found.names, strict=True):
                path = folder / own
                try:
                    check_inside(folder, path)
                    files[name] = opened.enter_context(path.open("rb"))
                    shards.append(_shard(files[name], path, name, found.pickled))
                except OSError as error:
                    raise SourceError(_unreadable(path, error, found.index_file)) from error
            _check_unique(folder, shards)
            if found.index is not None:
                _check_index(folder / found.index_file, found.index["weight_map"], shards)
            opened.pop_all()
        return cls(folder, shards, found.index, files, found.index_file)

    def read(self, key: str, rows: range | None = None) -> torch.Tensor:
        """One tensor as stored, or some `rows` of it (of its first axis), in memory of its own."""
        info = self.tensors[key]
        shape = info.shape if rows is None else (len(rows), *info.shape[1:])
        if info.strides is None:
            begin = 0 if rows is None else rows.start * math.prod(info.shape[1:])
            return self._numbers(info, begin, math.prod(shape)).reshape(shape)
        begin = 0 if rows is None else rows.start * info.strides[0]
        span = 1 + sum((n - 1) * stride for n, stride in zip(shape, info.strides, strict=True))
        return self._numbers(info, begin, span).as_strided(shape, info.strides).contiguous()

    def _numbers(self, info: TensorInfo, begin: int, count: int) -> torch.Tensor:
        """As many numbers of the file as `count`, from `begin` numbers behind where a tensor begins."""
        size, start = count * info.dtype.itemsize, info.offset + begin * info.dtype.itemsize
        data = torch.from_numpy(huge(size)) if size >= _LARGE else torch.empty(size, dtype=torch.uint8)
        self._read_into(data.numpy(), info, start)
        return data.view(info.dtype)

    def place(self, key: str) -> Place | None:
        """Where a tensor's bytes lie, row after row; None: they do not lie so."""
        info = self.tensors[key]
        return Place(self._files[info.shard].fileno(), info.offset) if info.strides is None else None

    def read_into(self, view: np.ndarray, key: str, first: int) -> None:
        """Fill `view` with a tensor's bytes, row after row, from its `first` (bytes) on."""
        info = self.tensors[key]
        if info.strides is None:
            self._read_into(view, info, info.offset + first)
            return
        row = info.nbytes // info.shape[0]
        rows = range(first // row, -(-(first + len(view)) // row))
        data = self.read(key, rows).reshape(-1).view(torch.uint8).numpy()
        np.copyto(view, data[first - rows.start * row :][: len(view)])

    def _read_into(self, view: np.ndarray, info: TensorInfo, start: int) -> None:
        with _readable(self._path(info.shard)):
            read = self._blocks.read_into(view, self._files[info.shard].fileno(), start)
        if read < len(view):
            raise self._shrunk(info)

    def fingerprint(self) -> str:
        """SHA-256 over every tensor's key, dtype and shape, whatever file it lies in; reads no weights."""
        described = sorted((info.key, CODES[info.dtype], info.shape) for info in self.tensors.values())
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()

    def can_share(self, folder: Path) -> bool:
        """Whether files in `folder` can share blocks with those that hold the weights."""
        return can_share(self._files[self.shards[0].name].fileno(), folder)

    def hash_files(self, workers: int) -> dict[str, str]:
        """SHA-256 of every file with weights, by its name; reads all of them, several at a time."""
        with ThreadPoolExecutor(workers) as pool:
            hashes = pool.map(self.hash_file, [shard.name for shard in self.shards])
            return dict(zip((shard.file for shard in self.shards), hashes, strict=True))

    def hash_file(self, shard: str) -> str:
        """SHA-256 of a shard's file; reads all of it."""
        fd, view, start = self._files[shard].fileno(), huge(AT_ONCE), 0
        digest = hashlib.sha256()
        with _readable(self._path(shard)):
            while count := self._blocks.read_into(view, fd, start):
                digest.update(view[:count])
                start += count
        return digest.hexdigest()

    def states(self) -> dict[str, list[int]]:
        """What tells whether a shard's file was written to since: its size, and when it last changed (ns)."""
        found = {name: os.fstat(file.fileno()) for name, file in self._files.items()}
        return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in found.items()}

    def _path(self, shard: str) -> Path:
        return self.folder / next(one.file for one in self.shards if one.name == shard)

    @contextmanager
    def keeping(self, size: int) -> Iterator[None]:
        """Within, so many bytes of what was read last stay in memory, if they came from the disk."""
        with self._blocks.keeping(size // AT_ONCE):
            yield

    def close(self) -> None:
        self._blocks.close()
        for file in self._files.values():
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _shrunk(self, info: TensorInfo) -> SourceError:
        return SourceError(
            f"{self._path(info.shard)}: the file ends inside tensor {info.key}, which was not so when it was opened. "
            "Something else is writing to it: wait for that to end and run again."
        )


def _shard(file: BinaryIO, path: Path, name: str, pickled: bool) -> Shard:
    if pickled:
        # the mark that transformers looks for in safetensors
        return Shard(name, tuple(read_pickled(file, path, name)), {"format": "pt"}, path.name)
    tensors, metadata = read_header(file, path)
    return Shard(name, tuple(tensors), metadata, path.name)


def _check_unique(folder: Path, shards: list[Shard]) -> None:
    seen: dict[str, str] = {}
    for shard in shards:
        for info in shard.tensors:
            if info.key in seen:
                raise SourceError(
                    f"{folder}: expected each tensor once, found {info.key} in both {seen[info.key]} and {shard.file}; "
                    "save the model again with save_pretrained."
                )
            seen[info.key] = shard.file


def _check_index(path: Path, weight_map: dict[str, str], shards: list[Shard]) -> None:
    stored = {info.key: shard.file for shard in shards for info in shard.tensors}
    for key in sorted(weight_map.keys() | stored.keys()):
        if weight_map.get(key) != stored.get(key):
            raise SourceError(
                f"{path}: tensor {shown(key)}: the index says {weight_map.get(key, 'nothing')}, the files' headers "
                f"say {stored.get(key, 'nothing')}. The index and the shards are of different saves: fetch both again."
            )


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}. Is the disk sound? Fetch it again.") from error


def _unreadable(path: Path, error: OSError, index_file: str | None) -> str:
    named = f"named by {index_file}, " if index_file else ""
    return f"{path}: {named}cannot be read: {error.strerror}. Fetch the checkpoint again, with all its files."
