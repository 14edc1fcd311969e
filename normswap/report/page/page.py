"""The page: a section for each question that a reader has, in the order in which they come up."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from normswap.report.findings import costs
from normswap.report.findings.model import Findings
from normswap.report.findings.words import of_text
from normswap.report.page import differences, drawings, maps, plans, same, tiles
from normswap.report.page.curves import training_charts
from normswap.report.printable import printable
from normswap.report.writing import visible

_TEMPLATES = Path(__file__).parent / "templates"
_ICONS = {"good": "\u2713", "note": "i", "warn": "!", "bad": "\u2715"}


def page(found: Findings) -> str:
    """`found` as one HTML file."""
    style = Markup((_TEMPLATES / "style.css").read_text(encoding="utf-8"))
    return _environment().get_template("page.html").render(found=found, style=style, **_parts(found))


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # names and texts come from checkpoints: no control characters, and no marks that turn a line around
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.globals |= {"icon": _ICONS.__getitem__, "visible": visible, "parted": parted, "coded": coded}
    environment.globals |= {"breaking": breaking}
    return environment


def parted(text: str | None) -> Markup:
    """Text from the first difference on: the first word marked."""
    head = re.match(r"\s*\S*", text or "").group()
    escaped = [escape(printable(visible(part))) for part in (head, (text or "")[len(head) :])]
    return Markup("<mark>{}</mark>{}").format(*escaped) if head else Markup("<mark>(ends)</mark>")


def coded(text: str) -> Markup:
    """Text with what stands between backticks as code."""
    parts = [escape(printable(part)) for part in text.split("`")]
    return Markup("").join(Markup("<code>{}</code>").format(p) if i % 2 else p for i, p in enumerate(parts))


def breaking(path: str) -> Markup:
    """A path that may be broken into lines behind its dots and underscores."""
    return Markup(re.sub(r"([._])", r"\1<wbr>", str(escape(printable(path)))))


def _parts(found: Findings) -> dict[str, Any]:
    """What the templates show beside `found`."""
    return {
        "tiles": tiles.tiles(found),
        "generation": found.generation,
        "drawings": drawings.drawings(found),
        "bare": drawings.any_bare(found),
        "of_text": found.main is not None and of_text(found.main),
        "scores": same.scores(found),
        "charts": training_charts(found.training) if found.training else [],
        "costs": costs.rows(found),
        "cost_lines": costs.lines(found),
        **same.parts(found),
        **differences.parts(found),
        **maps.parts(found),
        **plans.parts(found),
    }
