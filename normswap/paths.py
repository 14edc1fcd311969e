"""Paths of repeated layers, folded for people: `layers.0.norm`, `layers.1.norm` ... become `layers.0-31.norm`."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable

# a number that stands alone between dots: `layers.0.ln_1` holds one
_NUMBER = re.compile(r"(?<!\w)\d+(?!\w)")


def folded(named: Iterable[tuple[str, Hashable]]) -> list[tuple[str, list[str]]]:
    """Paths that differ in numbers only and carry equal values, in the order of their first.

    Args:
        named: `(path, value)`; values are compared.

    Returns:
        `(shown, paths)`: the folded path and those it stands for.
    """
    groups: dict[tuple[str, Hashable], list[str]] = {}
    for path, value in named:
        groups.setdefault((_NUMBER.sub("*", path), value), []).append(path)
    return [(_ranges(paths), paths) for paths in groups.values()]


def blurred(text: str) -> str:
    """`text` with every number replaced, to tell whether two texts differ in layer numbers only."""
    return _NUMBER.sub("*", text)


def _ranges(paths: list[str]) -> str:
    columns = zip(*([int(n) for n in _NUMBER.findall(path)] for path in paths), strict=True)
    shown = iter([_range(sorted(set(column))) for column in columns])
    return _NUMBER.sub(lambda _: next(shown), paths[0])


def _range(numbers: list[int]) -> str:
    """`0-3` for a run, `0-6/2` for even steps, `0,1,5` for a few, else the span with `..`."""
    first, last = numbers[0], numbers[-1]
    steps = {b - a for a, b in zip(numbers, numbers[1:], strict=False)}
    if not steps:
        return str(first)
    if len(steps) == 1:
        step = steps.pop()
        return f"{first}-{last}" if step == 1 else f"{first}-{last}/{step}"
    return ",".join(map(str, numbers)) if len(numbers) <= 4 else f"{first}..{last}"
