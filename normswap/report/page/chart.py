"""Axes for small charts: scales, ticks, grid, labels, and a legend below."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from normswap.report.page.svg import Canvas

WIDTH = 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 12, 34


@dataclass(frozen=True)
class Scale:
    """Values on a line: from `low` to `high`, by their logarithm if `log`."""

    low: float
    high: float
    log: bool = False

    def at(self, value: float) -> float:
        """Where a value lies, 0 to 1; what is outside lies at the end."""
        low, high, value = self.low, self.high, min(max(value, self.low), self.high)
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return (value - low) / (high - low) if high > low else 0.5

    def ticks(self, count: int = 5) -> list[float]:
        """Round values, about so many."""
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            step = max(1, math.ceil((last - first + 1) / count))
            return [10.0**power for power in range(first, last + 1, step)]
        span = self.high - self.low
        if span <= 0:
            return [self.low]
        rough = span / count
        unit = 10.0 ** math.floor(math.log10(rough))
        steps = [unit * m for m in (10, 5, 2, 1, 0.5)]
        fits = [step for step in steps if step >= rough * 0.999]
        found = self._multiples(fits[-1])
        # a span just above a step has one tick of it, which says nothing
        return found if len(found) > 2 else self._multiples(steps[len(fits)])

    def _multiples(self, step: float) -> list[float]:
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [n * step for n in range(first, last + 1)]


def log_scale(values: Sequence[float], least: float = 1e-18) -> Scale:
    """Whole decades around all positive values, two at least."""
    found = [max(v, least) for v in values if v > 0 and math.isfinite(v)] or [least]
    low, high = math.floor(math.log10(min(found))), math.ceil(math.log10(max(found)))
    return Scale(10.0**low, 10.0 ** max(high, low + 2), log=True)


def linear_scale(values: Sequence[float], from_zero: bool = False) -> Scale:
    """A little more than the range of the values."""
    found = [v for v in values if math.isfinite(v)] or [0.0]
    low, high = min(found), max(found)
    margin = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    return Scale(0.0 if from_zero and low >= 0 else low - margin, high + margin)


def number(value: float) -> str:
    """A tick's label."""
    if value == 0:
        return "0"
    if abs(value) >= 1e4 or abs(value) < 1e-3:
        text = f"{value:.0e}" if float(f"{value:.0e}") == value or abs(value) < 1e-3 else f"{value:.1e}"
        return text.replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    return f"{value:.4g}"


def figure(value: float) -> str:
    """A number in a table: three digits, and a power of ten only where that is shorter."""
    return f"{value:.3g}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.1e}"


def quantity(value: float) -> str:
    """A number of tokens as a tick's label: 20k, 1.5M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:g}"


class Chart:
    """A canvas with axes; `x` and `y` turn values into places."""

    def __init__(self, label: str, x: Scale, y: Scale, height: float = 190, *, x_name: str, y_name: str):
        self.canvas = Canvas(WIDTH, height, label)
        self.x_scale, self.y_scale, self.height = x, y, height
        self.canvas.text(WIDTH - _RIGHT, height - 4, x_name, "name", "end")
        self.canvas.text(2, 8, y_name, "name")

    def x(self, value: float) -> float:
        return _LEFT + self.x_scale.at(value) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return self.height - _BOTTOM - self.y_scale.at(value) * (self.height - _TOP - _BOTTOM - 6)

    @property
    def floor(self) -> float:
        return self.height - _BOTTOM

    def y_axis(self, labels=number, count: int = 5) -> None:
        for tick in self.y_scale.ticks(count):
            self.canvas.line(_LEFT, self.y(tick), WIDTH - _RIGHT, self.y(tick), "rule")
            self.canvas.text(_LEFT - 5, self.y(tick) + 3.5, labels(tick), "tick", "end")

    def x_axis(self, ticks: Sequence[tuple[float, str]] | None = None, labels=number) -> None:
        self.canvas.line(_LEFT, self.floor, WIDTH - _RIGHT, self.floor, "axis")
        for value, words in ticks if ticks is not None else [(t, labels(t)) for t in self.x_scale.ticks(6)]:
            self.canvas.line(self.x(value), self.floor, self.x(value), self.floor + 3, "axis")
            self.canvas.text(self.x(value), self.floor + 14, words, "tick", "middle")

    def series(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        """A line through `(x, y)` values; what has no end is left out."""
        shown = [(self.x(x), self.y(y)) for x, y in points if math.isfinite(y)]
        if len(shown) > 1:
            self.canvas.path(shown, kind)

    def level(self, value: float, words: str, kind: str = "level") -> None:
        """A horizontal line with its meaning."""
        self.canvas.line(_LEFT, self.y(value), WIDTH - _RIGHT, self.y(value), kind)
        self.canvas.text(WIDTH - _RIGHT - 2, self.y(value) - 4, words, "label", "end")

    def render(self):
        return self.canvas.render()
