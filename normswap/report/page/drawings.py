"""Which layers are drawn: for each stream, one of each kind of layer, before and after side by side."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from normswap.report.findings.model import Findings, Layers, MapDrawing, SlotNorm, StreamDrawing
from normswap.report.kinds import kind_name
from normswap.report.page.block import layer_drawing

# Kinds of layers that are drawn of one stream; Mix-LN has two.
_MOST = 4


def drawings(found: Findings) -> list[dict[str, Any]]:
    """Per stream its name, pairs of drawings, and the norms at its ends."""
    single = found.kind == "map"
    drawn = [part for part in (found.before, found.after) if part is not None]
    names = dict.fromkeys(stream.name for part in drawn for stream in part.streams)
    return [_stream(name, _named(found.before, name), _named(found.after, name), found.kind, single) for name in names]


def any_bare(found: Findings) -> bool:
    """Whether a norm in a slot has neither gain nor bias."""
    drawn = [part for part in (found.before, found.after) if part is not None]
    steps = [step for part in drawn for s in part.streams for layers in s.layers for step in layers.steps]
    return any(norm.weightless for step in steps for norm in (*step.n_in, *step.n_branch, *step.n_out))


def _named(drawn: MapDrawing | None, name: str) -> StreamDrawing | None:
    return next((stream for stream in drawn.streams if stream.name == name), None) if drawn else None


def _stream(name: str, before: StreamDrawing | None, after: StreamDrawing | None, kind: str, single: bool) -> dict:
    pairs = _pairs(before.layers if before else (), after.layers if after else ())
    titles = ("First", "Second") if kind == "comparison" else ("Before", "After")
    sides = [[_side(titles[0], a, b, "not there"), _side(titles[1], b, a, "not there")] for a, b in pairs[:_MOST]]
    if single:
        sides = [[_side("", layers, None, "", alone=True)] for layers in before.layers[:_MOST]]
    left = (len(before.layers) if single else len(pairs)) - _MOST
    return {
        "name": name,
        "width": (before or after).width,
        "pairs": sides,
        "more": f"{left} more kinds of layers are in the map below." if left > 0 else "",
        "ends": _ends(before, after, single),
    }


def _pairs(before: Sequence[Layers], after: Sequence[Layers]) -> list[tuple[Layers | None, Layers | None]]:
    """Kinds of layers that share a layer, each pair once, in the order of the layers."""
    pairs: dict[tuple[int, int], None] = {}
    for i, a in enumerate(before):
        for j, b in enumerate(after):
            if _numbers(a.shown) & _numbers(b.shown) or a.shown == b.shown:
                pairs[i, j] = None
    found = [(before[i], after[j]) for i, j in pairs]
    if not found:
        found = [(a, None) for a in before] + [(None, b) for b in after]
    return found


def _numbers(shown: str) -> set[int]:
    """Layer numbers from `layer 0-3` and its like; of a range whose steps are not told, its ends."""
    found: set[int] = set()
    for first, last, step in re.findall(r"(\d+)(?:-(\d+)(?:/(\d+))?)?", shown):
        found |= set(range(int(first), int(last or first) + 1, int(step or 1)))
    return found


def _side(title: str, layers: Layers | None, other: Layers | None, why: str, alone: bool = False) -> dict[str, Any]:
    if layers is None:
        return {"title": title, "shown": "", "count": 0, "svg": None, "why": why, "placement": ""}
    placements = " \u00b7 ".join(dict.fromkeys(step.placement for step in layers.steps))
    # what stands beside nothing is not marked as changed: there is nothing that it was
    svg = layer_drawing(layers, None if alone else other)
    return {
        "title": title,
        "shown": layers.shown,
        "count": layers.count,
        "svg": svg,
        "why": "",
        "placement": placements,
    }


def _ends(before: StreamDrawing | None, after: StreamDrawing | None, single: bool) -> list[dict[str, Any]]:
    """Norms before the first layer and after the last."""
    rows = []
    for where, slot in (("before the first layer", "embedding"), ("after the last layer", "final")):
        texts = [_words(getattr(stream, slot)) if stream else "nothing known" for stream in (before, after)]
        if texts == ["no norm", "no norm"] or (single and texts[0] == "no norm"):
            continue
        rows.append({"where": where, "before": texts[0], "after": None if single or texts[0] == texts[1] else texts[1]})
    return rows


def _words(norms: Sequence[SlotNorm]) -> str:
    return ", ".join(f"{norm.name} ({kind_name(norm.kind)})" for norm in norms) or "no norm"
