"""Where two models differ along their depth, stream by stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from normswap.paths import folded
from normswap.report.comparison import verdict
from normswap.report.findings.model import Findings
from normswap.report.page import depth
from normswap.verification.streams import SiteStream, StreamStat


def parts(found: Findings) -> dict[str, Any]:
    """Charts of errors and of what norms receive; where there are none, why."""
    errors, no_errors = _errors(found)
    streams = found.local.comparison.streams if found.local else ()
    split = depth.by_stream([site.site for site in streams], _streams_of(found))
    sites = {site.site: site for site in streams}
    by_name = {name: [sites[path] for path in paths] for name, paths in split.items()}
    return {
        "divergence": verdict(found.local) if found.local and found.to_be_same else "",
        "moved": _moved(found),
        "errors": errors,
        "no_errors": no_errors,
        "streams": [
            {"name": name if len(by_name) > 1 else "", "charts": _charts(part)} for name, part in by_name.items()
        ],
        "no_streams": "" if streams or not found.local else _OLD,
        "stream_rows": _rows(streams),
    }


_OLD = "What the norms receive was not measured by the version of normswap that made this folder."


def _streams_of(found: Findings) -> dict[str, str]:
    """By path of a site the stream that it stands on: at its ends, or in a module that the stream is named by."""
    streams = [stream for drawn in (found.before, found.after) if drawn for stream in drawn.streams]
    # of names of which one begins with the other, the longer one says more
    streams.sort(key=lambda stream: len(stream.name), reverse=True)
    ends = {norm.name: stream.name for stream in streams for norm in (*stream.embedding, *stream.final)}
    comparison = found.local.comparison if found.local else None
    paths = [site.site for site in (*comparison.sites, *comparison.streams)] if comparison else []
    held: dict[str, str] = {}
    for path in paths:
        within = (stream.name for stream in streams if path.startswith(f"{stream.name.partition('#')[0]}."))
        if name := ends.get(path) or next(within, None):
            held[path] = name
    return held


def _errors(found: Findings) -> tuple[list[dict[str, Any]], str]:
    if found.local is None:
        return [], ""
    comparison = found.local.comparison
    sites = {site.site: site for site in comparison.sites if site.says_something}
    if not sites:
        why = (
            "No norm stands where it stood, so none is compared with itself."
            if comparison.moved
            else ("No norm runs in both models alike, so none is compared.")
        )
        return [], why
    made = []
    tolerance = comparison.tolerance if found.to_be_same else None
    split = depth.by_stream(list(sites), _streams_of(found))
    for name, paths in split.items():
        made.append(
            {
                "name": name if len(split) > 1 else "",
                "svg": depth.error_chart([sites[path] for path in paths], tolerance, name),
                "families": depth.families_of(paths),
            }
        )
    return made, ""


def _moved(found: Findings) -> dict[str, Any] | None:
    blocks = [block for block in (found.plan.moved if found.plan else ()) if block.error is not None]
    if not blocks or found.kind == "comparison":
        return None
    worst = max(blocks, key=lambda block: block.error)
    caption = f"The last block is off by {blocks[-1].error:.1%}, the worst, {worst.name}, by {worst.error:.1%}."
    return {"svg": depth.moved_chart(blocks), "caption": caption}


def _charts(streams: Sequence[SiteStream]) -> list[Any]:
    return [depth.stream_chart(streams, what, name, log) for what, name, log in depth.STATISTICS]


def _rows(streams: Sequence[SiteStream]) -> list[list[str]]:
    """Numbers of each norm; layers that are alike to three digits are one row."""
    cells = {site.site: [*_cells(site.a), *_cells(site.b)] for site in streams}
    return [[shown, *cells[paths[0]]] for shown, paths in folded([(path, tuple(row)) for path, row in cells.items()])]


def _cells(stat: StreamStat | None) -> list[str]:
    return ["\u2013"] * 3 if stat is None else [f"{value:.3g}" for value in (stat.mean, stat.rms, stat.cv)]
