"""Ways to spoil a file: bytes at random, and JSON by its structure, so that what is wrong lies deep inside.

All choices come from one `random.Random`, so that a seed is a case, and hypothesis can give one that it shrinks.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from random import Random
from typing import Any

_NUMBERS = [0, 1, -1, 2, 7, 255, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**9, 10**15, 10**30]
_VALUES: list[Any] = [
    *_NUMBERS,
    *(-n for n in _NUMBERS),
    *(0.0, 0.5, -1e-9, 1e308, float("inf"), float("nan")),
    *(None, True, False, [], {}, [[]], [None], {"": None}, [0] * 70, list(range(300))),
    *("", "a", "\x1b[31m\x07", "\u202e", "\ud800", "a\nb", "../../etc/passwd", "/etc/passwd", "x" * 5000, "0", "inf"),
    *("__class__", "forward", "save_pretrained", "org/kernel", "os.system", "{}", "%s", "model.safetensors", "é" * 99),
]
_WORDS = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]


def spoil_bytes(data: bytes, random: Random) -> bytes:
    """The data with one to four changes at random places."""
    changed = bytearray(data)
    for _ in range(random.randint(1, 4)):
        at = random.randrange(len(changed) + 1)
        size = random.choice([1, 2, 4, 8])
        match random.randrange(8):
            case 0:
                changed[at : at + 1] = bytes([random.randrange(256)])
            case 1:
                changed[at : at + size] = (random.choice(_WORDS) % 256**size).to_bytes(size, "little")
            case 2:
                changed[at:at] = bytes(random.randrange(256) for _ in range(random.randrange(1, 20)))
            case 3:
                del changed[at : at + random.randrange(1, 40)]
            case 4:
                changed[at:at] = changed[at : at + random.randrange(1, 200)]
            case 5:
                del changed[at:]
            case 6:
                other = random.randrange(len(changed) + 1)
                changed[at : at + 16] = changed[other : other + 16]
            case _:
                if at < len(changed):
                    changed[at] ^= 1 << random.randrange(8)
    return bytes(changed)


def spoil_json(text: bytes, random: Random) -> bytes:
    """The document with one to three of its values, names or entries changed; now and then its bytes."""
    if random.random() < 0.15:
        return spoil_bytes(text, random)
    document = json.loads(text)
    for _ in range(random.choice([1, 1, 2, 3])):
        _swap(document, random) if random.random() < 0.5 else _change(document, random)
    # a lone half of a character stays as it is written in the escapes
    return json.dumps(document).encode()


def spoil_safetensors(data: bytes, random: Random) -> bytes:
    """The file with its header spoilt as JSON, and the right length in front of it; or any of its bytes."""
    length = int.from_bytes(data[:8], "little")
    if random.random() < 0.35:
        return spoil_bytes(data, random)
    header = spoil_json(data[8 : 8 + length], random)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def spoil_pickled(data: bytes, random: Random) -> bytes:
    """The file with bytes of its pickle spoilt, where its instructions are, or any of its bytes."""
    begin = data.find(b"\x80\x02ccollections")
    if begin < 0 or random.random() < 0.3:
        return spoil_bytes(data, random)
    end = begin + random.choice([200, 2000])
    spoilt = spoil_bytes(data[begin:end], random)
    if random.random() < 0.7:  # everything else where it was
        spoilt = spoilt[: end - begin].ljust(len(data[begin:end]), b"N")
    return data[:begin] + spoilt + data[end:]


def _swap(document: Any, random: Random) -> None:
    """A value becomes another one of its type, of the document where it can: what is checked first is as it was."""
    holder, key = random.choice(_places(document))
    if holder is None:
        return
    kind = type(holder[key])
    alike = [other[name] for other, name in _places(document) if type(other[name]) is kind]
    alike += [value for value in _VALUES if type(value) is kind and random.random() < 0.2]
    holder[key] = copy.deepcopy(random.choice(alike))


def _change(document: Any, random: Random) -> None:
    holder, key = random.choice(_places(document))
    if holder is None:
        return
    match random.randrange(9):
        case 0:
            del holder[key]
        case 1:
            other, name = random.choice(_places(document))
            holder[key] = copy.deepcopy(other[name]) if other is not None else None
        case 2 if isinstance(holder, dict):
            holder[str(random.choice(_VALUES))] = holder.pop(key)
        case 3 if isinstance(holder, list):
            holder.insert(random.randrange(len(holder) + 1), copy.deepcopy(random.choice(holder)))
        case 4 if isinstance(holder[key], int):
            holder[key] += random.choice([-1, 1, 8, -8])
        case 5 if isinstance(holder[key], str):
            holder[key] = spoil_bytes(holder[key].encode(errors="replace"), random).decode("latin-1")
        case 6:
            deep: Any = holder[key]
            for _ in range(random.choice([1, 3, 200, 3000])):
                deep = [deep] if random.random() < 0.5 else {"a": deep}
            try:
                json.dumps(deep)
                holder[key] = deep
            except RecursionError:
                pass
        case _:
            holder[key] = copy.deepcopy(random.choice(_VALUES))


def _places(document: Any) -> list[tuple[Any, Any]]:
    """Every place of a value in the document: what holds it, and under which key."""
    found: list[tuple[Any, Any]] = []
    waiting = [document]
    while waiting:
        holder = waiting.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
        for key in keys:
            found.append((holder, key))
            waiting.append(holder[key])
    return found or [(None, None)]


SPOILERS: dict[str, Callable[[bytes, Random], bytes]] = {
    ".json": spoil_json,
    ".safetensors": spoil_safetensors,
    ".bin": spoil_pickled,
    ".undo": spoil_safetensors,
}
