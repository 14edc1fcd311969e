"""What a pickled state dict is made of: storages and tensors in them, and what the names mean that it may ask for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "UntypedStorage": torch.uint8,
}


class NoStateDict(ValueError):
    """The pickle is not one of tensors by name; the message says what it is or wants."""


@dataclass(frozen=True)
class Storage:
    """A run of numbers in the file: its key there, dtype, and how many."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class Stored:
    """A tensor: which part of a storage it is. Offset and strides in elements."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Kind:
    """A type of storage."""

    dtype: torch.dtype


@dataclass(frozen=True)
class Call:
    """What a function that a pickle may name does here."""

    make: Callable[..., Any]


def _tensor(storage, offset, shape, strides, *rest) -> Stored:
    if not isinstance(storage, Storage) or not all(
        type(n) is int and n >= 0 for n in (offset, *_sizes(shape), *_sizes(strides))
    ):
        raise NoStateDict("it has a tensor that is no part of a storage")
    if len(shape) != len(strides):
        raise NoStateDict(f"it has a tensor with {len(shape)} sizes and {len(strides)} strides")
    return Stored(storage, storage.dtype, offset, tuple(shape), tuple(strides))


def _typed_tensor(storage, offset, shape, strides, requires_grad, hooks, dtype, *rest) -> Stored:
    made = _tensor(storage, offset, shape, strides)
    if not isinstance(dtype, torch.dtype):
        raise NoStateDict("it has a tensor of no dtype")
    return Stored(made.storage, dtype, made.offset, made.shape, made.strides)


def _parameter(data, *rest) -> Stored:
    if not isinstance(data, Stored):
        raise NoStateDict("it has a parameter that is no tensor")
    return data


def _ordered(*entries) -> dict:
    if entries:
        raise NoStateDict("it has a dictionary with entries of its own form")
    return {}


def _sizes(value: Any) -> tuple:
    return value if isinstance(value, tuple) and len(value) <= 64 else (None,)


_GLOBALS = {
    ("collections", "OrderedDict"): Call(_ordered),
    ("torch._utils", "_rebuild_tensor"): Call(_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): Call(_tensor),
    ("torch._utils", "_rebuild_tensor_v3"): Call(_typed_tensor),
    ("torch._utils", "_rebuild_parameter"): Call(_parameter),
    ("torch", "Size"): Call(lambda sizes=(): tuple(sizes)),
    ("torch.storage", "UntypedStorage"): Kind(torch.uint8),
    **{("torch", name): Kind(dtype) for name, dtype in _STORAGES.items()},
}


def meaning(module: str, name: str) -> Any:
    """What stands for a name of a module. Raises NoStateDict for all but those that a state dict takes."""
    if (module, name) in _GLOBALS:
        return _GLOBALS[module, name]
    if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
        return found
    raise NoStateDict(f"it asks for {ascii(f'{module}.{name}'):.200}, which is not among what a state dict takes")
