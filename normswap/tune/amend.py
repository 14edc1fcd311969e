"""What of a recipe may be another when its run goes on: how it is trained from there on, not what, on what, or in which
steps. Each change is kept, with the step that it counts from, and published with the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from pydantic import BaseModel

#: by the path of a key
MAY_CHANGE = (
    "stages.*.learning_rate",
    "stages.*.warmup",
    "stages.*.schedule",
    "training.learning_rate",
    "training.max_grad_norm",
    # a step has as many rows as before: `folder.begin` sees to that
    "training.per_device_train_batch_size",
    "training.gradient_accumulation_steps",
    "guards.*",
    "dtype",
    "verify",
)


class Change(BaseModel):
    """A key that has another value than before.

    Attributes:
        key: its path.
        was, now: values; None: it was left out.
        since: by run (`healed`, `control`), the optimizer step behind which it counts.
    """

    key: str
    was: Any = None
    now: Any = None
    since: dict[str, int] = {}


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Between two mappings, by the paths of what is in them."""
    a, b = dict(_flat(then)), dict(_flat(now))
    return [Change(key=key, was=a.get(key), now=b.get(key)) for key in (a | b) if a.get(key) != b.get(key)]


def refused(changes: Sequence[Change]) -> list[Change]:
    return [change for change in changes if not any(fnmatchcase(change.key, key) for key in MAY_CHANGE)]


def _flat(value: Any, path: str = ""):
    """`(path, leaf)` of all that is in mappings and lists."""
    parts = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else None
    if not parts:
        yield path, value
        return
    for key, part in parts:
        yield from _flat(part, f"{path}.{key}" if path else str(key))
