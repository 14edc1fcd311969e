"""The header of one safetensors file: eight bytes of length, then JSON that says where each tensor lies.

    +-------------+------------------------------------+--------------------------------+
    | n, u64 LE   | n bytes of JSON, padded by spaces  | tensors, end to end, no holes  |
    +-------------+------------------------------------+--------------------------------+

A file may come from anyone, so nothing the header says is believed before it is checked against the file's size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from normswap.checkpoint.documents import load_json
from normswap.errors import SourceError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}

LENGTH_BYTES = 8
# The limit of the safetensors library itself: a longer header could not be loaded by anyone.
MAX_HEADER_BYTES = 100_000_000
ALIGNMENT = 8
#: what torch can have: axes of a tensor, and sizes along one
MAX_AXES, MAX_SIZE = 64, 2**63 - 1

MAX_NAME = 1000

AGAIN = "fetch the file again, or save the model again with save_pretrained"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as its file's header describes it.

    Attributes:
        key: its name in the file.
        dtype, shape: as stored.
        nbytes: size of its data in bytes.
        shard: name of the shard it lies in.
        offset: where its data starts, in bytes from the start of that shard's file.
        strides: in elements, of a tensor that does not lie there row after row (pickled views); None: it does.
    """

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    shard: str
    offset: int
    strides: tuple[int, ...] | None = None


def nbytes_of(dtype: torch.dtype, shape: Iterable[int]) -> int:
    """Bytes that a dense tensor of this dtype and shape takes."""
    return math.prod(shape) * dtype.itemsize


def read_header(file: BinaryIO, path: Path) -> tuple[list[TensorInfo], dict[str, str] | None]:
    """The tensors of an open safetensors file in data order, and its `__metadata__` (None: it has none).

    Raises:
        SourceError: the header is malformed or does not agree with the file; names the file and the tensor.
    """
    size = file.seek(0, 2)
    file.seek(0)
    length = int.from_bytes(file.read(LENGTH_BYTES), "little")
    room = size - LENGTH_BYTES
    if room < 2 or not 2 <= length <= min(room, MAX_HEADER_BYTES):
        raise SourceError(
            f"{path}: expected a safetensors file, whose first {LENGTH_BYTES} bytes give a header length between 2 and "
            f"{max(2, min(room, MAX_HEADER_BYTES))} bytes; found {length} in a file of {size} bytes. The file is cut "
            f"off or of another format: {AGAIN}."
        )
    header = _parse(file.read(length), path)
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not _is_text_map(metadata):
        raise SourceError(f"{path}: expected __metadata__ to map text to text, found {metadata!r:.200}; {AGAIN}.")
    start = LENGTH_BYTES + length
    entries = sorted((_entry(key, value, start, path) for key, value in header.items()), key=_data_order)
    end = start
    for entry in entries:
        if entry.offset != end:
            raise SourceError(
                f"{path}: tensor {entry.key} should start at byte {end}, where the tensor before it ends, but its "
                f"data_offsets start at byte {entry.offset}: tensors overlap or leave a hole; {AGAIN}."
            )
        end += entry.nbytes
    if end != size:
        raise SourceError(f"{path}: the header describes {end} bytes, the file has {size}. It is damaged; {AGAIN}.")
    return entries, metadata


def render_header(
    entries: Iterable[tuple[str, torch.dtype, tuple[int, ...]]],
    metadata: dict[str, str] | None,
    align: int = ALIGNMENT,
    phase: int = 0,
) -> bytes:
    """The bytes that precede the data of `(key, dtype, shape)` tensors laid end to end, as the library writes them.

    They are as many as are needed for the data to begin at `phase`, modulo `align` (bytes; the library's is 8).
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for key, dtype, shape in entries:
        begin, end = end, end + nbytes_of(dtype, shape)
        header[key] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * ((phase - LENGTH_BYTES - len(text)) % align)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def _parse(text: bytes, path: Path) -> dict[str, Any]:
    try:
        header = load_json(text)
    except ValueError as error:
        raise SourceError(f"{path}: the safetensors header is no valid JSON ({error}); {AGAIN}.") from error
    if not isinstance(header, dict):
        raise SourceError(f"{path}: expected the header to be a JSON object, found {type(header).__name__}; {AGAIN}.")
    return header


def _entry(key: str, value: Any, start: int, path: Path) -> TensorInfo:
    fields = {"dtype", "shape", "data_offsets"}
    check_key(key, path)
    if not isinstance(value, dict) or value.keys() != fields:
        raise SourceError(f"{path}: tensor {key}: expected the fields {sorted(fields)}, found {value!r:.200}; {AGAIN}.")
    code, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise SourceError(
            f"{path}: tensor {key}: expected a dtype among {', '.join(DTYPES)}, found {code!r:.60}; save the model "
            "again in one of these."
        )
    if not _are_sizes(shape):
        raise SourceError(f"{path}: tensor {key}: expected a shape of sizes >= 0, found {shape!r:.200}; {AGAIN}.")
    if not (_are_sizes(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]):
        raise SourceError(f"{path}: tensor {key}: expected data_offsets [begin, end], found {offsets!r:.200}; {AGAIN}.")
    dtype, found = DTYPES[code], offsets[1] - offsets[0]
    if found != (expected := nbytes_of(dtype, shape)):
        raise SourceError(
            f"{path}: tensor {key}: {code} of shape {shape} takes {expected} bytes, but its data_offsets {offsets} "
            f"hold {found}; {AGAIN}."
        )
    return TensorInfo(key, dtype, tuple(shape), found, path.name, start + offsets[0])


def check_key(key: str, path: Path) -> None:
    """Refuse a tensor's name that a terminal, or a file in UTF-8, would not show as it is, or that none would have."""
    if not key.isprintable() or len(key) > MAX_NAME:
        raise SourceError(
            f"{path}: expected names of tensors that can be printed, of at most {MAX_NAME} characters, found "
            f"{ascii(key):.200}; rename it, or {AGAIN}."
        )


def _data_order(entry: TensorInfo) -> tuple[int, int]:
    # An empty tensor shares its offset with the one after it and has to come first for the data to lie end to end.
    return entry.offset, entry.nbytes


def _are_sizes(value: Any) -> bool:
    # `True` is an int to Python, but no size.
    return (
        isinstance(value, list) and len(value) <= MAX_AXES and all(type(n) is int and 0 <= n <= MAX_SIZE for n in value)
    )


def _is_text_map(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(v, str) for v in value.values())
