"""The pickle of a state dict, read by an interpreter of the few instructions that it takes.

A pickle is a program. Python's own `pickle` runs whatever it names, and torch's careful form still makes objects as
large as it asks for. Nothing is run here: a tensor becomes a note of where it lies, and any other name is refused.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

#: instructions; a tensor takes about 30
MAX_STEPS = 4_000_000

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
_MARK = object()


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


def tensors_in(pickled: BinaryIO) -> dict[str, Stored]:
    """The tensors of a state dict, by name, in its order.

    Raises:
        NoStateDict: it names anything but tensors, or holds anything but tensors by name.
    """
    found = run(pickled)
    if not isinstance(found, dict):
        raise NoStateDict(f"expected tensors by name, found a {type(found).__name__}")
    for name, value in found.items():
        if not isinstance(value, Stored):
            raise NoStateDict(f"expected tensors by name, found a {type(value).__name__} under {ascii(name):.200}")
    return found


def run(pickled: BinaryIO) -> Any:
    """The value that one pickle describes; the file stands behind it afterwards. Raises NoStateDict."""
    machine = _Machine()
    try:
        for steps, (code, argument, _) in enumerate(pickletools.genops(pickled)):
            if steps > MAX_STEPS:
                raise NoStateDict(f"it has more than {MAX_STEPS} instructions")
            if code.name == "STOP":
                return machine.stack.pop()
            step = _STEPS.get(code.name)
            if step is None:
                raise NoStateDict(machine.unknown(code.name))
            step(machine, argument)
    except NoStateDict:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise NoStateDict(f"its pickle is damaged ({type(error).__name__}: {error})") from error
    raise NoStateDict("its pickle is cut off")


class _Machine:
    """The stack and the memo of a pickle."""

    def __init__(self):
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def above_mark(self) -> list[Any]:
        """What was pushed since the last mark, taken off with it."""
        for place in range(len(self.stack) - 1, -1, -1):
            if self.stack[place] is _MARK:
                values = self.stack[place + 1 :]
                del self.stack[place:]
                return values
        raise NoStateDict("its pickle is damaged: a mark is missing")

    def take(self, count: int) -> list[Any]:
        """The last `count` values, taken off."""
        if len(self.stack) < count:
            raise NoStateDict("its pickle is damaged: a value is missing")
        values = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return values

    def unknown(self, code: str) -> str:
        """Why an instruction is refused."""
        last = self.stack[-2:]
        if code == "STACK_GLOBAL" and len(last) == 2 and all(isinstance(part, str) for part in last):
            return f"it asks for {ascii('.'.join(last)):.200}, which is not among what a state dict takes"
        return f"it has the instruction {code}, which is not among those that a state dict takes"

    def protocol(self, number: int) -> None:
        if number != 2:
            raise NoStateDict(f"its pickle is of protocol {number}, torch.save and torch.load have 2")

    def name(self, named: str) -> None:
        """What a global name stands for; `named` is the module and the name, with a space between."""
        module, _, name = named.partition(" ")
        found = _GLOBALS.get((module, name))
        if found is None and module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            found = getattr(torch, name)
        if found is None:
            raise NoStateDict(
                f"it asks for {ascii(f'{module}.{name}'):.200}, which is not among what a state dict takes"
            )
        self.push(found)

    def call(self) -> None:
        function, arguments = self.take(2)
        if not isinstance(function, _Call) or not isinstance(arguments, tuple):
            raise NoStateDict(f"it calls a {type(function).__name__}")
        self.push(function.make(*arguments))

    def set_items(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(pairs) % 2:
            raise NoStateDict("its pickle is damaged: entries without a dictionary")
        for name, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not isinstance(name, str):
                raise NoStateDict(f"expected names that are text, found a {type(name).__name__}")
            if name in target:
                raise NoStateDict(f"the name {ascii(name):.200} stands twice")
            target[name] = value

    def append(self, values: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise NoStateDict("its pickle is damaged: items without a list")
        self.stack[-1].extend(values)

    def storage(self) -> None:
        """The storage that a persistent id names: `("storage", its type, key, device, numel)`."""
        (named,) = self.take(1)
        if not isinstance(named, tuple) or len(named) not in (5, 6) or named[0] != "storage" or any(named[5:]):
            raise NoStateDict(f"expected a storage, found {ascii(named):.200}")
        _, kind, key, _, numel = named[:5]
        if not (isinstance(kind, _Kind) and isinstance(key, str) and type(numel) is int and numel >= 0):
            raise NoStateDict(f"expected a storage of numbers, found {ascii(named):.200}")
        self.push(Storage(key, kind.dtype, numel))


@dataclass(frozen=True)
class _Kind:
    """A type of storage."""

    dtype: torch.dtype


@dataclass(frozen=True)
class _Call:
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
    ("collections", "OrderedDict"): _Call(_ordered),
    ("torch._utils", "_rebuild_tensor"): _Call(_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Call(_tensor),
    ("torch._utils", "_rebuild_tensor_v3"): _Call(_typed_tensor),
    ("torch._utils", "_rebuild_parameter"): _Call(_parameter),
    ("torch", "Size"): _Call(lambda sizes=(): tuple(sizes)),
    ("torch.storage", "UntypedStorage"): _Kind(torch.uint8),
    **{("torch", name): _Kind(dtype) for name, dtype in _STORAGES.items()},
}


def _constant(value: Any) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.push(value)


def _argument(machine: _Machine, argument: Any) -> None:
    machine.push(argument)


def _put(machine: _Machine, number: int) -> None:
    machine.memo[number] = machine.stack[-1]


_STEPS: dict[str, Callable[[_Machine, Any], Any]] = {
    "PROTO": lambda machine, number: machine.protocol(number),
    "MARK": _constant(_MARK),
    "NONE": _constant(None),
    "NEWTRUE": _constant(True),
    "NEWFALSE": _constant(False),
    "EMPTY_TUPLE": _constant(()),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"), _argument),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.above_mark())),
    **{f"TUPLE{n}": lambda machine, _, n=n: machine.push(tuple(machine.take(n))) for n in (1, 2, 3)},
    "APPEND": lambda machine, _: machine.append(machine.take(1)),
    "APPENDS": lambda machine, _: machine.append(machine.above_mark()),
    "SETITEM": lambda machine, _: machine.set_items(machine.take(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.above_mark()),
    "GLOBAL": lambda machine, argument: machine.name(argument),
    "REDUCE": lambda machine, _: machine.call(),
    # attributes of a dictionary (which version of each module wrote it): not needed
    "BUILD": lambda machine, _: machine.take(1),
    "BINPERSID": lambda machine, _: machine.storage(),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda machine, number: machine.push(machine.memo[number])),
}
