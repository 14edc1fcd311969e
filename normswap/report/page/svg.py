"""SVG by hand: a few shapes, their colours by CSS class, all text escaped. Pages have one for every drawing."""

from __future__ import annotations

from markupsafe import Markup, escape

from normswap.report.printable import printable


class Canvas:
    """A drawing of `width` by `height` units, `label` for those who do not see it.

    Shapes are appended in the order in which they are to cover each other. `kind` is a CSS class, or several.
    """

    def __init__(self, width: float, height: float, label: str):
        self.width, self.height, self.label = width, height, label
        self._parts: list[str] = []

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        self._add(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>')

    def path(self, points: list[tuple[float, float]], kind: str, closed: bool = False) -> None:
        """A line through points."""
        steps = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self._add(f'<{"polygon" if closed else "polyline"} points="{steps}" class="{kind}"/>')

    def rect(self, x: float, y: float, width: float, height: float, kind: str, round: float = 0, tip: str = "") -> None:
        shape = f'x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{max(height, 0):.1f}" rx="{round:g}"'
        self._add(f'<rect {shape} class="{kind}">{_tip(tip)}</rect>')

    def circle(self, x: float, y: float, radius: float, kind: str, tip: str = "") -> None:
        self._add(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" class="{kind}">{_tip(tip)}</circle>')

    def text(self, x: float, y: float, words: str, kind: str, anchor: str = "start") -> None:
        words = escape(printable(words))
        self._add(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{words}</text>')

    def mark(self, x: float, y: float, shape: int, kind: str, tip: str = "") -> None:
        """A point: a circle, square, triangle or diamond by number."""
        if shape % 4 == 0:
            self.circle(x, y, 2.6, kind, tip)
            return
        corners = ((-2.4, -2.4), (2.4, -2.4), (2.4, 2.4), (-2.4, 2.4)), ((0, -3.2), (3, 2.4), (-3, 2.4)), (
            (0, -3.4), (3.4, 0), (0, 3.4), (-3.4, 0)
        )  # fmt: skip
        points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners[shape % 4 - 1])
        self._add(f'<polygon points="{points}" class="{kind}">{_tip(tip)}</polygon>')

    def render(self) -> Markup:
        label = escape(printable(self.label))
        head = f'<svg viewBox="0 0 {self.width:g} {self.height:g}" role="img" aria-label="{label}">'
        return Markup(head + "".join(self._parts) + "</svg>")

    def _add(self, part: str) -> None:
        self._parts.append(part)


def _tip(text: str) -> str:
    return f"<title>{escape(printable(text))}</title>" if text else ""


def shortened(text: str, most: int) -> str:
    """`text`, its middle left out where it is longer than `most` characters."""
    if len(text) <= most:
        return text
    tail = (most - 1) // 2
    return f"{text[: most - 1 - tail]}\u2026{text[-tail:]}"
