"""Which axes of values and parameters are in one basis: what is rotated together when a stream is carried as `R x`.

One pass over a trace, in execution order. Every axis of a parameter that may lie along a stream, and every axis of a
value that operations make of such, is an element; operations tell which belong together (see `rotation`), and which
have to stay as they are. An RMSNorm over the axis gives out what it takes in, in the same basis:

    n(R x) = R x / sqrt(mean((R x)^2) + eps) = R n(x),

up to its gain and bias, which have to move into its readers first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from normswap.norms.spec import NormSpec
from normswap.observe.trace import Operation, Trace
from normswap.understand.transfer import Prober


@dataclass(frozen=True)
class Along:
    """One axis of a parameter or buffer, as `module` uses it."""

    name: str
    kind: str
    axis: int
    module: str


@dataclass
class Basis:
    """Axes that are rotated together.

    Attributes:
        parameters: axes of parameters and buffers, in order of use.
        norms: paths of the norms that act along them.
        values: `(value, dimension)` of the trace.
        outputs: names of inner values along them that the model gives out besides what it makes of them.
        blocked: why they have to stay in the basis that they are in; empty: any other will do.
    """

    parameters: list[Along] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    values: set[tuple[int, int]] = field(default_factory=set)
    outputs: list[str] = field(default_factory=list)
    blocked: list[str] = field(default_factory=list)


class Bases:
    """The pass, and what it found.

    Args:
        norms: behaviour of the trace's opaque norms.
        prober: of the width of the stream.
    """

    def __init__(self, trace: Trace, norms: dict[str, NormSpec], prober: Prober):
        self.trace, self.norms, self.prober = trace, norms, prober
        self.parents: list[int] = []
        self.elements: dict[Along | tuple[int, int], int] = {}
        self.norm_at: dict[str, list[int]] = {}
        self.reasons: dict[int, list[str]] = {}
        live = trace.live()
        for op in trace.operations:
            if any(v in live for v in op.outputs):
                (self._through if op.norm is None else self._through_norm)(op, live)
        self.inner = self._inner()
        for v in trace.outputs:
            for dim in range(len(trace.values[v].shape)):
                if (v, dim) in self.elements and v not in self.inner:
                    self._block(self.elements[v, dim], "it is an output of the model")

    def found(self, name: Callable[[str, str], str]) -> list[Basis]:
        """The bases, where `name` tells as which tensor a module holds a parameter: uses of one tensor are one."""
        parents = list(self.parents)
        same: dict[tuple[str, int], int] = {}
        for element, index in self.elements.items():
            if isinstance(element, Along):
                first = same.setdefault((name(element.name, element.module), element.axis), index)
                parents[_root(parents, index)] = _root(parents, first)
        bases: dict[int, Basis] = {}
        for element, index in self.elements.items():
            basis = bases.setdefault(_root(parents, index), Basis())
            if isinstance(element, Along):
                basis.parameters.append(element)
            else:
                basis.values.add(element)
                if element[0] in self.inner:
                    basis.outputs.append(self.inner[element[0]])
        for path, indices in self.norm_at.items():
            for root in dict.fromkeys(_root(parents, index) for index in indices):
                bases[root].norms.append(path)
        for index, reasons in self.reasons.items():
            bases[_root(parents, index)].blocked += reasons
        return list(bases.values())

    def _inner(self) -> dict[int, str]:
        """Names of outputs that are no result: the model goes on from them to what it gives out first, or later."""
        first, *others = self.trace.outputs
        ancestors = self.trace.ancestors()
        results = [v for v in self.trace.outputs if v in self.trace.names]
        return {
            v: self.trace.names[v]
            for v in others
            if v in self.trace.names and any(ancestors[u] >> v & 1 for u in results if u != v)
        }

    def _through(self, op: Operation, live: set[int]) -> None:
        tracked: dict[tuple[int, int], int] = {}
        for position, v in enumerate(op.inputs):
            value = self.trace.values[v]
            for dim in self.prober.axes(value.shape):
                if (v, dim) in self.elements:
                    tracked[position, dim] = self.elements[v, dim]
                elif value.kind in ("parameter", "buffer") and value.is_float:
                    tracked[position, dim] = self._element(Along(value.name, value.kind, dim, op.module))
        if not tracked:
            return
        where = op.module or "the model"
        transfer = self.prober.rotation(op, tuple(tracked))
        for axis, outputs in transfer.blocked.items():
            if any(op.outputs[o] in live for o in outputs):
                self._block(tracked[axis], f"{op.name} in {where} acts on single channels of it")
        for group in transfer.together:
            first = tracked[group.inputs[0]]
            for axis in group.inputs[1:]:
                self._unite(first, tracked[axis])
            for o, dim in group.outputs:
                self._unite(first, self._element((op.outputs[o], dim)))
            if group.culprits:
                self._block(first, self._added(op, group.culprits[0]))

    def _through_norm(self, op: Operation, live: set[int]) -> None:
        spec, x, y = self.norms[op.norm], op.inputs[0], op.outputs[0]
        own = {axis % len(self.trace.values[x].shape) for axis in spec.axes}
        plain = spec.kind in ("layernorm", "rmsnorm") and spec.groups == 1 and spec.width == self.prober.width
        for v in op.inputs:
            for dim in self.prober.axes(self.trace.values[v].shape):
                if (v, dim) not in self.elements:
                    continue
                element = self.elements[v, dim]
                if v == x and own == {dim} and plain and len(op.inputs) == 1:
                    self._unite(element, self._element((y, dim)))
                    self.norm_at.setdefault(op.norm, []).append(element)
                else:
                    self._block(element, f"{op.norm} normalises a part of it, or is gated by it")

    def _added(self, op: Operation, culprit: int) -> str:
        """What input `culprit` of `op` adds, or the operation itself (-1)."""
        where = op.module or "the model"
        if culprit < 0:
            return f"{op.name} in {where} does more than pass it on"
        value = self.trace.values[op.inputs[culprit]]
        if value.producer is None:
            return f"{op.name} in {where} adds {value.name or 'an input of the model'} to it, which no weight controls"
        source = self.trace.operations[value.producer]
        return (
            f"the result of {source.norm or source.name} in {source.module or 'the model'} is added to it in {where}, "
            f"and no weight can rotate that"
        )

    def _element(self, element: Along | tuple[int, int]) -> int:
        if element not in self.elements:
            self.elements[element] = len(self.parents)
            self.parents.append(len(self.parents))
        return self.elements[element]

    def _unite(self, a: int, b: int) -> None:
        self.parents[_root(self.parents, b)] = _root(self.parents, a)

    def _block(self, element: int, reason: str) -> None:
        if reason not in self.reasons.setdefault(element, []):
            self.reasons[element].append(reason)


def _root(parents: list[int], index: int) -> int:
    while parents[index] != index:
        parents[index] = parents[parents[index]]
        index = parents[index]
    return index
