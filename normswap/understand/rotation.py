"""What an operation makes of rotations: `x -> R x` along an axis of `width` channels, R orthogonal.

Axes of an operation's inputs and outputs belong together when one rotation of them all leaves the operation true:
`f(R a, R b, ..) = R f(a, b, ..)` along an axis of the output (what writes, and sums of it), or `f(R a, R b, ..) = f(a,
b, ..)` (what is read by a weight, `(W R^T)(R x) = W x`). What answers a rotation in any other way is blocked: its axis
has to stay in the basis that it is in. Rotations are stricter than shifts and scales of channels: an operation that
acts channel by channel passes none on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations

import torch

from normswap.observe.trace import Operation
from normswap.understand.trial import Axis, Trial


@dataclass(frozen=True)
class Together:
    """Axes that are rotated together or not at all.

    Attributes:
        inputs, outputs: the axes.
        culprits: positions of inputs that add to an output what is not rotated with it, -1 for the operation itself;
            empty: nothing does.
    """

    inputs: tuple[Axis, ...]
    outputs: tuple[Axis, ...]
    culprits: tuple[int, ...] = ()


@dataclass(frozen=True)
class RotationTransfer:
    """`blocked`: per tracked input axis that cannot be rotated, the outputs that would notice."""

    together: tuple[Together, ...]
    blocked: dict[Axis, tuple[int, ...]]


def all_blocked(op: Operation, tracked: tuple[Axis, ...]) -> RotationTransfer:
    return RotationTransfer((), {axis: tuple(range(len(op.outputs))) for axis in tracked})


def rotation_transfer(trial: Trial, tracked: tuple[Axis, ...]) -> RotationTransfer:
    return _Question(trial, tracked).answer()


class _Question:
    def __init__(self, trial: Trial, tracked: tuple[Axis, ...]):
        self.trial, self.tracked = trial, tracked
        self.generator = torch.Generator().manual_seed(5)
        self.one = self._rotation()

    def answer(self) -> RotationTransfer:
        groups: dict[Axis, set[Axis]] = {axis: {axis} for axis in self.tracked}  # by each member
        outputs: dict[Axis, set[Axis]] = {}  # output axis -> input axes whose rotation comes out along it
        stuck: dict[Axis, set[int]] = {}
        for axis in self.tracked:
            reached, other = self._alone(axis)
            for along in reached:
                outputs.setdefault(along, set()).add(axis)
            if other:
                stuck[axis] = other
        for passers in outputs.values():
            _unite(groups, passers)
        met: set[Axis] = set()
        for a, b in combinations(stuck, 2):
            if a[0] != b[0] and self._cancel(a, b, stuck[a] | stuck[b]):
                _unite(groups, {a, b})
                met |= {a, b}
        blocked = {axis: tuple(sorted(found)) for axis, found in stuck.items() if axis not in met}
        together = []
        for group in {id(g): g for g in groups.values()}.values():
            ins = tuple(axis for axis in self.tracked if axis in group)
            outs = tuple(along for along, passers in outputs.items() if passers & group)
            if (hindered := [axis for axis in ins if axis in blocked]) and len(ins) > 1:
                blocked |= {axis: blocked[hindered[0]] for axis in ins if axis not in blocked}
            if not hindered:
                together.append(Together(ins, outs))
        return self._proved(together, blocked)

    def _alone(self, axis: Axis) -> tuple[list[Axis], set[int]]:
        """Where a rotation of one input axis comes out, and the outputs on which it does anything else."""
        trial, (position, dim) = self.trial, axis
        base = trial.base[position]
        noise = torch.randn(base.shape, generator=self.generator, dtype=torch.float64).to(base.dtype)
        turned = self._run({axis: self.one})
        moved = trial.run(_replaced(trial.base, position, base + noise))
        both = trial.run(_replaced(trial.base, position, base + self._turned(noise, dim, self.one)))
        reached, stuck = [], set()
        for o, before in enumerate(trial.result):
            if not trial.differs(turned[o], before):
                continue
            scale = max(float(before.abs().max()), float(moved[o].abs().max()))
            along = []
            for e in trial.axes(o):
                # of a sum, what is added is rotated; of anything else, all of it
                added = both[o] - before - self._turned(moved[o] - before, e, self.one)
                if _small(trial, added, scale) or not trial.differs(turned[o], self._turned(before, e, self.one)):
                    along.append((o, e))
            reached += along
            if not along:
                stuck.add(o)
        return reached, stuck

    def _cancel(self, a: Axis, b: Axis, outputs: Iterable[int]) -> bool:
        """Whether the same rotation of both is noticed by none of `outputs`."""
        turned = self._run({a: self.one, b: self.one})
        return all(not self.trial.differs(turned[o], self.trial.result[o]) for o in outputs)

    def _proved(self, found: list[Together], blocked: dict[Axis, tuple[int, ...]]) -> RotationTransfer:
        """The axes that `found` names, tried on what the model has there, each by itself and then all at once."""
        good, result = [], []
        for group in found:
            if self._holds([group]):
                good.append(group)
            else:
                result.append(Together(group.inputs, group.outputs, self._culprits(group)))
        if len(good) > 1 and not self._holds(good):
            good = [Together(group.inputs, group.outputs, (-1,)) for group in good]
        return RotationTransfer((*good, *result), blocked)

    def _culprits(self, group: Together) -> tuple[int, ...]:
        own = {position for position, _ in group.inputs}
        others = [i for i, v in enumerate(self.trial.inputs) if v.is_float and i not in own]
        single = [i for i in others if self._holds([group], zeroed=i)]
        return tuple(single) or tuple(others) or (-1,)

    def _holds(self, groups: list[Together], zeroed: int | None = None) -> bool:
        """Whether rotating each group by a rotation of its own rotates its outputs by the same, and no others."""
        trial = self.trial
        inputs = trial.actual
        if zeroed is not None:
            inputs = _replaced(inputs, zeroed, torch.zeros_like(inputs[zeroed]))
        expected = list(trial.run(inputs))
        by: dict[Axis, torch.Tensor] = {}
        for group in groups:
            rotation = self._rotation()
            by |= dict.fromkeys(group.inputs, rotation)
            for o, e in group.outputs:
                expected[o] = self._turned(expected[o], e, rotation)
        made = self._run(by, inputs)
        return not any(trial.differs(a, b) for a, b in zip(made, expected, strict=True))

    def _run(self, by: Mapping[Axis, torch.Tensor], inputs: list[torch.Tensor] | None = None) -> list[torch.Tensor]:
        inputs = list(self.trial.base if inputs is None else inputs)
        for (position, dim), rotation in by.items():
            inputs[position] = self._turned(inputs[position], dim, rotation)
        return self.trial.run(inputs)

    def _turned(self, x: torch.Tensor, dim: int, rotation: torch.Tensor) -> torch.Tensor:
        """`x` with each run of `width` values along `dim` rotated."""
        split = x.unflatten(dim, (-1, self.trial.width)).movedim(dim + 1, -1)
        return (split @ rotation.T.to(x.dtype)).movedim(-1, dim + 1).flatten(dim, dim + 1)

    def _rotation(self) -> torch.Tensor:
        width = self.trial.width
        return torch.linalg.qr(torch.randn(width, width, generator=self.generator, dtype=torch.float64))[0]


def _unite(groups: dict[Axis, set[Axis]], axes: Iterable[Axis]) -> None:
    union = set().union(*(groups[axis] for axis in axes))
    groups.update(dict.fromkeys(union, union))


def _replaced(inputs: list[torch.Tensor], position: int, value: torch.Tensor) -> list[torch.Tensor]:
    return [value if i == position else x for i, x in enumerate(inputs)]


def _small(trial: Trial, x: torch.Tensor, scale: float) -> bool:
    return bool(torch.isfinite(x).all()) and float(x.abs().max()) <= trial.tolerance * 10 * scale
