"""Findings on a terminal: what the page shows, without its drawings."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from normswap.report.card import SCORES
from normswap.report.comparison import output_table
from normswap.report.findings.costs import UNKNOWN, lines, rows
from normswap.report.findings.model import Advice, Findings, Level, SiteForm
from normswap.report.kinds import kind_name
from normswap.report.writing import generation_view, visible
from normswap.verification.metrics import WorstToken

_STYLES: dict[Level, str] = {"good": "green", "note": "cyan", "warn": "yellow", "bad": "bold red"}


def findings_view(found: Findings) -> RenderableType:
    """What was changed, whether it is the same, what to do next; then tables."""
    parts: list[RenderableType] = [Text(found.title, style="bold"), Text(found.changed)]
    if found.verdict is not None:
        parts.append(Text(f"{found.verdict.headline}. {found.verdict.sentence}", style=_STYLES[found.verdict.level]))
    parts += [_advice(item) for item in found.advice]
    parts += [Text(line, style="dim") for line in _costs(found)]
    for name, report in found.reports.items():
        parts += [Text(f"\n{name}: {report.text}, in {report.comparison.dtype}", style="dim")]
        parts += [output_table(report.comparison)]
    if found.main is not None and found.main.comparison.output.worst_tokens:
        parts.append(_worst(found.main.comparison.output.worst_tokens))
    parts += [generation_view(found.generation)] if found.generation is not None else []
    parts += [_scores(found)] if found.training else []
    parts += [_sites(found), *_streams(found)]
    parts += [Text(line) for line in found.adapters]
    parts += [Text(note, style="dim") for note in found.notes]
    if found.provenance.command:
        parts.append(Text(f"made by: {found.provenance.command}"))
    return Group(*parts)


def _advice(item: Advice) -> RenderableType:
    text = Text(item.what, style=_STYLES[item.level])
    if item.attempt:
        text.append(f"  {item.attempt.replace('`', '')}", style="default")
    return Padding(text, (0, 0, 0, 2))


def _costs(found: Findings) -> list[str]:
    known = [row for row in rows(found) if row[1:3] != (UNKNOWN, UNKNOWN)]
    return [f"{name}: {before} before, {after} after" for name, before, after, _ in known] + lines(found)


def _table(title: str, *columns: str, left: int = 1) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number < left else "right", overflow="fold")
    return table


def _worst(tokens: tuple[WorstToken, ...]) -> Table:
    table = _table("the worst tokens", "at", "after reading", "original expects", "this one", "value", left=4)
    for token in tokens:
        words = [visible(text) for text in (token.before, token.token, token.chosen_a, token.chosen_b)]
        read = f"{words[0]}\u2039{words[1]}\u203a" if token.token is not None else ""
        table.add_row(f"{token.sequence}:{token.position}", read, words[2], words[3], f"{token.value:.2g}")
    return table


def _scores(found: Findings) -> Table:
    table = _table(f"held out, after {found.training.tokens} tokens", "model", "mean", "p99.9")
    for key, label in SCORES.items():
        if key in found.training.scores:
            table.add_row(label, *(f"{found.training.scores[key][name]:.4f}" for name in ("mean", "p99.9")))
    return table


def _sites(found: Findings) -> Table:
    table = _table("norms, layers folded", "norm", "before", "after", "count", "worst error", left=3)
    for row in found.sites:
        error = "" if row.error_max is None else f"{row.error_max:.1e}"
        table.add_row(row.shown, _form(row.before), _form(row.after), str(row.count), error)
    return table


def _form(form: SiteForm | None) -> str:
    return "-" if form is None else f"{kind_name(form.kind)}{'' if form.gain else ', no gain'}"


def _streams(found: Findings) -> list[RenderableType]:
    """What norms receive: the range over the model, as every norm is in the page."""
    streams = found.local.comparison.streams if found.local else ()
    if not streams:
        return []
    table = _table("what norms receive, least to most over the model", "", "mean", "rms", "cv")
    for name, stats in (("original", [s.a for s in streams]), ("this one", [s.b for s in streams])):
        known = [stat for stat in stats if stat is not None]
        values = [[getattr(stat, key) for stat in known] for key in ("mean", "rms", "cv")]
        table.add_row(name, *(f"{min(v):.3g} to {max(v):.3g}" if v else "-" for v in values))
    return [table]
