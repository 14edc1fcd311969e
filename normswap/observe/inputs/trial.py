"""Trials on the meta device: which of several inputs runs, what it reaches, how many features it gives."""

from __future__ import annotations

import inspect
import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from transformers import PreTrainedModel

from normswap.observe.recorder import Recorder, tensors_in
from normswap.observe.run import meta_twin
from normswap.observe.trace import Trace

Inputs = dict[str, Any]
#: how many trials one model may have
_TRIALS = 200
#: how many forms of one medium are tried alone
_OF_ONE = 40
#: more features than any small input makes
_MOST_ROWS = 10_000


@dataclass(frozen=True)
class Attempt:
    """One trial: what was given, what came out (None if it failed), and how far it got."""

    inputs: Inputs
    output: Any
    trace: Trace

    @property
    def ran(self) -> bool:
        return self.output is not None

    @property
    def reached(self) -> set[str]:
        """Paths of the modules that ran."""
        return {call.path for call in self.trace.calls}

    @property
    def distance(self) -> tuple[bool, int]:
        return self.ran, len(self.trace.operations)


class Trial:
    """Runs a model's structure on candidate inputs; no weights are read."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.left = _TRIALS
        self._twin: PreTrainedModel | None = None

    @property
    def twin(self) -> PreTrainedModel:
        if self._twin is None:
            self._twin = meta_twin(self.model)
        return self._twin

    def fit(self, parts: Sequence[Sequence[Inputs]]) -> Attempt:
        """One choice for each part such that the model runs to the end; where none is found, what got furthest.

        One part is changed at a time: what gets further stays, and all others are tried beside it.
        """
        chosen = [choices[0] for choices in parts]
        best = self.attempt(_union(chosen))
        for _ in range(3):
            before = best
            for place, choices in enumerate(parts):
                for choice in choices:
                    if best.ran or self.left <= 0:
                        return best
                    if choice is chosen[place]:
                        continue
                    attempt = self.attempt(_union([*chosen[:place], choice, *chosen[place + 1 :]]))
                    if attempt.distance > best.distance:
                        best, chosen[place] = attempt, choice
            if best is before:
                break
        return best

    def extend(self, attempt: Attempt, extras: Sequence[Sequence[Inputs]]) -> Attempt:
        """`attempt`, which ran, with those of `extras` that make more modules run: one alone, or two.

        Args:
            extras: for each further argument, ways to make it.
        """
        alone = [extra for choices in extras for extra in choices]
        pairs = [
            {**one, **other}
            for first, second in itertools.combinations(extras, 2)
            for one, other in itertools.product(first[:4], second[:4])
        ]
        for extra in [*alone, *pairs]:
            if self.left <= 0 or not self._idle(attempt):
                break
            more = self.attempt({**attempt.inputs, **extra})
            if more.ran and more.reached > attempt.reached:
                attempt = more
        return attempt

    def features(self, methods: Sequence[str], candidates: Sequence[Inputs], text: Inputs) -> tuple[Inputs, int] | None:
        """The first of `candidates` that one of `methods` takes, and how many features it makes of it in all.

        Where none takes any, because it wants to see the placeholders that are to be counted: the candidate that the
        whole model gets furthest with, beside `text`, and how many rows the last module that ran to its end gave out.
        """
        for method in methods:
            signature = inspect.signature(operator.attrgetter(method)(self.model)).parameters
            named = {p.name for p in signature.values() if p.kind is p.POSITIONAL_OR_KEYWORD}
            for inputs in candidates[:_OF_ONE]:
                known = {k: v for k, v in inputs.items() if k in named} if named else inputs
                count = _rows(_features_in(self.attempt(known, method).output))
                if count:
                    return inputs, count
        attempts = [(inputs, self.attempt({**text, **inputs})) for inputs in candidates[:_OF_ONE]]
        inputs, furthest = max(attempts, key=lambda pair: pair[1].distance, default=({}, None))
        if furthest is None or furthest.ran:
            return None
        count = _last_rows(furthest.trace, text["input_ids"].numel())
        return (inputs, count) if 0 < count < _MOST_ROWS else None

    def attempt(self, inputs: Inputs, method: str | None = None) -> Attempt:
        """Run the forward, or `method`, once."""
        self.left -= 1
        recorder = Recorder(self.twin, inputs, "ends")
        function = self.twin if method is None else operator.attrgetter(method)(self.twin)
        try:
            with torch.no_grad(), recorder.module_hooks(), recorder:
                return Attempt(inputs, function(**inputs), recorder.trace)
        except Exception:  # a trial: whatever is raised means that these inputs do not fit
            return Attempt(inputs, None, recorder.trace)

    def _idle(self, attempt: Attempt) -> bool:
        """Whether modules with parameters of their own did not run."""
        own = {path for path, m in self.twin.named_modules() if any(True for _ in m.parameters(recurse=False))}
        return not own <= attempt.reached


def _union(chosen: Sequence[Inputs]) -> Inputs:
    return {name: value for part in chosen for name, value in part.items()}


def _features_in(output: Any) -> list[torch.Tensor]:
    """The features that stand for placeholders: what a tower pools, else what it puts out last."""
    for name in ("pooler_output", "last_hidden_state"):
        if getattr(output, name, None) is not None:
            output = getattr(output, name)
            break
    return tensors_in(output)


def _rows(tensors: Sequence[torch.Tensor]) -> int:
    return sum(t.numel() // t.shape[-1] for t in tensors if t.ndim and t.numel())


def _last_rows(trace: Trace, of_text: int) -> int:
    """Rows of what the last module that ran to its end gave out, the outermost of several, the text aside."""
    ended = [call for call in trace.calls if call.end and call.outputs]
    for call in sorted(ended, key=lambda call: (-call.end, call.start)):
        rows = prod(trace.values[call.outputs[0]].shape[:-1])
        if rows != of_text:
            return rows
    return 0
