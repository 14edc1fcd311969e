"""Rules on a fine-tune: beside its control, and beside where it began."""

from __future__ import annotations

from collections.abc import Iterator

from normswap.report.findings.model import Advice, Findings
from normswap.report.findings.words import HEALED, made_worse

_LONGER = "Train for longer (`stages.0.tokens`), or with the original as a teacher (`objective: distill`)."


def beside_control(found: Findings) -> Iterator[Advice]:
    """How far the result is from the unconverted model, trained as much where there is such a one."""
    scores = _means(found)
    if "healed" not in scores:
        return
    healed, source, control = scores["healed"], scores["source"], scores.get("control")
    beside, whose = (source, "the unconverted model") if control is None else (control, "its control")
    if healed > beside + HEALED:
        yield Advice(level="warn", what=f"It ends {healed - beside:.3f} nats above {whose}.", attempt=_LONGER)
    elif not made_worse(found.training):
        yield Advice(level="good", what=f"Its held-out loss is {healed - beside:+.4f} nats beside {whose}.")


def no_control(found: Findings) -> Iterator[Advice]:
    if found.training is not None and "control" not in found.training.scores:
        yield Advice(
            level="note",
            what="There is no control, so what training alone would have done is not known.",
            attempt="`control: true` trains the unconverted model as much.",
        )


def control_worse(found: Findings) -> Iterator[Advice]:
    scores = _means(found)
    if "control" in scores and scores["control"] > scores["source"] + HEALED / 2:
        off = scores["control"] - scores["source"]
        yield Advice(
            level="warn",
            what=f"The control became worse by {off:.3f} nats as well: it is the training, not the norms.",
            attempt="A lower `stages.0.learning_rate`, or more text than so few tokens.",
        )


def led_away(found: Findings) -> Iterator[Advice]:
    if found.training is not None and made_worse(found.training):
        scores = _means(found)
        yield Advice(
            level="warn",
            what=f"Training made it worse: {scores['start']:.4f} before, {scores['healed']:.4f} after.",
            attempt="A lower `stages.0.learning_rate`, a warmup, more text than a few passes, or a slower taper.",
        )


def _means(found: Findings) -> dict[str, float]:
    """By model, its mean on held-out data."""
    return {name: values["mean"] for name, values in found.training.scores.items()} if found.training else {}


RULES = (beside_control, no_control, control_worse, led_away)
