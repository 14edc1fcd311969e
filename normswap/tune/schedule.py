"""The stages of a recipe on the axis of optimizer steps: which one a step is in, its learning rate, its tapers.

There is one optimizer for all stages, so that a resumed run, DDP and FSDP see one training. A parameter that a stage
does not train has no gradient in it (`trainer`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from normswap.tune.recipe import Stage, Taper


@dataclass(frozen=True)
class Span:
    """A stage, and the steps `start <= step < end` that are its own."""

    stage: Stage
    name: str
    start: int
    end: int
    learning_rate: float

    def rate(self, step: int) -> float:
        """The learning rate of a step: up from 0 in the warm-up, then as the schedule says."""
        done, length = step - self.start, self.end - self.start
        warm = round(self.stage.warmup * length)
        if done < warm:
            return self.learning_rate * (done + 1) / warm
        part = (done - warm) / max(1, length - warm)
        if self.stage.schedule == "linear":
            return self.learning_rate * (1 - part)
        if self.stage.schedule == "cosine":
            return self.learning_rate * (1 + math.cos(math.pi * part)) / 2
        return self.learning_rate


@dataclass(frozen=True)
class Schedule:
    """All stages of a run, one after another.

    Attributes:
        spans: in order.
        tokens_per_step: of one optimizer step, over all processes.
    """

    spans: tuple[Span, ...]
    tokens_per_step: int

    @classmethod
    def of(cls, stages: Sequence[Stage], tokens_per_step: int, learning_rate: float | None) -> Schedule:
        """Stages of so many tokens are as many whole steps as reach them."""
        spans: list[Span] = []
        start = 0
        for number, stage in enumerate(stages):
            steps = stage.steps or math.ceil(stage.tokens / tokens_per_step)
            rate = stage.learning_rate or learning_rate
            spans.append(Span(stage, stage.name or f"stage {number}", start, start + steps, rate))
            start += steps
        return cls(tuple(spans), tokens_per_step)

    @property
    def steps(self) -> int:
        return self.spans[-1].end

    def at(self, step: int) -> Span:
        """The stage that a step is in; of those after the end, the last."""
        return next((span for span in self.spans if step < span.end), self.spans[-1])

    def ramps(self, step: int, groups: Sequence[int]) -> list[float]:
        """How far each site still is from its target form in a step: 1 is its exact form, 0 the target.

        Args:
            groups: of each site, which turn it takes, from 0; sites of one turn go together.
        """
        span = next((s for s in self.spans if s.stage.taper is not None), None)
        if span is None:
            return [0.0] * len(groups)
        taper: Taper = span.stage.taper
        # the step in which the taper's part of the stage ends has it at its end already
        over = max(1, round(taper.over * (span.end - span.start)))
        turns = max(groups, default=0) + 1
        gone = min(max(step - span.start + 1, 0) / over, 1.0) * turns
        return [_shaped(taper.shape, min(max(gone - group, 0.0), 1.0)) for group in groups]


def _shaped(shape: str, gone: float) -> float:
    return 1 - gone if shape == "linear" else (1 + math.cos(math.pi * gone)) / 2 if gone < 1 else 0.0
