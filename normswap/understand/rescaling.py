"""A scale of some values followed through all that reads them: where it ends, and whether anything else would notice.

Scaled weights and norms give scaled values, a multiplication taken out leaves its product divided. An operation may
not see the scale of its inputs, or hand it on, `f(s x) = s f(x)`, when all of them have it; anything else notices. A
norm takes it away, `N(s x; eps) = N(x; eps / s^2)`. When all that is left is norms, they alone have to change.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from normswap.norms.spec import NormSpec
from normswap.observe.trace import Operation, Trace
from normswap.understand.transfer import Prober
from normswap.understand.trial import Trial

_SAME = 1e-12  # relative


class Noticed(Exception):
    """Something would notice the scale; the message says what."""


def rescaled(
    trace: Trace,
    norms: Mapping[str, NormSpec],
    prober: Prober,
    parameters: Mapping[str, float],
    outputs: Mapping[str, float],
    removed: Mapping[int, float],
    ending: Collection[str],
) -> dict[str, float]:
    """Follow the scales of values.

    Args:
        parameters: by how much parameters and buffers are scaled.
        outputs: by how much what norms give is scaled, by path.
        removed: operations that multiply, by index, and by how much; they are taken out.
        ending: norms that may read something scaled.

    Returns:
        The norms of `ending` that do, by path, and how it is scaled.

    Raises:
        Noticed: something else would make another thing of it than a norm or a scale does.
    """
    follow = _Follow(trace, norms, prober, ending)
    for value in trace.values:
        if value.kind in ("parameter", "buffer") and value.name in parameters:
            follow.scales[value.index] = parameters[value.name]
    for op in trace.operations:
        if op.norm is not None:
            follow.through_norm(op, outputs.get(op.norm, 1.0))
        elif op.index in removed:
            follow.set(op.outputs, math.prod(follow.of(v) for v in op.inputs) / removed[op.index])
        else:
            follow.through(op)
    for v in (*trace.outputs, *trace.reads):
        if v in follow.scales:
            raise Noticed("it is an output of the model, or decides what the model does")
    return {path: scale for path, scale in follow.ended.items() if scale != 1}


class _Follow:
    def __init__(self, trace: Trace, norms: Mapping[str, NormSpec], prober: Prober, ending: Collection[str]):
        self.trace, self.norms, self.prober, self.ending = trace, norms, prober, ending
        self.live = trace.live()
        self.scales: dict[int, float] = {}
        self.ended: dict[str, float] = {}

    def of(self, v: int) -> float:
        return self.scales.get(v, 1.0)

    def set(self, values: Collection[int], scale: float) -> None:
        if not math.isclose(scale, 1.0, rel_tol=_SAME):
            self.scales.update(dict.fromkeys(values, scale))

    def through_norm(self, op: Operation, gives: float) -> None:
        scale = self.of(op.inputs[0])
        if any(v in self.scales for v in op.inputs) and (op.norm not in self.ending or len(op.inputs) > 1):
            raise Noticed(f"the norm {op.norm} reads it")
        if not math.isclose(self.ended.setdefault(op.norm, scale), scale, rel_tol=_SAME):
            raise Noticed(f"the norm {op.norm} runs several times, and reads it in one of them")
        self.set(op.outputs, gives)

    def through(self, op: Operation) -> None:
        positions = [i for i, v in enumerate(op.inputs) if v in self.scales]
        if not positions or not any(o in self.live for o in op.outputs):
            return
        where = f"{op.name} in {op.module or 'the model'}"
        scale = self.scales[op.inputs[positions[0]]]
        if any(not math.isclose(self.scales[op.inputs[i]], scale, rel_tol=_SAME) for i in positions):
            raise Noticed(f"{where} reads it in two scales")
        together = tuple((i, 0) for i in positions)
        handed = self.prober.ask("scaled together", op, together, lambda trial: _handed(trial, positions))
        if handed is None:
            raise Noticed(f"{where} makes something else of it")
        self.set([op.outputs[o] for o in handed], scale)


def _handed(trial: Trial, positions: list[int]) -> tuple[int, ...] | None:
    """The outputs that are scaled as these inputs are, the others being as they were; None: some are neither."""
    before = trial.run(trial.actual)
    after = {}
    for scale in (0.5, 3.0):
        after[scale] = trial.run([scale * x if i in positions else x for i, x in enumerate(trial.actual)])
    found = []
    for o, value in enumerate(before):
        if any(not trial.differs(made[o], scale * value) for scale, made in after.items()) and value.any():
            found.append(o)
            wanted = {scale: scale * value for scale in after}
        else:
            wanted = dict.fromkeys(after, value)
        if any(trial.differs(made[o], wanted[scale]) for scale, made in after.items()):
            return None
    return tuple(found)
