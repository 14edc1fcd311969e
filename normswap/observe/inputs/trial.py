"""Trials on the meta device: which of several inputs runs, what it reaches, how many features it gives."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from normswap.observe.recorder import Recorder, tensors_in
from normswap.observe.run import meta_twin

Inputs = dict[str, Any]


class Trial:
    """Runs a model's structure on candidate inputs; no weights are read."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._twin: PreTrainedModel | None = None

    @property
    def twin(self) -> PreTrainedModel:
        if self._twin is None:
            self._twin = meta_twin(self.model)
        return self._twin

    def first_that_runs(self, candidates: Sequence[Inputs]) -> Inputs:
        """The first of `candidates` that runs to the end; where none does, the one that got furthest."""
        best, furthest = candidates[0], -1
        for inputs in candidates:
            recorder, output = self._run(inputs)
            if output is not None:
                return inputs
            if len(recorder.trace.operations) > furthest:
                best, furthest = inputs, len(recorder.trace.operations)
        return best

    def with_what_reaches_more(self, inputs: Inputs, extras: Sequence[Inputs]) -> Inputs:
        """`inputs`, and the first of `extras` with which more modules run than without."""
        if not extras:
            return inputs
        recorder, _ = self._run(inputs)
        reached = {call.path for call in recorder.trace.calls}
        for extra in extras:
            recorder, output = self._run({**inputs, **extra})
            if output is not None and {call.path for call in recorder.trace.calls} > reached:
                return {**inputs, **extra}
        return inputs

    def features(self, method: str, candidates: Sequence[Inputs]) -> tuple[Inputs, int] | None:
        """The first of `candidates` that `method` takes, and how many features it makes of it in all."""
        signature = inspect.signature(operator.attrgetter(method)(self.model)).parameters
        named = {p.name for p in signature.values() if p.kind is p.POSITIONAL_OR_KEYWORD}
        for inputs in candidates:
            known = {name: value for name, value in inputs.items() if name in named} if named else inputs
            _, output = self._run(known, method)
            count = _count(output)
            if count:
                return inputs, count
        return None

    def _run(self, inputs: Inputs, method: str | None = None) -> tuple[Recorder, Any]:
        recorder = Recorder(self.twin, inputs, "ends")
        function = self.twin if method is None else operator.attrgetter(method)(self.twin)
        try:
            with torch.no_grad(), recorder.module_hooks(), recorder:
                return recorder, function(**inputs)
        except Exception:  # a trial: whatever is raised means that these inputs do not fit
            return recorder, None


def _count(output: Any) -> int:
    """Rows of the features that stand for placeholders: what a tower pools, else what it puts out last."""
    for name in ("pooler_output", "last_hidden_state"):
        if getattr(output, name, None) is not None:
            output = getattr(output, name)
            break
    tensors = [t for t in tensors_in(output) if t.ndim]
    return sum(t.numel() // t.shape[-1] for t in tensors if t.numel())
