"""How one operation passes a change of its inputs on, found by running it on random tensors: no list of operations.

Two changes of a value along an axis of `width` channels are of interest (an axis may hold several runs of `width`
side by side, as heads do):

- a shift, `x -> x + c` with `c` constant along each run. An operation may not notice it (`same`), may hand a shift of
  the same kind on along an axis of its output (`passes`), or anything else (`blocks`). Given all inputs that pass,
  centring them must centre the output (`P f(x) = f(P x)`, P the projection `x - mean(x)`); where it does not, the
  inputs that put a mean back are named.
- a scale, `x -> x diag(g)`, and a translation, `x -> x + b`: passed on alike, or absorbed by a parameter, `f(x diag(g),
  W) = f(x, W diag(g))`, which makes that parameter a reader.

Operations on large tensors are tried on small ones: each large size is replaced by a small one, equal sizes by equal
ones, and the output's shape must come out accordingly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from normswap.observe.trace import Operation, Ref, Trace, Value

#: an axis of an operation's input or output: (position among inputs or outputs, dimension)
Axis = tuple[int, int]

_EXACT = 1e-9  # float64 throughout
_ROUNDED = 1e-5  # where a call casts to float32 by name
_LARGEST_PROBE = 1 << 24  # elements; beyond that an operation counts as unknown
_SMALL_SIZES = (7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97, 101, 103)


@dataclass(frozen=True)
class Joint:
    """An output axis that is centred when `passers` are, but for what `culprits` (input positions) add."""

    passers: tuple[Axis, ...]
    culprits: tuple[int, ...]


@dataclass(frozen=True)
class ShiftTransfer:
    """What shifts of some inputs do to the outputs.

    Attributes:
        blocked: for each tracked input axis, the outputs that change in another way than by a shift.
        joint: for each output axis that shifts reach, how it comes to be centred.
    """

    blocked: dict[Axis, tuple[int, ...]]
    joint: dict[Axis, Joint]


@dataclass(frozen=True)
class Absorber:
    """A parameter that takes over a scale of the input, and where a translation of the input can go.

    Attributes:
        parameter: the input axis of the parameter that meets the scaled axis.
        bias: the input that takes over a translation, None if there is none.
        grows: a translation of the input translates the output along its last axis by `W b`: a new bias could do it.
    """

    parameter: Axis
    bias: int | None
    grows: bool


@dataclass(frozen=True)
class ScaleTransfer:
    """What a scale of one input axis does: `passes` (to output axes; `translates` if translations pass too), is
    absorbed, leaves outputs as they are (all empty), or does anything else to the outputs `other`."""

    passes: tuple[Axis, ...] = ()
    translates: bool = False
    absorbers: tuple[Absorber, ...] = ()
    other: tuple[int, ...] = ()


class Prober:
    """Answers, and remembers, how the operations of one trace treat changes along axes of `width` channels."""

    def __init__(self, trace: Trace, width: int):
        self.trace, self.width = trace, width
        self.memory: dict[tuple, object] = {}
        self.fingerprints: dict[int, str] = {}

    def shift(self, op: Operation, tracked: tuple[Axis, ...]) -> ShiftTransfer:
        return self._remember("shift", op, tracked, lambda trial: _shift(trial, tracked), _all_blocked(op, tracked))

    def scale(self, op: Operation, axis: Axis, parameters: tuple[Axis, ...]) -> ScaleTransfer:
        unknown = ScaleTransfer(other=tuple(range(len(op.outputs))))
        return self._remember("scale", op, (axis, *parameters), lambda trial: _scale(trial, axis, parameters), unknown)

    def sum(self, op: Operation, a: int, b: int) -> tuple[float, float] | None:
        """`(p, q)` when the first output is `p * input[a] + q * input[b]` with constants p and q, else None."""
        return self._remember("sum", op, ((a, 0), (b, 0)), lambda trial: _sum(trial, a, b), None)

    def factor(self, op: Operation, position: int) -> float:
        """The constant by which an operation that passes scales of `input[position]` multiplies it."""
        return self._remember("factor", op, ((position, 0),), lambda trial: _factor(trial, position), 1.0)

    def axes(self, shape: tuple[int, ...]) -> list[int]:
        """Dimensions of `shape` that hold whole runs of `width`."""
        return [i for i, n in enumerate(shape) if n >= self.width and n % self.width == 0]

    def _remember(self, question: str, op: Operation, axes: tuple[Axis, ...], ask, unknown):
        key = (question, axes, self._signature(op))
        if key not in self.memory:
            self.memory[key] = unknown
            for trial in self._trials(op):
                self.memory[key] = ask(trial)
                break
        return self.memory[key]

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
            data = value.real.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            self.fingerprints[value.index] = hashlib.sha256(data).hexdigest()
        return self.fingerprints[value.index]

    def _trials(self, op: Operation) -> Iterator[Trial]:
        """Ways to run the operation, cheapest first; the first that gives the right shapes is enough."""
        for threshold in (16, 512, 1 << 62):
            trial = Trial(self.trace, op, self.width, threshold)
            if trial.elements <= _LARGEST_PROBE and trial.runs():
                yield trial


def _all_blocked(op: Operation, tracked: tuple[Axis, ...]) -> ShiftTransfer:
    return ShiftTransfer({axis: tuple(range(len(op.outputs))) for axis in tracked}, {})


class Trial:
    """One operation made ready to run again on random tensors, large sizes replaced by small ones."""

    def __init__(self, trace: Trace, op: Operation, width: int, threshold: int):
        self.op = op
        self.inputs = [trace.values[v] for v in op.inputs]
        self.outputs = [trace.values[v] for v in op.outputs]
        shapes = [v.shape for v in (*self.inputs, *self.outputs)]
        self.sizes = _small_sizes({n for shape in shapes for n in shape}, width, threshold)
        self.width = self.sizes.get(width, width)
        self.elements = sum(_numel(self._small(v.shape)) for v in self.inputs)
        self.tolerance = _ROUNDED if op.name in ("float", "half", "bfloat16") else _EXACT

    def _small(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self.sizes.get(n, n) for n in shape)

    def runs(self) -> bool:
        # a mask made from the inputs is another one next time; but as an index it must hit as often as it did
        return self._runs_on(hits=False) or (any(v.varies for v in self.inputs) and self._runs_on(hits=True))

    def _runs_on(self, hits: bool) -> bool:
        generator = torch.Generator().manual_seed(0)
        self.base = [_random(v, self._small(v.shape), generator, hits) for v in self.inputs]
        # what the model itself computes without parameters (zeros to add into, say) is known
        self.actual = [_known(v, x) for v, x in zip(self.inputs, self.base, strict=True)]
        try:
            self.result = self.run(self.base)
        except Exception:  # any error means that these sizes do not fit this operation
            return False
        expected = [self._small(v.shape) for v in self.outputs]
        return [tuple(t.shape) for t in self.result] == expected

    def run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Outputs as float64 (complex ones, which pairs of reals would give another axis, as a sum of their parts)."""
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # the CPU's alone: trials run there
            made = self.op.call(dict(zip(self.op.inputs, inputs, strict=True)), self.sizes)
        return [(t.real + 0.618 * t.imag if t.is_complex() else t).double() for t in made]

    def axes(self, output: int) -> list[int]:
        """Axes of an output that hold runs of `width`, by its true shape."""
        shape, small = self.outputs[output].shape, self.result[output].shape
        return [i for i, n in enumerate(small) if n >= self.width and n % self.width == 0 and shape[i] > 1]

    def differs(self, a: torch.Tensor, b: torch.Tensor) -> bool:
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            return True
        scale = max(float(a.abs().max()), float(b.abs().max())) if a.numel() else 0.0
        return a.numel() > 0 and float((a - b).abs().max()) > self.tolerance * max(scale, 1e-30)

    def spread(self, vector: torch.Tensor, x: torch.Tensor, dim: int) -> torch.Tensor:
        """`vector` of shape `(width,)` repeated over the runs of `dim`, shaped to act on `x`."""
        runs = x.shape[dim] // self.width
        return vector.repeat(runs).reshape([-1 if i == dim else 1 for i in range(x.ndim)])

    def centred(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        split = x.unflatten(dim, (-1, self.width))
        return (split - split.mean(dim + 1, keepdim=True)).flatten(dim, dim + 1)


def _numel(shape: tuple[int, ...]) -> int:
    product = 1
    for n in shape:
        product *= n
    return product


def _small_sizes(sizes: set[int], width: int, threshold: int) -> dict[int, int]:
    """A small stand-in for every size above the threshold: distinct ones, and multiples of the width stay multiples."""
    large = sorted(n for n in sizes | {width} if n > threshold)
    taken = {n for n in sizes if n <= threshold}
    free = (n for n in _SMALL_SIZES if n not in taken)
    mapping: dict[int, int] = {}
    if width > threshold:
        mapping[width] = next(free)
    small_width = mapping.get(width, width)
    for n in large:
        if n in mapping:
            continue
        multiple = n // width * small_width if n % width == 0 else 0
        if multiple and multiple not in taken and multiple not in mapping.values():
            mapping[n] = multiple
        else:
            mapping[n] = next((k for k in free if k not in mapping.values() and k % small_width), n)
    return mapping


def _random(value: Value, shape: tuple[int, ...], generator: torch.Generator, hits: bool) -> torch.Tensor:
    if value.dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    if value.dtype.is_complex:
        return torch.randn(shape, generator=generator, dtype=torch.complex128)
    real = value.real if hits else value.known
    if real is not None and shape == value.shape:
        # indices must stay valid after sizes shrank: small ones always are
        return real if value.dtype == torch.bool else real.clamp(-2, 2)
    return torch.randint(0, 2, shape, generator=generator, dtype=torch.int64).to(value.dtype)


def _known(value: Value, stand_in: torch.Tensor) -> torch.Tensor:
    real = value.known
    if real is None or not value.is_float or real.numel() == 0 or not torch.isfinite(real).all():
        return stand_in
    first = real.reshape(-1)[0]
    if (real == first).all():
        return torch.full_like(stand_in, float(first))
    return real.double() if real.shape == stand_in.shape else stand_in


# -- shifts ------------------------------------------------------------------------------------------------------


def _shift(trial: Trial, tracked: tuple[Axis, ...]) -> ShiftTransfer:
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
    actual = project(trial.actual)
    if _is_centred(trial, actual, e):
        return Joint(tuple(passers), ())
    involved = {position for position, _ in passers}
    others = [i for i, v in enumerate(trial.inputs) if v.is_float and i not in involved]
    single = [i for i in others if _is_centred(trial, project(trial.actual, zeroed=i), e)]
    return Joint(tuple(passers), tuple(single) or tuple(others) or (-1,))


def _is_centred(trial: Trial, x: torch.Tensor, dim: int) -> bool:
    mean = x.unflatten(dim, (-1, trial.width)).mean(dim + 1)
    return bool(torch.isfinite(mean).all()) and float(mean.abs().max()) <= trial.tolerance * 10 * float(x.abs().max())


# -- scales and translations -------------------------------------------------------------------------------------


def _scale(trial: Trial, axis: Axis, parameters: tuple[Axis, ...]) -> ScaleTransfer:
    generator = torch.Generator().manual_seed(2)
    gain = 0.5 + 1.5 * torch.rand(trial.width, generator=generator, dtype=torch.float64)
    shift = torch.randn(trial.width, generator=generator, dtype=torch.float64)
    position, dim = axis
    x = trial.base[position]
    scaled, translated = list(trial.base), list(trial.base)
    scaled[position] = x * trial.spread(gain, x, dim)
    translated[position] = x + trial.spread(shift, x, dim)
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
        if w.shape[pdim] != trial.width or parameter == position:
            continue
        countered = list(scaled)
        countered[parameter] = w / trial.spread(gain, w, pdim)
        if all(not trial.differs(a, b) for a, b in zip(trial.run(countered), trial.result, strict=True)):
            absorbers.append(_absorber(trial, (parameter, pdim), parameters, shift, moved, position))
    return ScaleTransfer(absorbers=tuple(absorbers), other=() if absorbers else tuple(changed))


def _absorber(trial, parameter: Axis, parameters, shift, moved, position) -> Absorber:
    w = trial.base[parameter[0]]
    carried = torch.tensordot(w, shift, dims=([parameter[1]], [0]))
    for candidate in dict.fromkeys(p for p, _ in parameters) | dict.fromkeys(range(len(trial.inputs))):
        value = trial.inputs[candidate]
        if candidate in (parameter[0], position) or value.kind == "constant" or not value.is_float:
            continue
        if trial.base[candidate].shape != carried.shape:
            continue
        inputs = list(trial.base)
        inputs[candidate] = inputs[candidate] + carried
        if all(not trial.differs(a, b) for a, b in zip(trial.run(inputs), moved, strict=True)):
            return Absorber(parameter, candidate, False)
    grows = carried.ndim == 1 and all(
        b.shape[-1:] == carried.shape and not trial.differs(a, b + carried)
        for a, b in zip(moved, trial.result, strict=True)
    )
    return Absorber(parameter, None, grows)


def _factor(trial: Trial, position: int) -> float:
    """For `y = a x`, rearranged: adding a constant to x adds `a` times that constant."""
    moved = list(trial.base)
    moved[position] = moved[position] + 1
    return round(float((trial.run(moved)[0] - trial.result[0]).abs().max()), 9)


# -- sums --------------------------------------------------------------------------------------------------------


def _sum(trial: Trial, a: int, b: int) -> tuple[float, float] | None:
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
