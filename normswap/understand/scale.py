"""What an operation makes of scales, `x -> x diag(g)`, and of translations, `x -> x + b`, of an axis of its input.

Both may be passed on alike, or absorbed by a parameter, `f(x diag(g), W) = f(x, W diag(g))`, which makes that
parameter a reader. A parameter may also make them, `f(x, W diag(g)) = f(x, W) diag(g)`, which makes it a writer. Sums,
constant factors and rearrangements, which residual steps are made of, are told here as well.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch

from normswap.understand.trial import Axis, Trial


@dataclass(frozen=True)
class Absorber:
    """A parameter that takes over a scale of the input, and where a translation of the input can go.

    Attributes:
        parameter: the input axis of the parameter that meets the scaled axis.
        sums: axes of the parameter, multiplied by a translation along its own axis, whose sum is what the translation
            does: that axis alone for a matrix, the kernel's too for a convolution.
        bias: the input that takes over a translation, None if there is none.
        grows: a translation of the input translates the output by that sum along one axis: a new bias could do it.
    """

    parameter: Axis
    sums: tuple[int, ...]
    bias: int | None
    grows: bool


@dataclass(frozen=True)
class ScaleTransfer:
    """What one scale of some input axes at once does: `passes` (to output axes; `translates` if translations pass too),
    is absorbed, leaves outputs as they are (all empty), or does anything else to the outputs `other`."""

    passes: tuple[Axis, ...] = ()
    translates: bool = False
    absorbers: tuple[Absorber, ...] = ()
    other: tuple[int, ...] = ()


def scale_transfer(trial: Trial, scales: tuple[Axis, ...], parameters: tuple[Axis, ...]) -> ScaleTransfer:
    generator = torch.Generator().manual_seed(2)
    gain = 0.5 + 1.5 * torch.rand(trial.width, generator=generator, dtype=torch.float64)
    gain[::2] *= -1  # of both signs: a relu passes positive gains on, and trained ones need not be
    shift = torch.randn(trial.width, generator=generator, dtype=torch.float64)
    scaled, translated = list(trial.base), list(trial.base)
    for position, dim in scales:
        scaled[position] = scaled[position] * trial.spread(gain, trial.base[position], dim)
        translated[position] = translated[position] + trial.spread(shift, trial.base[position], dim)
    changing = {position for position, _ in scales}
    after, moved = trial.run(scaled), trial.run(translated)

    changed = [o for o in range(len(after)) if trial.differs(after[o], trial.result[o])]
    if not changed:
        return ScaleTransfer(other=tuple(o for o in range(len(moved)) if trial.differs(moved[o], trial.result[o])))
    passes, translates = [], True
    for o in changed:
        before = trial.result[o]
        along = [e for e in trial.axes(o) if not trial.differs(after[o], before * trial.spread(gain, before, e))]
        if len(along) != 1:
            break
        passes.append((o, along[0]))
        translates &= not trial.differs(moved[o], before + trial.spread(shift, before, along[0]))
    else:
        return ScaleTransfer(passes=tuple(passes), translates=translates)

    absorbers = []
    for parameter, pdim in parameters:
        w = trial.base[parameter]
        if w.shape[pdim] % trial.width or parameter in changing:
            continue
        countered = list(scaled)
        countered[parameter] = w / trial.spread(gain, w, pdim)
        if all(not trial.differs(a, b) for a, b in zip(trial.run(countered), trial.result, strict=True)):
            absorbers.append(_absorber(trial, (parameter, pdim), parameters, shift, moved, changing))
    return ScaleTransfer(absorbers=tuple(absorbers), other=() if absorbers else tuple(changed))


def _absorber(
    trial: Trial, parameter: Axis, parameters: tuple[Axis, ...], shift, moved, changing: set[int]
) -> Absorber:
    """Where a translation of the input goes: into another input, into a bias that is not there yet, or nowhere."""
    w, pdim = trial.base[parameter[0]], parameter[1]
    met = w * trial.spread(shift, w, pdim)
    keeping_one = (tuple(d for d in range(w.ndim) if d != kept) for kept in range(w.ndim) if kept != pdim)
    ways = {sums: met.sum(sums) for sums in dict.fromkeys([(pdim,), *keeping_one])}
    for candidate in dict.fromkeys(p for p, _ in parameters) | dict.fromkeys(range(len(trial.inputs))):
        value = trial.inputs[candidate]
        if candidate in {parameter[0], *changing} or value.kind == "constant" or not value.is_float:
            continue
        for sums, carried in ways.items():
            if trial.base[candidate].shape != carried.shape:
                continue
            inputs = list(trial.base)
            inputs[candidate] = inputs[candidate] + carried
            if all(not trial.differs(a, b) for a, b in zip(trial.run(inputs), moved, strict=True)):
                return Absorber(parameter, sums, candidate, False)
    for sums, carried in ways.items():
        if carried.ndim == 1 and any(_adds(trial, moved, carried, from_end) for from_end in (1, 2, 3, 4)):
            return Absorber(parameter, sums, None, True)
    return Absorber(parameter, (pdim,), None, False)


def _adds(trial: Trial, moved: list[torch.Tensor], vector: torch.Tensor, from_end: int) -> bool:
    """Whether every output moved by `vector` along its axis `-from_end`: 1 for a linear map, 3 for images."""
    for after, before in zip(moved, trial.result, strict=True):
        if before.ndim < from_end or before.shape[-from_end] != len(vector):
            return False
        if trial.differs(after, before + vector.reshape(-1, *[1] * (from_end - 1))):
            return False
    return True


@dataclass(frozen=True)
class Writes:
    """A parameter that scales the output, and where a translation of the output can come from.

    Attributes:
        parameter: the input axis of the parameter that lies along the scaled axis.
        bias: the input that translates the output and is scaled along with it, None if there is none.
        grows: an input that was not given would translate the output.
    """

    parameter: Axis
    bias: int | None
    grows: bool


def write_transfer(trial: Trial, made: Axis, parameters: tuple[Axis, ...]) -> Writes | None:
    """The parameter among `parameters` through which each channel of the output axis `made` can be scaled."""
    generator = torch.Generator().manual_seed(5)
    gain = 0.5 + torch.rand(trial.width, generator=generator, dtype=torch.float64)
    gain[::2] *= -1
    shift = torch.randn(trial.width, generator=generator, dtype=torch.float64)
    o, dim = made
    along = trial.spread(shift, trial.result[o], dim)
    scaled = _with(trial.result, o, trial.result[o] * trial.spread(gain, trial.result[o], dim))
    moved = _with(trial.result, o, trial.result[o] + along)

    def same(inputs: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
        return all(not trial.differs(a, b) for a, b in zip(trial.run(inputs), wanted, strict=True))

    def times(inputs: list[torch.Tensor], axis: Axis) -> list[torch.Tensor]:
        w = inputs[axis[0]]
        return _with(inputs, axis[0], w * trial.spread(gain, w, axis[1]))

    for parameter in parameters:
        countered = times(trial.base, parameter)
        if same(countered, scaled):
            return Writes(parameter, None, _grows(trial, moved, shift))
        for bias in parameters:
            vector = trial.base[bias[0]]
            if bias[0] == parameter[0] or vector.numel() != trial.width or not same(times(countered, bias), scaled):
                continue
            added = _with(trial.base, bias[0], vector + shift.reshape(vector.shape))
            return Writes(parameter, bias[0] if same(added, moved) else None, False)
    return None


def _grows(trial: Trial, moved: list[torch.Tensor], shift: torch.Tensor) -> bool:
    """Whether one of the arguments that were not given would translate the output, were it `shift`."""
    for position, leaf in enumerate(trial.op.leaves):
        if leaf is None:
            given = copy.copy(trial)
            given.op = replace(trial.op, leaves=[shift if i == position else v for i, v in enumerate(trial.op.leaves)])
            try:
                if all(not trial.differs(a, b) for a, b in zip(given.run(trial.base), moved, strict=True)):
                    return True
            except (RuntimeError, TypeError, ValueError):
                continue  # it takes something else there
    return False


def _with(values: list[torch.Tensor], position: int, value: torch.Tensor) -> list[torch.Tensor]:
    return [value if i == position else v for i, v in enumerate(values)]


def factor(trial: Trial, position: int) -> float:
    """|a| for `y = a x`, rearranged: adding a constant to x adds `a` times that constant."""
    return round(abs(signed_factor(trial, position)), 9)


def signed_factor(trial: Trial, position: int) -> float:
    """a for `y = a x`, rearranged."""
    moved = list(trial.base)
    moved[position] = moved[position] + 1
    added = (trial.run(moved)[0] - trial.result[0]).flatten()
    return float(added[added.abs().argmax()])


def rearranges(trial: Trial, position: int) -> bool:
    """Whether each value of the first output is a value of that input, times one constant: no mean, no mixture."""
    values = (signed_factor(trial, position) * trial.base[position]).double().flatten().sort().values
    made = trial.result[0].flatten()
    if not values.numel() or not made.numel():
        return False
    after = torch.searchsorted(values, made).clamp(1, max(len(values) - 1, 1))
    nearest = torch.minimum((values[after - 1] - made).abs(), (values[after % len(values)] - made).abs())
    return float(nearest.max()) <= trial.tolerance * float(values.abs().max())


def sum_coefficients(trial: Trial, a: int, b: int) -> tuple[float, float] | None:
    generator = torch.Generator().manual_seed(3)
    coefficients = []
    for position in (a, b):
        noise = torch.randn(trial.base[position].shape, generator=generator, dtype=torch.float64)
        inputs = list(trial.base)
        inputs[position] = inputs[position] + noise
        moved = trial.run(inputs)[0] - trial.result[0]
        if moved.shape != noise.shape:
            return None
        coefficient = float((moved * noise).sum() / noise.square().sum())
        if coefficient == 0 or trial.differs(moved, coefficient * noise):
            return None
        coefficients.append(coefficient)
    rest = trial.result[0] - coefficients[0] * trial.base[a] - coefficients[1] * trial.base[b]
    if float(rest.abs().max()) > trial.tolerance * 10 * float(trial.result[0].abs().max()):
        return None
    return round(coefficients[0], 9), round(coefficients[1], 9)
