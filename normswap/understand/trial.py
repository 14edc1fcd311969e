"""One operation, made ready to run again on small random tensors.

Operations on large tensors are tried on small ones: each large size is replaced by a small one, equal sizes by equal
ones, and the output's shape must come out accordingly.
"""

from __future__ import annotations

import torch

from normswap.observe.trace import Operation, Trace, Value

#: an axis of an operation's input or output: (position among inputs or outputs, dimension)
Axis = tuple[int, int]

_EXACT = 1e-9  # float64 throughout
_ROUNDED = 1e-5  # where a call casts to float32 by name
_SMALL_SIZES = (7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97, 101, 103)


class Trial:
    """One operation made ready to run again on random tensors, large sizes replaced by small ones."""

    def __init__(self, trace: Trace, op: Operation, width: int, threshold: int):
        self.op = op
        self.inputs = [trace.values[v] for v in op.inputs]
        self.outputs = [trace.values[v] for v in op.outputs]
        shapes = [v.shape for v in (*self.inputs, *self.outputs)]
        self.sizes = _small_sizes({n for shape in shapes for n in shape}, width, threshold)
        self.true_width, self.width = width, self.sizes.get(width, width)
        self.elements = sum(_numel(self._small(v.shape)) for v in self.inputs)
        self.tolerance = _ROUNDED if op.name in ("float", "half", "bfloat16") else _EXACT

    def _small(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self.sizes.get(n, n) for n in shape)

    def runs(self) -> bool:
        if any(k % self.width for n, k in self.sizes.items() if n % self.true_width == 0):
            return False  # what held whole runs of the width no longer does
        if self._runs_on():
            return True
        # a mask made from the inputs is another one next time; but as an index it must hit as often as it did, and
        # into a table of one row there is one index. What is not reached so is hidden, and not known.
        hits = any(v.varies for v in self.inputs) and self._runs_on(hits=True)
        return (hits or self._runs_on(indices=1)) and self._each_counts()

    def _each_counts(self) -> bool:
        """Whether each floating input has a part in the outputs."""
        for position, v in enumerate(self.inputs):
            if v.is_float:
                changed = list(self.base)
                changed[position] = changed[position] + 1
                after = self.run(changed)
                if not any(self.differs(a, b) for a, b in zip(after, self.result, strict=True)):
                    return False
        return True

    def _runs_on(self, hits: bool = False, indices: int = 2) -> bool:
        generator = torch.Generator().manual_seed(0)
        self.base = [_random(v, self._small(v.shape), generator, hits, indices) for v in self.inputs]
        # what the model itself computes without parameters (zeros to add into, say) is known
        self.actual = [_known(v, x) for v, x in zip(self.inputs, self.base, strict=True)]
        try:
            self.result = self.run(self.base)
        except Exception:  # any error means that these sizes do not fit this operation
            return False
        made = [tuple(t.shape) for t in self.result]
        return len(made) == len(self.outputs) and all(map(self._fits, made, self.outputs))

    def _fits(self, made: tuple[int, ...], output: Value) -> bool:
        """Whether an output came out as it had to: sizes of the inputs in their small form, and new ones (a sum of
        sizes, a product) that hold whole runs of the width where the true ones do."""
        inputs = {n for v in self.inputs for n in v.shape}
        return len(made) == len(output.shape) and all(
            small == self.sizes.get(n, n)
            or (n in self.sizes and n not in inputs and (small % self.width == 0) == (n % self.true_width == 0))
            for small, n in zip(made, output.shape, strict=True)
        )

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


def _random(value: Value, shape: tuple[int, ...], generator: torch.Generator, hits: bool, indices: int) -> torch.Tensor:
    if value.dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    if value.dtype.is_complex:
        return torch.randn(shape, generator=generator, dtype=torch.complex128)
    real = value.real if hits else value.known
    if real is not None and shape == value.shape:
        # indices must stay valid after sizes shrank: small ones always are
        return real if value.dtype == torch.bool else real.clamp(-2, 2)
    if value.dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator, dtype=torch.int64).bool()
    if value.known is not None and all(small <= n for small, n in zip(shape, value.shape, strict=True)):
        # a constant of the model is cut to size: an index that is the same for all channels stays so
        return value.known[tuple(slice(n) for n in shape)] % indices
    return torch.randint(0, indices, shape, generator=generator, dtype=torch.int64).to(value.dtype)


def _known(value: Value, stand_in: torch.Tensor) -> torch.Tensor:
    real = value.known
    if real is None or not value.is_float or real.numel() == 0 or not torch.isfinite(real).all():
        return stand_in
    first = real.reshape(-1)[0]
    if (real == first).all():
        return torch.full_like(stand_in, float(first))
    return real.double() if real.shape == stand_in.shape else stand_in
