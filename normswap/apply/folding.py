"""Module paths that differ only in layer numbers, written as one: `h.0.ln`, `h.1.ln` -> `h.*.ln`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import TypeVar

V = TypeVar("V")


def expand(pattern: str, paths: Iterable[str]) -> set[str]:
    """The `paths` that `pattern` names; each `*` in it stands for one number."""
    regex = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
    return {path for path in paths if regex.fullmatch(path)}


def fold(values: Mapping[str, V], paths: Iterable[str]) -> dict[str, V]:
    """`values` by pattern instead of by path, with as few patterns as a star per number allows.

    A pattern is used only where it names nothing else among `paths`, all modules of the model: what `expand` gives for
    the keys of the result is exactly the keys of `values`. The order of `values` is kept.
    """
    paths = list(paths)
    folded: dict[str, V] = {}
    covered: set[str] = set()
    for path, value in values.items():
        if path in covered:
            continue
        same = {other for other, its_value in values.items() if its_value == value}
        pattern, named = next((p, n) for p in _patterns(path) if (n := expand(p, paths) | {path}) <= same)
        folded[pattern] = value
        covered |= named
    return folded


def _patterns(path: str) -> Iterable[str]:
    """`path` with stars for its numbers: for all of them first, for fewer after, for none last."""
    parts = path.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    for count in range(len(numbers), -1, -1):
        for starred in combinations(numbers, count):
            yield ".".join("*" if i in starred else part for i, part in enumerate(parts))
