"""How one operation passes a change of its inputs on, found by running it on random tensors: no list of operations.

The questions are in `shift`, `scale` and `rotation`, how an operation is run again in `trial`; here they are asked,
each once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch

from normswap.observe.trace import Operation, Ref, Trace, Value
from normswap.understand import rotation
from normswap.understand.rotation import RotationTransfer, rotation_transfer
from normswap.understand.scale import (
    ScaleTransfer,
    Writes,
    factor,
    rearranges,
    scale_transfer,
    sum_coefficients,
    write_transfer,
)
from normswap.understand.shift import ShiftTransfer, all_blocked, scaled_transfer, shift_transfer
from normswap.understand.trial import Axis, Trial

_LARGEST_PROBE = 1 << 24  # elements; beyond that an operation counts as unknown
# what was found of operations of any trace: models repeat themselves, and are looked at more than once
_answers: dict[tuple, object] = {}
_MOST_ANSWERS = 50_000


class Prober:
    """Answers, and remembers, how the operations of one trace treat changes along axes of `width` channels."""

    def __init__(self, trace: Trace, width: int):
        self.trace, self.width = trace, width
        self.memory: dict[tuple, object] = {}
        self.fingerprints: dict[int, str] = {}

    def shift(self, op: Operation, tracked: tuple[Axis, ...]) -> ShiftTransfer:
        return self._remember(
            "shift", op, tracked, lambda trial: shift_transfer(trial, tracked), all_blocked(op, tracked)
        )

    def scaled(self, op: Operation, tracked: tuple[Axis, ...], scale: Axis) -> ShiftTransfer | None:
        """As `shift`, of an operation that also multiplies by `scale`, one value per channel; None if it does not."""
        return self._remember(
            "scaled", op, (scale, *tracked), lambda trial: scaled_transfer(trial, tracked, scale), None
        )

    def scale(self, op: Operation, scales: tuple[Axis, ...], parameters: tuple[Axis, ...] = ()) -> ScaleTransfer:
        unknown = ScaleTransfer(other=tuple(range(len(op.outputs))))
        return self._remember(
            "scale", op, (*scales, None, *parameters), lambda trial: scale_transfer(trial, scales, parameters), unknown
        )

    def writes(self, op: Operation, made: Axis, parameters: tuple[Axis, ...]) -> Writes | None:
        """By which of `parameters` each channel of the output axis `made` can be scaled; None: by none of them."""
        if not parameters:
            return None
        return self._remember(
            "writes", op, (made, None, *parameters), lambda trial: write_transfer(trial, made, parameters), None
        )

    def rotation(self, op: Operation, tracked: tuple[Axis, ...]) -> RotationTransfer:
        """Which of these axes are rotated together, and which cannot be."""
        unknown = rotation.all_blocked(op, tracked)
        return self._remember("rotation", op, tracked, lambda trial: rotation_transfer(trial, tracked), unknown)

    def sum(self, op: Operation, a: int, b: int) -> tuple[float, float] | None:
        """`(p, q)` when the first output is `p * input[a] + q * input[b]` with constants p and q, else None."""
        return self._remember("sum", op, ((a, 0), (b, 0)), lambda trial: sum_coefficients(trial, a, b), None)

    def factor(self, op: Operation, position: int) -> float:
        """The constant by which an operation that passes scales of `input[position]` multiplies it."""
        return self._remember("factor", op, ((position, 0),), lambda trial: factor(trial, position), 1.0)

    def rearranges(self, op: Operation, position: int) -> bool:
        """Whether the first output holds values of `input[position]`, times one constant, and nothing else."""
        return self._remember("rearranges", op, ((position, 0),), lambda trial: rearranges(trial, position), False)

    def spreading(self, op: Operation, ask) -> frozenset[int]:
        """Positions of the inputs of which one value reaches several outputs, as `ask` finds them."""
        return self._remember("spreading", op, (), ask, frozenset())

    def ask(self, question: str, op: Operation, axes: tuple[Axis, ...], ask):
        """What `ask` finds out of some axes of `op` by trying it, None where it cannot be tried."""
        return self._remember(question, op, axes, ask, None)

    def axes(self, shape: tuple[int, ...]) -> list[int]:
        """Dimensions of `shape` that hold whole runs of `width`."""
        return [i for i, n in enumerate(shape) if n >= self.width and n % self.width == 0]

    def _remember(self, question: str, op: Operation, axes: tuple[Axis, ...], ask, unknown):
        key = (question, axes, self._signature(op))
        if key not in self.memory:
            lasting = self._lasting(op, key)
            if lasting not in _answers:
                trial = next(self._trials(op), None)
                answer = unknown if trial is None else ask(trial)
                if lasting is None or len(_answers) >= _MOST_ANSWERS:
                    self.memory[key] = answer
                    return answer
                _answers[lasting] = answer
            self.memory[key] = _answers[lasting]
        return self.memory[key]

    def _lasting(self, op: Operation, key: tuple) -> tuple | None:
        """`key` with all else that an answer depends on; None where an argument is an object with an identity."""
        if op.function is None or any(" at 0x" in repr(leaf) for leaf in op.leaves):
            return None
        values = [self.trace.values[v] for v in op.inputs]
        outputs = tuple((v.shape, v.dtype) for v in (self.trace.values[o] for o in op.outputs))
        mutated = tuple(op.inputs.index(v) for v in op.mutated)
        return *key, self.width, outputs, mutated, tuple(v.varies for v in values), torch.get_default_dtype()

    def _signature(self, op: Operation) -> tuple:
        """Operations with equal signatures do the same."""

        def describe(leaf):
            if not isinstance(leaf, Ref):
                return repr(leaf)
            value = self.trace.values[leaf.value]
            return op.inputs.index(leaf.value), value.shape, str(value.dtype), value.kind, self._fingerprint(value)

        return op.function, str(op.spec), tuple(describe(leaf) for leaf in op.leaves)

    def _fingerprint(self, value: Value) -> str | None:
        """Of the values a trial may use: constants of one shape may differ in what they do."""
        if value.real is None or (value.varies and value.is_float):
            return None
        if value.index not in self.fingerprints:
            data = (
                value.real.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().tobytes()
            )
            self.fingerprints[value.index] = hashlib.sha256(data).hexdigest()
        return self.fingerprints[value.index]

    def _trials(self, op: Operation) -> Iterator[Trial]:
        """Ways to run the operation, cheapest first; the first that gives the right shapes is enough."""
        for threshold in (16, 512, 1 << 62):
            trial = Trial(self.trace, op, self.width, threshold)
            if trial.elements <= _LARGEST_PROBE and trial.runs():
                yield trial
