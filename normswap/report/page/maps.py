"""The norm map as a table."""

from __future__ import annotations

from typing import Any

from normswap.report.findings.model import Findings, SiteForm, SiteRow
from normswap.report.kinds import kind_name
from normswap.report.page.chart import figure

_MOST_READERS = 4


def parts(found: Findings) -> dict[str, Any]:
    """Rows of the map, and what a reader of it should know."""
    notes = dict.fromkeys(note for drawn in (found.before, found.after) if drawn for note in drawn.notes)
    return {
        "map_rows": [
            {
                "shown": row.shown,
                "count": row.count,
                "before": _form(row.before),
                "after": _form(row.after),
                "changed": found.kind != "map" and row.before != row.after,
                "role": row.role,
                "slot": _slot(row, found.kind == "map"),
                "moved": found.kind != "map" and row.slot_before != row.slot_after,
                "width": row.width,
                "read_by": _readers(row.read_by),
                "error": "\u2013" if row.error_max is None else figure(row.error_max),
            }
            for row in found.sites
        ],
        "map_notes": list(notes),
    }


def _form(form: SiteForm | None) -> str:
    """What stands at a site, in words."""
    if form is None:
        return "\u2013"
    held = [
        words
        for words, there in (("gain 1 + w" if form.gain == "1 + w" else "gain", form.gain), ("bias", form.bias))
        if there
    ]
    # neither at the space nor at the minus the number is to break
    eps = f", eps\u00a0{form.eps:g}".replace("-", "\u2011") if form.eps else ""
    return f"{kind_name(form.kind)}, {' and '.join(held) or 'weightless'}{eps}"


def _slot(row: SiteRow, alone: bool) -> str:
    """Where in its block a norm stands, and stood."""
    before, after = row.slot_before or "\u2013", row.slot_after or "\u2013"
    return before if alone or before == after else f"{before} \u2192 {after}"


def _readers(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:_MOST_READERS])
    return f"{shown} and {len(names) - _MOST_READERS} more" if len(names) > _MOST_READERS else shown or "\u2013"
