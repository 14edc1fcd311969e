"""What an operation makes of shifts: `x -> x + c`, with `c` constant along each run of `width` channels of an axis.

An operation may not notice a shift of an input, may hand a shift of the same kind on along an axis of its output, or
may do anything else, which blocks. Given all inputs that pass shifts on, centring them must centre the output, `P
f(x) = f(P x)` with P the projection `x - mean(x)`; where it does not, the inputs that put a mean back are named.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch

from normswap.observe.trace import Operation
from normswap.understand.trial import Axis, Trial


@dataclass(frozen=True)
class Joint:
    """An output axis that is centred when `passers` are, but for what `culprits` (input positions) add.

    `scales`: scaling each channel of all passers scales that channel of the output.
    """

    passers: tuple[Axis, ...]
    culprits: tuple[int, ...]
    scales: bool


@dataclass(frozen=True)
class ShiftTransfer:
    """What shifts of some inputs do to the outputs.

    Attributes:
        blocked: for each tracked input axis, the outputs that change in another way than by a shift.
        joint: for each output axis that shifts reach, how it comes to be centred.
    """

    blocked: dict[Axis, tuple[int, ...]]
    joint: dict[Axis, Joint]


def shift_transfer(trial: Trial, tracked: tuple[Axis, ...]) -> ShiftTransfer:
    generator = torch.Generator().manual_seed(1)
    blocked: dict[Axis, tuple[int, ...]] = {}
    reached: dict[Axis, list[Axis]] = {}
    for position, dim in tracked:
        shifted = list(trial.base)
        shifted[position] = _shifted(trial, trial.base[position], dim, generator)
        stuck = []
        for o, (before, after) in enumerate(zip(trial.result, trial.run(shifted), strict=True)):
            if not trial.differs(before, after):
                continue
            along = [e for e in trial.axes(o) if _constant(trial, after - before, e, before)]
            for e in along:
                reached.setdefault((o, e), []).append((position, dim))
            if not along:
                stuck.append(o)
        if stuck:
            blocked[position, dim] = tuple(stuck)
    joint: dict[Axis, Joint] = {}
    for (o, e), passers in reached.items():
        found = _joint(trial, o, e, passers)
        if found is not None:
            joint[o, e] = found
    _drop_ambiguous(joint)
    for axis in tracked:
        # a shift that left no trace as one along an axis that can be centred is not understood
        lost = {o for (o, _), passers in reached.items() if axis in passers}
        lost -= {o for (o, _), found in joint.items() if axis in found.passers}
        if lost:
            blocked[axis] = tuple(sorted({*blocked.get(axis, ()), *lost}))
    return ShiftTransfer(blocked, joint)


def _drop_ambiguous(joint: dict[Axis, Joint]) -> None:
    """A vector added along one axis is a constant along any other: where equal sizes leave a choice, one will do.

    An axis that all the same shifts reach, and that comes out centred, is the one to follow.
    """
    for o in {o for o, _ in joint}:
        mine = {e: found for (output, e), found in joint.items() if output == o}
        reaching = {axis for found in mine.values() for axis in found.passers}
        clean = [e for e, found in mine.items() if not found.culprits and set(found.passers) == reaching]
        if clean and any(found.culprits for found in mine.values()):
            for e in mine.keys() - set(clean):
                del joint[o, e]


def _shifted(trial: Trial, x: torch.Tensor, dim: int, generator: torch.Generator) -> torch.Tensor:
    """`x` plus noise that is constant along each run of `dim` and varies along everything else."""
    shape = list(x.shape)
    shape[dim] = x.shape[dim] // trial.width
    dtype = torch.complex128 if x.is_complex() else torch.float64
    noise = 3 * torch.randn(shape, generator=generator, dtype=dtype)
    return x + noise.repeat_interleave(trial.width, dim)


def _constant(trial: Trial, difference: torch.Tensor, dim: int, around: torch.Tensor) -> bool:
    rest = trial.centred(difference, dim)
    scale = max(float(difference.abs().max()), float(around.abs().max()))
    return bool(torch.isfinite(rest).all()) and float(rest.abs().max()) <= trial.tolerance * 10 * scale


def _joint(trial: Trial, o: int, e: int, passers: list[Axis]) -> Joint | None:
    """Whether projecting all passers projects the output, and which inputs leave a mean in it."""

    def project(inputs: list[torch.Tensor], zeroed: int | None = None) -> torch.Tensor:
        inputs = list(inputs)
        for position, dim in passers:
            inputs[position] = trial.centred(inputs[position], dim)
        if zeroed is not None:
            inputs[zeroed] = torch.zeros_like(inputs[zeroed])
        return trial.run(inputs)[o]

    projected = project(trial.base)
    if not _constant(trial, trial.result[o] - projected, e, trial.result[o]):
        return None
    scales = _scales(trial, o, e, passers)
    actual = project(trial.actual)
    if _is_centred(trial, actual, e):
        return Joint(tuple(passers), (), scales)
    involved = {position for position, _ in passers}
    others = [i for i, v in enumerate(trial.inputs) if v.is_float and i not in involved]
    single = [i for i in others if _is_centred(trial, project(trial.actual, zeroed=i), e)]
    return Joint(tuple(passers), tuple(single) or tuple(others) or (-1,), scales)


def _scales(trial: Trial, o: int, e: int, passers: list[Axis]) -> bool:
    gain = 0.5 + torch.rand(trial.width, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    inputs = list(trial.actual)
    for position, dim in passers:
        inputs[position] = inputs[position] * trial.spread(gain, inputs[position], dim)
    before = trial.run(trial.actual)[o]
    return not trial.differs(trial.run(inputs)[o], before * trial.spread(gain, before, e))


def scaled_transfer(trial: Trial, tracked: tuple[Axis, ...], scale: Axis) -> ShiftTransfer | None:
    """What shifts do when one input is a scale per channel, `y = f(x) diag(s)`: those of `f`. None if it is none.

    Args:
        tracked: axes that shifts come along, none of the scale itself.
        scale: the axis of the input that may be such a scale; it has no other axis.
    """
    position, dim = scale
    s = trial.base[position]
    if s.numel() != trial.width:
        return None
    without = copy.copy(trial)
    without.base = [torch.ones_like(x) if i == position else x for i, x in enumerate(trial.base)]
    without.actual = [torch.ones_like(x) if i == position else x for i, x in enumerate(trial.actual)]
    without.result = trial.run(without.base)
    found = shift_transfer(without, tracked)
    vector = s.reshape(-1)
    for o, e in found.joint:
        bare = without.result[o]
        if bare.shape[e] != trial.width or trial.differs(trial.result[o], bare * trial.spread(vector, bare, e)):
            return None
    return found


def _is_centred(trial: Trial, x: torch.Tensor, dim: int) -> bool:
    mean = x.unflatten(dim, (-1, trial.width)).mean(dim + 1)
    return bool(torch.isfinite(mean).all()) and float(mean.abs().max()) <= trial.tolerance * 10 * float(x.abs().max())


def all_blocked(op: Operation, tracked: tuple[Axis, ...]) -> ShiftTransfer:
    return ShiftTransfer({axis: tuple(range(len(op.outputs))) for axis in tracked}, {})
