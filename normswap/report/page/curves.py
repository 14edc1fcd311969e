"""Training curves, with the control's beside them."""

from __future__ import annotations

from markupsafe import Markup

from normswap.report.findings.model import Training
from normswap.report.page.chart import Chart, Scale, linear_scale, quantity

#: what is drawn: key of the log, title, y axis, the score whose level at the source is drawn with it
_PANELS = (
    ("eval_mean", "Held-out loss", "mean, nats or as the objective counts", "mean"),
    ("eval_p99.9", "Its tail", "99.9th percentile", "p99.9"),
    ("loss", "What is minimised", "training loss", None),
    ("ramp", "The taper", "1: the original's form, 0: the target", None),
    ("learning_rate", "Learning rate", "rate", None),
    ("grad_norm", "Gradient norm", "norm", None),
)
#: run -> how it is drawn
KINDS = {"healed": "b", "control": "a"}


def training_charts(found: Training) -> list[tuple[str, Markup]]:
    """A title and a chart for everything that was logged."""
    charts = []
    for key, title, y_name, score in _PANELS:
        lines = {run: curves[key] for run, curves in found.curves.items() if key in curves}
        if not lines or key in ("ramp", "learning_rate", "grad_norm") and "healed" not in lines:
            continue
        source = found.scores.get("source", {}).get(score) if score else None
        values = [value for line in lines.values() for _, value in line] + ([source] if source is not None else [])
        end = max(tokens for line in lines.values() for tokens, _ in line)
        y = Scale(0.0, 1.05) if key == "ramp" else linear_scale(values)
        chart = Chart(f"{title} over tokens", Scale(0.0, end or 1.0), y, 180, x_name="tokens", y_name=y_name)
        chart.y_axis(count=4)
        chart.x_axis(labels=quantity)
        if source is not None:
            chart.level(source, "the source")
        for run in sorted(lines, key=lambda run: run != "control"):
            kind = KINDS.get(run, "c")
            chart.series(lines[run], f"line {kind}")
            for tokens, value in lines[run] if key.startswith("eval") else ():
                tip = f"{run}, {tokens:,.0f} tokens: {value:.4f}"
                chart.canvas.mark(chart.x(tokens), chart.y(value), 0, f"dot {kind}", tip)
        charts.append((title, chart.render()))
    return charts
