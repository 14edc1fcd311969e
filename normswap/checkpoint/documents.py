"""JSON that may come from anyone: read whole or refused, in bounded memory, with no name lost."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

#: bytes of one document; the index of a model of 671B parameters in one tensor per expert has 9 MB
MAX_BYTES = 100_000_000
#: numbers, texts, lists, objects in one; each takes about 100 bytes of memory
MAX_VALUES = 4_000_000


def load_json(text: bytes) -> Any:
    """What a JSON text says, in UTF-8.

    Raises:
        ValueError: it is no JSON, has a name twice in one object, is nested too deep, or says too much.
    """
    # every value but the first stands behind one of these, or in front of it
    values = sum(text.count(sign) for sign in b"[{:,")
    if values > MAX_VALUES:
        raise ValueError(f"it holds about {values} values, more than the {MAX_VALUES} that any model needs")
    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=unique_keys)
        if rb"\ud" in text or rb"\uD" in text:
            json.dumps(found, ensure_ascii=False).encode()  # raises ValueError where half a character stands alone
    except RecursionError as error:
        raise ValueError("lists or objects stand inside each other too deep") from error
    return found


def read_json(path: Path) -> Any:
    """What a JSON file says. Raises ValueError as `load_json`, or because of its size, and OSError."""
    with path.open("rb") as file:
        text = file.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES} bytes, which no document of a model has")
    return load_json(text)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads(object_pairs_hook=...)`: a dict, or ValueError where JSON would silently lose one."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the name {name!r:.200} stands twice")
        found[name] = value
    return found


def check_narrow(values: Iterable[Any], names: int = 64, items: int = 65_536) -> None:
    """Raise ValueError for an object with more names, or a list with more items, than records of one thing have.

    Pydantic notes every one that does not fit, with a kilobyte each.
    """
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if len(value) > names:
                raise ValueError(f"an object has {len(value)} names, expected at most {names}")
            waiting += value.values()
        elif isinstance(value, list):
            if len(value) > items:
                raise ValueError(f"a list has {len(value)} items, expected at most {items}")
            waiting += value


def shown(name: object) -> str:
    """A name from a file, as it may stand in a message: in ASCII, of 200 characters at most."""
    return ascii(name)[1:-1][:200] if isinstance(name, str) else ascii(name)[:200]


def brief(error: Exception | str) -> str:
    """An error of another library in one line, of 500 characters at most."""
    return f"{' '.join(str(error).split()) or type(error).__name__:.500}"
