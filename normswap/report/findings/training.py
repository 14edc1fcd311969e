"""A fine-tune's record as data: scores, and curves that are short enough to be drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from normswap.report.findings.model import Training

#: what is drawn of a log entry
SHOWN = ("eval_mean", "eval_p99.9", "loss", "ramp", "learning_rate", "grad_norm")
# Points that a line is drawn with at most.
_POINTS = 240


def training_of(raw: Mapping[str, Any]) -> Training:
    """`training` of a record."""
    recipe = raw.get("recipe", {})
    objectives = recipe.get("objective") or []
    return Training(
        data=str(raw.get("data", "")),
        objective=" + ".join(f"{o['weight']:g} {o['kind']}" for o in objectives if isinstance(o, Mapping)),
        tokens=raw["tokens"],
        minutes=raw.get("minutes"),
        scores=raw["scores"],
        curves={name: _curves(entries) for name, entries in raw.get("history", {}).items()},
        folded=raw.get("folded"),
        changes=tuple((c["key"], str(c.get("was")), str(c.get("now"))) for c in raw.get("changes", ())),
    )


def _curves(entries: Sequence[Mapping[str, Any]]) -> dict[str, tuple[tuple[float, float], ...]]:
    found = {}
    for key in SHOWN:
        points = [(e["tokens"], e[key]) for e in entries if isinstance(e.get(key), int | float) and "tokens" in e]
        if points:
            found[key] = tuple(_thinned(points))
    return found


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most so many points, each the mean of its neighbours; the last one stays as it is."""
    if len(points) <= _POINTS:
        return points
    size = -(-len(points) // _POINTS)
    parts = [points[i : i + size] for i in range(0, len(points) - 1, size)]
    means = [(p[-1][0], sum(value for _, value in p) / len(p)) for p in parts]
    return [*means, points[-1]]
