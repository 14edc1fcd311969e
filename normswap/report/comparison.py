"""What a person reads of a comparison: a verdict in one sentence, the output's numbers, the norms layer by layer."""

from __future__ import annotations

import math
import re

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from normswap.report.writing import generation_view, visible
from normswap.verification.metrics import Stat, Worst
from normswap.verification.models import Comparison
from normswap.verification.run import Report
from normswap.verification.sites import SiteMetrics


def comparison_table(report: Report) -> RenderableType:
    """Everything in a report, for a terminal."""
    found = report.comparison
    parts: list[RenderableType] = [Text(_conditions(report), style="dim"), output_table(found)]
    if found.sites:
        parts.append(_sites_table(found.sites))
    parts.extend([generation_view(report.generation, ("A", "B"))] if report.generation is not None else [])
    parts.extend(Text(note, style="yellow") for note in _notes(found))
    parts.append(Text(verdict(report), style="bold green" if found.first_divergence is None else "bold red"))
    return Group(*parts)


def verdict(report: Report) -> str:
    """One sentence: whether the two differ by more than rounding, and where first."""
    found = report.comparison
    worst = found.output.error.max if found.output.error else float("nan")
    if found.first_divergence is None:
        sites = f" and in what reaches {len(found.sites)} norms" if found.sites else ""
        return f"No difference beyond rounding in the output{sites}: the worst row is off by {worst:.1e}."
    off = f"the output's worst row is off by {worst:.1e}, and {found.tolerance:.0e} would be rounding"
    if found.output.mismatched:
        off = f"{found.output.mismatched} rows of the output are finite in one of the two only"
    if found.first_divergence == "output":
        where = "though every norm's input agrees" if found.sites else "in the output"
        return f"The two differ, {where}: {off}."
    return f"The two differ, first in what reaches {found.first_divergence}: {off}."


def _conditions(report: Report) -> str:
    stored = " and ".join(dict.fromkeys(report.stored))
    sizes = " x ".join(map(str, report.inputs))
    weights = "" if stored == report.comparison.dtype else f", weights stored in {stored}"
    return f"{report.text}, {sizes}; computed in {report.comparison.dtype} on {report.device}{weights}"


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))


def output_table(found: Comparison) -> Table:
    """The output's numbers alone."""
    table = _table(f"output ({found.output_name}), {found.output.rows} rows")
    table.add_column("")
    for name in ("mean", "median", "p99", "p99.9", "worst"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("at", overflow="fold")
    metrics = found.output
    _add(table, "relative error", metrics.error, ".1e")
    _add(table, "KL (nats)", metrics.kl, ".1e")
    if metrics.top1 is not None:
        table.add_row("same top-1", f"{metrics.top1:.2%}")
    _add(table, "cross-entropy A", metrics.cross_entropy_a, ".4f")
    _add(table, "cross-entropy B", metrics.cross_entropy_b, ".4f")
    _add(table, "  its change", metrics.cross_entropy_change, ".1e")
    if metrics.cross_entropy_a and metrics.cross_entropy_b:
        both = metrics.cross_entropy_a, metrics.cross_entropy_b
        perplexities = (f"{math.exp(stat.mean) if stat.mean < 700 else math.inf:.4g}" for stat in both)
        table.add_row("perplexity A, B", *perplexities)
    return table


def _add(table: Table, name: str, stat: Stat | None, form: str) -> None:
    if stat is not None:
        values = (stat.mean, stat.median, stat.p99, stat.p999, stat.max)
        numbers = ("" if value is None else format(value, form) for value in values)
        table.add_row(name, *numbers, _place(stat.worst))


def _place(worst: Worst) -> Text:
    """Where a row is: its token marked in the text around it, or its sequence and position."""
    if worst.token is None:
        return Text(f"sequence {worst.sequence}, position {worst.position}")
    token = (f"\u2039{visible(worst.token)}\u203a", "bold")
    return Text.assemble((visible(worst.before), "dim"), token, (visible(worst.after), "dim"))


def _sites_table(sites: tuple[SiteMetrics, ...]) -> Table:
    """One row for the sites that differ in layer numbers only."""
    table = _table("what reaches each norm: relative error, and |mean| / rms in A and in B")
    table.add_column("norm", overflow="fold")
    for name in ("sites", "mean", "worst", "at", "A", "B"):
        table.add_column(name, justify="right", no_wrap=True)
    folded: dict[str, list[SiteMetrics]] = {}
    for site in sites:
        folded.setdefault(re.sub(r"\b\d+\b", "*", site.site), []).append(site)
    for name, group in folded.items():
        worst = max(group, key=lambda site: site.error_max)
        table.add_row(
            name,
            str(len(group)),
            f"{sum(site.error_mean for site in group) / len(group):.1e}",
            f"{worst.error_max:.1e}",
            ".".join(re.findall(r"\b\d+\b", worst.site)),
            f"{max(site.mean_a for site in group):.1e}",
            f"{max(site.mean_b for site in group):.1e}",
        )
    return table


def _notes(found: Comparison) -> list[str]:
    """What the numbers do not cover."""
    notes = []
    if found.output.mismatched:
        notes.append(
            f"{found.output.mismatched} rows of the output are finite in one model only; they are in no number."
        )
    if found.output.not_finite:
        notes.append(f"{found.output.not_finite} rows of the output are not finite in either; they are in no number.")
    for what, paths in (
        ("are in one model only, or not run alike", found.unmatched),
        ("were not reached by these inputs", found.not_run),
        ("stand in another place in one of the two, and are not compared", found.moved),
    ):
        if paths:
            notes.append(f"{len(paths)} norms {what}: {', '.join(paths[:4])}{', ...' if len(paths) > 4 else ''}")
    return notes
