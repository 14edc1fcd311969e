"""Sizes, parameters, bytes touched, time."""

from __future__ import annotations

from normswap.report.findings.model import Findings


def size(count: int) -> str:
    """Bytes in words: `7.86 MiB`."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} B" if unit == "B" else f"{value:.4g} {unit}"


def rows(found: Findings) -> list[tuple[str, str, str, str]]:
    """Each quantity before, after, and its change; a dash where it is not known."""
    s = found.sizes
    made = []
    for name, before, after, words in (
        ("parameters", s.parameters_before, s.parameters_after, lambda n: f"{n:,}"),
        ("weights on disk", s.bytes_before, s.bytes_after, size),
    ):
        known = before is not None and after is not None
        change = (
            "\u2013" if not known else "none" if before == after else f"{after - before:+,} ({after / before - 1:+.2%})"
        )
        shown = ["\u2013" if n is None else words(n) for n in (before, after)]
        made.append((name, *shown, change if known and name == "parameters" else _change(before, after)))
    return made


def _change(before: int | None, after: int | None) -> str:
    if before is None or after is None:
        return "\u2013"
    if before == after:
        return "none"
    return f"{'+' if after > before else '-'}{size(abs(after - before))} ({after / before - 1:+.2%})"


def lines(found: Findings) -> list[str]:
    """What was touched, and how long it took."""
    s = found.sizes
    made = []
    if s.tensors:
        counts = ", ".join(f"{count} {what}" for what, count in s.tensors.items())
        rewritten = (
            "" if s.bytes_rewritten is None else f"; {size(s.bytes_rewritten)} rewritten, the rest copied byte for byte"
        )
        made.append(f"Tensors of the files: {counts}{rewritten}.")
    if s.untied:
        made.append(f"No longer tied, and stored twice: {', '.join(s.untied)}.")
    if s.minutes is not None:
        took = f"{s.minutes * 60:.0f} seconds" if s.minutes < 2 else f"{s.minutes:.1f} minutes"
        made.append(f"It took {took}.")
    elif found.kind == "conversion":
        made.append("How long it took is not kept with the result: convert --report FILE says it.")
    return made
