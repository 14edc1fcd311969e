"""A batch norm beside a convolution: both read one value, and what they give is added up (RepVGG; Ding et al., 2021).

    r (a x + c) + N(W x)

with a constant r, 1 or -1 say. The convolution can carry the norm: a scale of each channel is a convolution too, whose
kernel is a diagonal in its middle.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from normswap.norms.spec import NormSpec
from normswap.observe.trace import Operation, Trace
from normswap.understand.transfer import Prober
from normswap.understand.trial import Axis, Trial
from normswap.understand.writing import Source, Writings


@dataclass(frozen=True)
class Bypass:
    """What can carry a norm.

    Attributes:
        norm: path of the norm that reads the convolution.
        source: the convolution's parameter.
        into: the axis of that parameter along the channels that are read, once or in each group of them.
        factor: r, how often the norm is in the sum for each time that the convolution is.
    """

    norm: str
    source: Source
    into: int
    factor: float


def bypasses(trace: Trace, norms: Mapping[str, NormSpec], prober: Prober, written: Writings) -> dict[str, Bypass]:
    """By path, what can carry those of the norms over `prober.width` channels that nothing writes to alone."""
    sums = _Sums(trace, prober)
    runs = Counter(op.norm for op in trace.norm_operations())
    found: dict[str, Bypass] = {}
    for op in trace.norm_operations():
        if op.norm in written.obstacles and runs[op.norm] == 1:
            dim = norms[op.norm].axes[0] % len(trace.values[op.inputs[0]].shape)
            for other, factor in sums.beside(op.outputs[0]):
                if runs[other.norm] == 1 and op.norm not in found:
                    carrier = _carrier(trace, prober, (op.inputs[0], dim), other.norm, written)
                    found |= {op.norm: replace(carrier, factor=factor)} if carrier else {}
    return found


def _carrier(trace: Trace, prober: Prober, x: tuple[int, int], norm: str, written: Writings) -> Bypass | None:
    """The convolution that the norm at the path `norm` reads, if it reads the value `x[0]`, with channels `x[1]`."""
    if norm not in written.sources or len(written.operations[norm]) != 1:
        return None
    ((index, source),) = written.operations[norm].items()
    op = trace.operations[index]
    parameter = next((i for i, v in enumerate(op.inputs) if trace.values[v].name == source.name), None)
    if x[0] not in op.inputs or parameter is None:
        return None
    axes = (op.inputs.index(x[0]), x[1]), (parameter, source.axis)
    into = prober.ask("carries", op, axes, lambda trial: carries(trial, *axes))
    return None if into is None else Bypass(norm, source, into, 1.0)


def carries(trial: Trial, x: Axis, parameter: Axis) -> int | None:
    """The axis of a parameter on which a diagonal, in the middle of all other axes, adds the scaled input `x`."""
    value, w = trial.base[x[0]], trial.base[parameter[0]]
    if value.shape != trial.result[0].shape or w.shape[parameter[1]] != trial.width:
        return None
    gain = 0.5 + torch.rand(trial.width, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    wanted = trial.result[0] + value * trial.spread(gain, value, x[1])
    channels = torch.arange(trial.width)
    for into in range(w.ndim):
        if into != parameter[1] and trial.width % w.shape[into] == 0:
            inputs, index = list(trial.base), [torch.full_like(channels, n // 2) for n in w.shape]
            index[parameter[1]], index[into] = channels, channels % w.shape[into]
            inputs[parameter[0]] = w.index_put(tuple(index), gain, accumulate=True)
            if not trial.differs(trial.run(inputs)[0], wanted):
                return into
    return None


class _Sums:
    """Sums of values that nothing else reads."""

    def __init__(self, trace: Trace, prober: Prober):
        self.trace, self.prober = trace, prober
        self.live, self.outputs, self.consumers = trace.live(), set(trace.outputs), trace.consumers()

    def beside(self, v: int) -> Iterator[tuple[Operation, float]]:
        """What else is added up with `v`: the operations that make it, and how often `v` counts for each time of it."""
        factor = 1.0
        while (adds := self._adds(v)) is not None:
            op, other, p, q = adds
            factor *= p
            yield from ((term, factor / times) for term, times in self._terms(other, op, q))
            (v,) = op.outputs

    def _adds(self, v: int) -> tuple[Operation, int, float, float] | None:
        """The sum that alone reads `v`, what it adds to that, and the coefficients of both."""
        readers = [op for op in self.consumers.get(v, ()) if any(o in self.live for o in op.outputs)]
        if v in self.outputs or len(readers) != 1 or readers[0].norm is not None:
            return None
        op = readers[0]
        if len(op.inputs) != 2 or len(op.outputs) != 1:
            return None
        mine = op.inputs.index(v)
        coefficients = self.prober.sum(op, mine, 1 - mine)
        return None if coefficients is None else (op, op.inputs[1 - mine], *coefficients)

    def _terms(self, v: int, reader: Operation, times: float) -> Iterator[tuple[Operation, float]]:
        """The operations whose results `v` is a sum of, and their coefficients; `v` counts `times`."""
        producer = self.trace.values[v].producer
        adds = self._adds(v)
        if producer is None or adds is None or adds[0] is not reader:
            return
        op = self.trace.operations[producer]
        inner = [(u, adds[2]) for u in op.inputs if (adds := self._adds(u)) is not None and adds[0] is op]
        if len(inner) == 2:
            for u, coefficient in inner:
                yield from self._terms(u, op, times * coefficient)
        else:
            yield op, times
