"""Where two models differ: the error of what reaches each norm, and what the norms receive, along the depth."""

from __future__ import annotations

import re
from collections.abc import Sequence

from markupsafe import Markup

from normswap.paths import blurred
from normswap.planning.plans import MovedBlock
from normswap.report.page.chart import Chart, Scale, linear_scale, log_scale
from normswap.verification.sites import SiteMetrics
from normswap.verification.streams import SiteStream

# An error of 0 is drawn at this size: rounding in float64, squared.
_LEAST = 1e-17
# Values that are so many times another are drawn by their logarithm.
_WIDE = 20


def by_stream(paths: Sequence[str], stream_of: dict[str, str]) -> dict[str, list[str]]:
    """Paths by the stream that they stand on, in order; those on none stand with the one before them."""
    found: dict[str, list[str]] = {}
    last = next((stream_of[p] for p in paths if p in stream_of), "model")
    for path in paths:
        last = stream_of.get(path, last)
        found.setdefault(last, []).append(path)
    return found


def error_chart(sites: Sequence[SiteMetrics], tolerance: float | None, name: str) -> Markup:
    """The relative error of what reaches each norm of one stream: mean, and worst token.

    Args:
        tolerance: what rounding explains, where the two are to be the same.
    """
    worst = [max(site.error_max, _LEAST) for site in sites]
    mean = [max(site.error_mean, _LEAST) for site in sites]
    x = Scale(-0.5, len(sites) - 0.5)
    y = log_scale([*worst, *mean, *([tolerance] if tolerance else [])])
    chart = Chart(
        f"Relative error of what reaches each norm of {name}", x, y, 200,
        x_name="norms in the order in which they run; number of the layer", y_name="relative error",
    )  # fmt: skip
    chart.y_axis()
    chart.x_axis(_layer_ticks([site.site for site in sites]))
    if tolerance:
        chart.level(tolerance, "above this line it is more than rounding")
    families = list(dict.fromkeys(blurred(site.site) for site in sites))
    for values, kind, what in ((worst, "b faint", "worst token"), (mean, "b", "mean")):
        chart.series(list(enumerate(values)), f"line {kind}")
        for i, (site, value) in enumerate(zip(sites, values, strict=True)):
            tip = f"{site.site}: {what} {value:.2e}"
            chart.canvas.mark(chart.x(i), chart.y(value), families.index(blurred(site.site)), f"dot {kind}", tip)
    return chart.render()


def families_of(paths: Sequence[str]) -> list[tuple[int, str]]:
    """The shape and the name of each family of sites, for a legend."""
    return list(enumerate(dict.fromkeys(blurred(path) for path in paths)))


def moved_chart(blocks: Sequence[MovedBlock]) -> Markup:
    """The error of the normalised stream behind each moved block, before and after its writers were refitted."""
    errors = {"a": [b.unfitted for b in blocks], "b": [b.error for b in blocks]}
    known = [value for values in errors.values() for value in values if value is not None]
    chart = Chart(
        "Relative error of the stream behind each moved block", Scale(-0.5, len(blocks) - 0.5),
        linear_scale([0.0, *known], from_zero=True), 190,
        x_name="moved blocks, in order; number of the layer", y_name="relative error of the stream",
    )  # fmt: skip
    chart.y_axis(lambda value: f"{value:.3g}" if value < 0.01 else f"{value:.0%}" if value >= 0.1 else f"{value:.1%}")
    numbers = [str(b.layer) if b.layer is not None else "" for b in blocks]
    chart.x_axis(_spaced([(i, n) for i, n in enumerate(numbers) if n and (i == 0 or numbers[i - 1] != n)]))
    for kind, values in errors.items():
        points = [(i, value) for i, value in enumerate(values) if value is not None]
        chart.series(points, f"line {kind}")
        for i, value in points:
            what = "after the refit" if kind == "b" else "before the refit"
            chart.canvas.mark(chart.x(i), chart.y(value), 0, f"dot {kind}", f"{blocks[i].name}, {what}: {value:.2%}")
    return chart.render()


def stream_chart(streams: Sequence[SiteStream], what: str, y_name: str, log: bool = False) -> Markup:
    """One statistic (`mean`, `rms`, `cv`) of what each norm receives, in both models.

    Args:
        log: draw it by its logarithm, where values of many sizes are among them.
    """
    lines: dict[str, list[tuple[int, float]]] = {"a": [], "b": []}
    for i, site in enumerate(streams):
        for kind, stat in (("a", site.a), ("b", site.b)):
            if stat is not None:
                lines[kind].append((i, getattr(stat, what)))
    values = [value for line in lines.values() for _, value in line]
    wide = log and min(values, default=1) > 0 and max(values) > _WIDE * min(values)
    scale = log_scale(values) if wide else linear_scale([0.0, *values], from_zero=all(v >= 0 for v in values))
    chart = Chart(
        f"{y_name} of what each norm receives", Scale(-0.5, len(streams) - 0.5), scale, 160,
        x_name="norms in order; number of the layer", y_name=y_name,
    )  # fmt: skip
    chart.y_axis(count=4)
    chart.x_axis(_layer_ticks([site.site for site in streams]))
    for kind, line in lines.items():
        chart.series(line, f"line {kind}")
        for i, value in line:
            whose = "original" if kind == "a" else "converted"
            tip = f"{streams[i].site}, {whose}: {value:.4g}"
            chart.canvas.mark(chart.x(i), chart.y(value), 0 if kind == "a" else 1, f"dot {kind}", tip)
    return chart.render()


def _layer_ticks(paths: Sequence[str]) -> list[tuple[float, str]]:
    """A tick where the first number in the paths becomes another one."""
    ticks: list[tuple[float, str]] = []
    last = None
    for i, path in enumerate(paths):
        found = re.search(r"(?<!\w)\d+(?!\w)", path)
        number = found.group() if found else path.rpartition(".")[2]
        if number != last:
            ticks.append((i, number if found else ""))
        last = number
    return _spaced([tick for tick in ticks if tick[1]])


def _spaced(ticks: list[tuple[float, str]], most: int = 13) -> list[tuple[float, str]]:
    step = max(1, -(-len(ticks) // most))
    return ticks[::step]


#: a statistic of what norms receive, its name on the axis, whether it is drawn by its logarithm
STATISTICS = (
    ("rms", "root mean square", True),
    ("cv", "variation of the rms from token to token", False),
    ("mean", "mean", False),
)
