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

    figure, panels = pyplot.subplots(1, 3, figsize=(14, 4), layout="constrained")
    shown = {"eval_mean": "held out, mean", "eval_p99.9": "held out, 99.9th percentile", "loss": "what is minimised"}
    for axis, (key, title) in zip(panels, shown.items(), strict=True):
        for name, entries in history.items():
            points = [(entry["tokens"], entry[key]) for entry in entries if key in entry]
            if points:
                marker = "" if key == "loss" else "o"
                colour = _COLOURS.get(name, "#b5651d")
                axis.plot(*zip(*points, strict=True), color=colour, label=name, marker=marker, markersize=3)
        score = {"eval_mean": "mean", "eval_p99.9": "p99.9"}.get(key)
        if score and "source" in scores:
            axis.axhline(scores["source"][score], color="#444444", linewidth=0.8, linestyle="--", label="source")
        axis.set(title=title, xlabel="tokens")
        axis.legend(frameon=False, fontsize=8)
        axis.grid(alpha=0.25)
    ramps = [(entry["tokens"], entry["ramp"]) for entry in history.get("healed", ()) if "ramp" in entry]
    if ramps:
        other = panels[0].twinx()
        other.fill_between(*zip(*ramps, strict=True), color=_COLOURS["healed"], alpha=0.12, linewidth=0)
        other.set(ylim=(0, 1), ylabel="ramp (1: exact form, 0: target)")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
