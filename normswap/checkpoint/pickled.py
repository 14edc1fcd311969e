"""Checkpoints of `torch.save`: which tensors a file holds, and where in it their numbers lie. Nothing is run.

Since torch 1.6 a file is a zip archive, not compressed, of the pickle of a state dict and of each storage's bytes.
Before, it was five pickles, one after another, and then the storages, each behind its length. Either way a tensor is a
range of the file, which is read or copied as that of a safetensors file is.
"""

from __future__ import annotations

import io
import math
import sys
import zipfile
from pathlib import Path
from typing import BinaryIO

from normswap.checkpoint.header import CODES, TensorInfo, check_key, nbytes_of
from normswap.checkpoint.statedict import NoStateDict, Storage, Stored, run, tensors_in
from normswap.errors import SourceError

MAX_PICKLE_BYTES = 64_000_000
#: of an archive's list of contents
MAX_DIRECTORY_BYTES = 32_000_000
_LOCAL_HEADER, _NAMES_AT = 30, 26
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001

AGAIN = (
    "If you trust it, load it with transformers and save it again with save_pretrained, which writes safetensors; else "
    "get the checkpoint from somewhere else"
)
Places = dict[str, tuple[int, int]]


def read_pickled(file: BinaryIO, path: Path, shard: str) -> list[TensorInfo]:
    """The tensors of an open file that `torch.save` wrote.

    Args:
        file: open for reading.
        path: its name, for messages.
        shard: the shard that the tensors are said to lie in.

    Raises:
        SourceError: it is no such file, its pickle asks for anything but tensors, or they are not all in the file.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    start = file.read(4)
    file.seek(0)
    try:
        stored, places = _archive(file, size) if start == b"PK\x03\x04" else _legacy(file, size)
        return [_info(key, tensor, places, shard, path) for key, tensor in stored.items()]
    except NoStateDict as error:
        raise SourceError(f"{path}: expected a state dict that torch.save wrote: {error}. {AGAIN}.") from error


def _info(key: str, tensor: Stored, places: Places, shard: str, path: Path) -> TensorInfo:
    check_key(key, path)
    storage, dtype = tensor.storage, tensor.dtype
    where = f"tensor {key}"
    if dtype not in CODES:
        raise NoStateDict(f"{where} is {dtype}, which safetensors cannot hold")
    if storage.key not in places:
        raise NoStateDict(f"{where} lies in a storage {ascii(storage.key):.60} that the file does not have")
    begin, there = places[storage.key]
    if (said := nbytes_of(storage.dtype, (storage.numel,))) != there:
        raise NoStateDict(f"{where}: its storage is said to have {said} bytes, and has {there}")
    count = math.prod(tensor.shape)
    span = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True)) if count else 0
    if (tensor.offset + span) * dtype.itemsize > there:
        raise NoStateDict(f"{where} of shape {tensor.shape} reaches beyond its storage of {there} bytes")
    if count > span:
        raise NoStateDict(f"{where} of shape {tensor.shape} repeats the values that it has")
    strides = None if count < 2 or _in_rows(tensor) else tensor.strides
    return TensorInfo(
        key, dtype, tensor.shape, count * dtype.itemsize, shard, begin + tensor.offset * dtype.itemsize, strides
    )


def _in_rows(tensor: Stored) -> bool:
    """Whether the last index runs fastest and nothing is left out; strides along axes of one entry say nothing."""
    step = 1
    for n, stride in reversed(list(zip(tensor.shape, tensor.strides, strict=True))):
        if n != 1 and stride != step:
            return False
        step *= n
    return True


class _Bounded:
    """A file of which nothing is read in one piece that is longer than an archive's list of contents may be."""

    def __init__(self, file: BinaryIO):
        self.seek, self.tell, self._read = file.seek, file.tell, file.read

    def seekable(self) -> bool:
        return True

    def read(self, count: int = -1) -> bytes:
        data = self._read(count if 0 <= count <= MAX_DIRECTORY_BYTES else MAX_DIRECTORY_BYTES + 1)
        if len(data) > MAX_DIRECTORY_BYTES:
            raise NoStateDict(f"its list of contents is longer than {MAX_DIRECTORY_BYTES} bytes")
        return data


