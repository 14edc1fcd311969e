"""Which placements want a warm-up: one checkpoint in four placements, fine-tuned with and without, at several rates.

    .venv/bin/python scripts/bench_stability.py --text corpus.txt

Every textbook says that post-norm wants a warm-up and pre-norm does not. Here a trained pre-norm model is moved
(calibrated), and each form is trained by the recipe of the others, gradients unclipped. Drawn are the loss, and the
gradient's norm by depth in the first steps. The table goes to scripts/results/stability.md, the picture beside it.
"""

from __future__ import annotations

import math
import os
import platform
import re
import tempfile
from collections import defaultdict
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import click
import torch
import transformers
from transformers import TrainerCallback

from normswap.calibration.data import silent
from normswap.cli.options import err, quiet
from normswap.tune.prepare import open_source, prepare
from normswap.tune.processes import start
from normswap.tune.recipe import Recipe
from normswap.tune.surgery import operate
from normswap.tune.train import train

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "scripts" / "results"
SURGERIES = {"pre": None, "post": {"placement": "post"}, "deepnorm": {"placement": "deepnorm"},
             "sandwich": {"placement": "sandwich"}}  # fmt: skip
RATES, WARMUPS = (1e-3, 3e-3, 1e-2), (0.0, 0.3)
#: a run has diverged when its loss stands so many nats above its start
DIVERGED = 0.5


class Gradients(TrainerCallback):
    """The gradient's norm in each layer, in the first steps."""

    def __init__(self, steps: int = 5):
        self.steps, self.seen = steps, defaultdict(list)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step >= self.steps:
            return
        squares: dict[int, float] = defaultdict(float)
        for name, parameter in model.named_parameters():
            found = re.search(r"\.(\d+)\.", name)
            if found and parameter.grad is not None:
                squares[int(found[1])] += float(parameter.grad.square().sum())
        for layer, square in squares.items():
            self.seen[layer].append(math.sqrt(square))

    def by_layer(self) -> list[float]:
        return [sum(values) / len(values) for _, values in sorted(self.seen.items())]


@click.command()
@click.option("--text", required=True, type=click.Path(exists=True, dir_okay=False), help="Tiny Shakespeare.")
@click.option("--model", default=str(ROOT / "tests" / "checkpoints" / "gpt2-shakespeare"), show_default=True)
@click.option("--steps", default=60, show_default=True)
def main(text: str, model: str, steps: int) -> None:
    quiet()
    runs = []
    start({})
    for placement, surgery in SURGERIES.items():
        recipe = Recipe.of(
            {
                "model": model,
                "surgery": [] if surgery is None else [surgery],
                "data": {"source": text, "block": 64, "held_out": 0.03, "held_out_blocks": 64,
                         "calibration_tokens": 4096},
                "stages": [{"steps": steps, "learning_rate": 1e-3, "schedule": "constant"}],
                "training": {"per_device_train_batch_size": 16, "max_grad_norm": 0.0, "logging_steps": 1,
                             "save_strategy": "no", "eval_steps": steps},
                "guards": {"loss": None, "tail": None},
                "output": "unused",
            }
        )  # fmt: skip
        setup = prepare(recipe, open_source(recipe), silent)
        for rate in RATES:
            for warmup in WARMUPS:
                runs.append({"placement": placement, "rate": rate, "warmup": warmup} | _run(setup, rate, warmup))
                last = runs[-1]
                err().print(f"{placement}, {rate:g}, warm-up {warmup}: {last['start']:.3f} to {last['end']:.3f}")
    _write(runs, Path(model).name, steps)


def _run(setup, rate: float, warmup: float) -> dict:
    """Train once. Returns losses, gradients by layer, and the held-out loss before and after."""
    from dataclasses import replace

    from normswap.errors import DivergedError

    span = setup.schedule.spans[0]
    stage = span.stage.model_copy(update={"learning_rate": rate, "warmup": warmup})
    schedule = replace(setup.schedule, spans=(replace(span, stage=stage, learning_rate=rate),))
    model = operate(setup.original, setup.surgery) if setup.surgery else _copy(setup.original)
    gradients, losses, held_out = Gradients(), [], []

    def say(entry: dict) -> None:
        losses.extend([entry["loss"]] if "loss" in entry else [])
        held_out.extend([entry["eval_mean"]] if "eval_mean" in entry else [])

    with tempfile.TemporaryDirectory() as run:
        try:
            train(
                replace(setup, schedule=schedule),
                model,
                setup.surgery,
                Path(run),
                "run",
                False,
                silent,
                say,
                callbacks=[gradients],
            )
        except DivergedError:
            held_out.append(math.inf)
    return {"losses": losses, "gradients": gradients.by_layer(), "start": held_out[0], "end": held_out[-1]}


def _copy(model: torch.nn.Module) -> torch.nn.Module:
    import copy

    return copy.deepcopy(model)


def _write(runs: list[dict], model: str, steps: int) -> None:
    RESULTS.mkdir(exist_ok=True)
    _draw(runs, RESULTS / "stability.png")
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    lines = [
        "<!-- scripts/bench_stability.py -->",
        f"{versions}; {model}, {steps} steps of 1024 tokens, AdamW, constant rate, gradients not clipped. Held-out "
        f"loss in nats, the highest training loss in brackets; **diverged**: more than {DIVERGED} above the start.",
        "",
        "| placement | start | "
        + " | ".join(f"{r:g}, {'warm-up' if w else 'none'}" for r in RATES for w in WARMUPS)
        + " |",
        "|---|---|" + "---|" * (len(RATES) * len(WARMUPS)),
    ]
    for placement in SURGERIES:
        own = [run for run in runs if run["placement"] == placement]
        cells = [_cell(run) for run in own]
        lines.append(f"| {placement} | {own[0]['start']:.3f} | {' | '.join(cells)} |")
    lines += ["", "Norm of the gradient by layer, mean of the first 5 steps without warm-up at the lowest rate:", ""]
    layers = len(runs[0]["gradients"])
    lines += ["| placement | " + " | ".join(f"layer {i}" for i in range(layers)) + " |", "|---|" + "---|" * layers]
    for placement in SURGERIES:
        first = next(run for run in runs if run["placement"] == placement)
        lines.append(f"| {placement} | {' | '.join(f'{value:.2g}' for value in first['gradients'])} |")
    (RESULTS / "stability.md").write_text("\n".join(lines) + "\n")
    click.echo("\n".join(lines))


def _cell(run: dict) -> str:
    highest = max(run["losses"], default=math.inf)
    number = f"{run['end']:.3f} ({highest:.2f})"
    return f"**{number}**" if not run["end"] < run["start"] + DIVERGED else number


def _draw(runs: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(SURGERIES), figsize=(14, 6.5), layout="constrained", sharey="row")
    colours = dict(zip(RATES, ("#1b6ca8", "#3a9d5d", "#b3261e"), strict=True))
    for column, placement in enumerate(SURGERIES):
        for run in (run for run in runs if run["placement"] == placement):
            style = "-" if run["warmup"] else ":"
            label = f"{run['rate']:g}{', warm-up' if run['warmup'] else ''}"
            axes[0][column].plot(run["losses"], style, color=colours[run["rate"]], label=label, linewidth=1)
            axes[1][column].plot(run["gradients"], style, color=colours[run["rate"]], marker="o", markersize=3)
        axes[0][column].set(title=placement, xlabel="step", ylim=(3.5, 7.5))
        axes[1][column].set(xlabel="layer", yscale="log")
    axes[0][0].set_ylabel("training loss, nats")
    axes[1][0].set_ylabel("norm of the gradient")
    axes[0][0].legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
