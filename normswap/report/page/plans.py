"""The plan: its edits as the terminal shows them, and as data."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from normswap.paths import blurred, folded
from normswap.report.findings.model import Findings
from normswap.report.plan import plan_view

# A page stays below 2 MB; what is longer stands in the folder.
_MOST = 400_000
_WIDTH = 150


def parts(found: Findings) -> dict[str, Any]:
    """The plan's text and JSON, None where it is too long."""
    if found.plan is None:
        return {"plan_text": "", "plan_json": None, "refused": []}
    as_json = found.plan.model_dump_json(indent=1)
    reasons = {refusal.site: refusal.reason for refusal in found.plan.refused}
    alike = folded([(path, blurred(why)) for path, why in reasons.items()])
    return {
        "plan_text": _text(found),
        "plan_json": as_json if len(as_json) <= _MOST else None,
        "refused": [(shown, reasons[paths[0]]) for shown, paths in alike],
    }


def _text(found: Findings) -> str:
    held = io.StringIO()
    Console(file=held, width=_WIDTH, no_color=True, highlight=False, markup=False).print(plan_view(found.plan, None))
    lines = [line.rstrip() for line in held.getvalue().splitlines()]
    return "\n".join(lines)[:_MOST]