def _archive(file: BinaryIO, size: int) -> tuple[dict[str, Stored], Places]:
    try:
        entries = zipfile.ZipFile(_Bounded(file)).infolist()
    except NoStateDict:
        raise
    except Exception as error:  # of a hostile archive `zipfile` raises what comes up
        raise NoStateDict(f"it is no whole zip archive ({type(error).__name__}: {error})") from error
    places: Places = {}
    for entry in entries:
        if entry.filename in places:
            raise NoStateDict(f"its archive has {ascii(entry.filename):.200} twice")
        places[entry.filename] = _place(file, entry, size)
    pickles = [name for name in places if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise NoStateDict("it is a zip archive without one data.pkl, in one folder")
    prefix = pickles[0].removesuffix("data.pkl")
    if f"{prefix}constants.pkl" in places:
        raise NoStateDict("it is a TorchScript program")
    order = _content(file, places.get(f"{prefix}byteorder"))
    if order not in (b"", sys.byteorder.encode()):
        raise NoStateDict(f"its numbers are in the byte order {ascii(order):.40}, here they are {sys.byteorder}")
    stored = tensors_in(io.BytesIO(_content(file, places[pickles[0]])))
    inside = f"{prefix}data/"
    return stored, {n.removeprefix(inside): place for n, place in places.items() if n.startswith(inside)}


def _place(file: BinaryIO, entry: zipfile.ZipInfo, size: int) -> tuple[int, int]:
    """Where the bytes of an archive's entry begin, and how many there are."""
    name = ascii(entry.filename)[:200]
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
        raise NoStateDict(f"{name} is compressed or encrypted in its archive, which torch.save does not do")
    file.seek(max(entry.header_offset, 0))
    head = file.read(_LOCAL_HEADER)
    if entry.header_offset < 0 or len(head) < _LOCAL_HEADER or head[:4] != b"PK\x03\x04":
        raise NoStateDict(f"its archive has no {name} where it says")
    lengths = (int.from_bytes(head[at : at + 2], "little") for at in (_NAMES_AT, _NAMES_AT + 2))
    begin = entry.header_offset + _LOCAL_HEADER + sum(lengths)
    if begin + entry.file_size > size:
        raise NoStateDict(f"{name} of its archive reaches beyond the end of the file")
    return begin, entry.file_size


def _content(file: BinaryIO, place: tuple[int, int] | None) -> bytes:
    begin, count = place or (0, 0)
    if count > MAX_PICKLE_BYTES:
        raise NoStateDict(f"its pickle is longer than {MAX_PICKLE_BYTES} bytes")
    file.seek(begin)
    return file.read(count)


def _legacy(file: BinaryIO, size: int) -> tuple[dict[str, Stored], Places]:
    text = io.BytesIO(file.read(min(size, MAX_PICKLE_BYTES)))
    try:
        begins = run(text) == _MAGIC and run(text) == _PROTOCOL
    except NoStateDict:
        begins = False
    if not begins:
        raise NoStateDict("it does not begin as one")
    system = run(text)
    if not isinstance(system, dict) or system.get("little_endian") is not (sys.byteorder == "little"):
        raise NoStateDict("its numbers are in another byte order than this machine's")
    stored = tensors_in(text)
    keys = run(text)
    storages: dict[str, Storage] = {tensor.storage.key: tensor.storage for tensor in stored.values()}
    texts = keys if isinstance(keys, list) and all(isinstance(key, str) for key in keys) else []
    if set(texts) != storages.keys() or len(texts) != len(storages):
        raise NoStateDict("its list of storages is not that of its tensors")
    places, at = {}, text.tell()
    for key in texts:
        file.seek(at)
        numel, begin = int.from_bytes(file.read(8), "little"), at + 8
        at = begin + nbytes_of(storages[key].dtype, (numel,))
        if at > size:
            raise NoStateDict(f"its storage {ascii(key):.60} reaches beyond the end of the file")
        places[key] = begin, at - begin
    return stored, places
