"""How a measurement is spread over tokens: a histogram by size, with its percentiles marked."""

from __future__ import annotations

import math

from markupsafe import Markup

from normswap.report.page.chart import WIDTH, Chart, Scale, figure
from normswap.verification.metrics import Stat


def distribution_chart(stat: Stat, what: str) -> Markup | None:
    """The histogram of `stat`; None where there is none, or nothing but zeros in it.

    Args:
        what: is measured, with its unit, for the axis.
    """
    found = stat.histogram
    if found is None or not found.counts:
        return None
    edges = found.edges()
    shares = [count / found.total for count in found.counts]
    low, high = math.floor(math.log10(edges[0]) + 1e-9), math.ceil(math.log10(edges[-1]) - 1e-9)
    chart = Chart(
        f"Distribution of {what} over tokens", Scale(10.0**low, 10.0 ** max(high, low + 2), log=True),
        Scale(0.0, 1.28 * max(shares)), 220, x_name=what, y_name="share of the tokens",
    )  # fmt: skip
    chart.y_axis(lambda share: f"{share:.0%}" if max(shares) > 0.04 else f"{share:.1%}", 4)
    chart.x_axis()
    for share, left, right in zip(shares, edges, edges[1:], strict=False):
        x = chart.x(left)
        tip = f"{left:.1e} to {right:.1e}: {share:.2%}"
        top = min(chart.y(share), chart.floor - 1.2) if share else chart.floor
        chart.canvas.rect(x + 0.6, top, chart.x(right) - x - 1.2, chart.floor - top, "bar", 1, tip)
    _percentiles(chart, stat)
    return chart.render()


def _percentiles(chart: Chart, stat: Stat) -> None:
    """Lines at percentiles, their names one below the other where they are near."""
    marks = [("median", stat.median), ("p99", stat.p99), ("p99.9", stat.p999), ("worst", stat.max)]
    for row, (name, value) in enumerate((name, value) for name, value in marks if value is not None):
        if not 0 < value < math.inf:
            continue
        x, y = chart.x(value), 24 + 11 * row
        chart.canvas.line(x, y - 8, x, chart.floor, "percentile")
        end = x > WIDTH * 0.6
        chart.canvas.text(x - 4 if end else x + 4, y, f"{name} {figure(value)}", "label", "end" if end else "start")
