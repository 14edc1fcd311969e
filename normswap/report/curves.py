"""Training curves as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

#: by name of a run: how it is drawn
_COLOURS = {"healed": "#1b6ca8", "control": "#888888"}


def draw(
    path: Path, history: Mapping[str, Sequence[Mapping[str, Any]]], scores: Mapping[str, Mapping[str, float]]
) -> None:
    """Loss in training and held out over tokens, the tail, and the ramps of a taper, as a PNG.

    Args:
        history: by name of a run (`healed`, `control`), its log entries.
        scores: by name of a model, `mean` and `p99.9` of held-out data; that of the source is a line.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, entries in history.items():
        colour = _COLOURS.get(name, "#b5651d")
        for axis, key, style in ((left, "loss", ":"), (left, "eval_mean", "-"), (right, "eval_p99.9", "-")):
            points = [(entry["tokens"], entry[key]) for entry in entries if key in entry]
            if points:
                label = f"{name}, {'training' if key == 'loss' else 'held out'}"
                marker = "" if key == "loss" else "o"
                axis.plot(*zip(*points, strict=True), style, color=colour, label=label, marker=marker, markersize=3)
        ramps = [(entry["tokens"], entry["ramp"]) for entry in entries if "ramp" in entry]
        if ramps:
            other = left.twinx()
            other.fill_between(*zip(*ramps, strict=True), color=colour, alpha=0.12, linewidth=0)
            other.set(ylim=(0, 1), ylabel="ramp, from the exact form (1) to the target (0)")
    for axis, key, title in ((left, "mean", "loss"), (right, "p99.9", "99.9th percentile over tokens")):
        if "source" in scores:
            axis.axhline(scores["source"][key], color="#444444", linewidth=0.8, linestyle="--", label="source")
        axis.set(title=title, xlabel="tokens")
        axis.legend(frameon=False, fontsize=8)
        axis.grid(alpha=0.25)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
