"""Sizes, parameters, bytes touched, time."""

from __future__ import annotations

from collections.abc import Callable

from normswap.report.findings.model import Findings


def size(count: int) -> str:
    """Bytes in words: `7.86 MiB`."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} B" if unit == "B" else f"{value:.4g} {unit}"


#: stands for what is not known
UNKNOWN = "\u2013"


def rows(found: Findings) -> list[tuple[str, str, str, str]]:
    """Each quantity before, after, and its change."""
    s = found.sizes
    counted = (s.parameters_before, s.parameters_after)
    stored = (s.bytes_before, s.bytes_after)
    return [
        ("parameters", *_cells(counted, lambda n: f"{n:,}"), _change(*counted, lambda n: f"{n:,}")),
        ("weights on disk", *_cells(stored, size), _change(*stored, size)),
    ]


def _cells(values: tuple[int | None, int | None], words: Callable[[int], str]) -> list[str]:
    return [UNKNOWN if value is None else words(value) for value in values]


def _change(before: int | None, after: int | None, words: Callable[[int], str]) -> str:
    if before is None or after is None:
        return UNKNOWN
    if before == after:
        return "none"
    return f"{'+' if after > before else '-'}{words(abs(after - before))} ({after / before - 1:+.2%})"


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
    if s.seconds:
        stages = ", ".join(f"{stage} {_time(seconds)}" for stage, seconds in s.seconds.items())
        made.append(f"It took {_time(sum(s.seconds.values()))}{f': {stages}' if len(s.seconds) > 1 else ''}.")
    elif found.kind == "conversion":
        made.append("How long it took is not kept with the result: convert --report FILE says it.")
    return made


def _time(seconds: float) -> str:
    return f"{seconds:.3g} seconds" if seconds < 120 else f"{seconds / 60:.3g} minutes"
