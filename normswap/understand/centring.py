"""Which writers make up each value along one width, and who would notice a shift of them.

One pass over a trace, in execution order: every axis of every value that could be centred carries its terms: the
sources (a parameter used in a module, or what a module gives out or takes in) that would have to be centred, and the
operations that put in a mean nothing controls. A source is blocked when a shift of it reaches an operation that answers
with anything but a shift.

A value that crosses a boundary of a module (see `boundary`) is a source of its own, and holds the terms it had before:
either those can be centred, or the value can be centred explicitly as it crosses.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from normswap.norms.spec import NormSpec
from normswap.observe.trace import Operation, Trace
from normswap.understand.boundary import boundaries
from normswap.understand.layerscale import Scales
from normswap.understand.transfer import Prober
from normswap.understand.trial import Axis

ValueAxis = tuple[int, int]


@dataclass(frozen=True)
class Writer:
    """Something that can be centred so that what it adds to a stream has no mean.

    Attributes:
        name: the parameter's or buffer's name, or the path of the module whose output or first input it is.
        kind: `parameter`, `buffer`, `output` or `input`.
        axis: the axis along the stream; counted from the end for an output or input.
        groups: how many runs of the stream's width lie side by side in that axis.
        module: path of the module that uses it.
        scales: parameters that scale each channel of what it writes, to be folded into it.
    """

    name: str
    kind: str
    axis: int
    groups: int
    module: str
    scales: tuple[str, ...] = ()


@dataclass(frozen=True)
class Uncentred:
    """A term of a value that nothing controls: which operation adds it, where, in words."""

    reason: str


Term = Writer | Uncentred
#: what a value consists of; None: nothing is known of it
Terms = frozenset[Term] | None


@dataclass
class Centring:
    """Result of the pass.

    Attributes:
        terms: per (value, dimension) what it consists of. An axis that is missing cannot be centred at all.
        held: per output and input, in execution order, the terms it had before; None if nothing but the crossing
            itself can be centred.
        blocked: per writer, why a shift of what it writes would be noticed (empty: nobody notices).
        inputs: per norm path, the terms of its input along the normalised axis; None where the input has none.
    """

    terms: dict[ValueAxis, frozenset[Term]] = field(default_factory=dict)
    held: dict[Writer, Terms] = field(default_factory=dict)
    blocked: dict[Writer, list[str]] = field(default_factory=dict)
    inputs: dict[str, Terms] = field(default_factory=dict)

    def leaves(self, terms: Terms) -> set[Term]:
        """The terms that are left when outputs and inputs are replaced by what they held."""
        found, todo = set(), list(terms or ())
        seen = set(todo)
        while todo:
            term = todo.pop()
            inner = self.held.get(term)
            if inner is None:
                found.add(term)
            else:
                todo += inner - seen
                seen |= inner
        return found


def centring(trace: Trace, norms: dict[str, NormSpec], prober: Prober) -> Centring:
    """Follow shifts along axes of `prober.width` channels through the trace."""
    return _Pass(trace, norms, prober).run()


class _Pass:
    def __init__(self, trace: Trace, norms: dict[str, NormSpec], prober: Prober):
        self.trace, self.norms, self.prober = trace, norms, prober
        self.live = trace.live()
        self.boundaries = boundaries(trace)
        self.scales = Scales(trace, self.live)
        self.result = Centring()

    def run(self) -> Centring:
        for value in self.trace.values:
            if value.producer is None and value.kind not in ("parameter", "buffer"):
                self._cross(value.index)
        for op in self.trace.operations:
            if not any(v in self.live for v in op.outputs):
                continue
            if op.norm is not None:
                self._through_norm(op)
            else:
                self._through(op)
                for v in op.outputs:
                    self._cross(v)
        for v in self.trace.outputs:
            for dim in self.prober.axes(self.trace.values[v].shape):
                self._block(self.result.terms.get((v, dim)), "the stream itself is an output of the model")
        for writer in self.result.blocked:
            for scale in writer.scales:
                if (obstacle := self.scales.obstacle(scale, writer.name)) is not None:
                    self._block({writer}, obstacle)
        self._pass_blocks_on()
        return self.result

    def _through(self, op: Operation) -> None:
        tracked: dict[tuple[int, int], frozenset[Term]] = {}
        for position, v in enumerate(op.inputs):
            for dim in self.prober.axes(self.trace.values[v].shape):
                if (terms := self._terms(op, v, dim)) is not None:
                    tracked[position, dim] = terms
        if not tracked:
            return
        transfer = self.prober.shift(op, tuple(tracked))
        if transfer.blocked and self._through_scale(op, tracked):
            return
        for axis, outputs in transfer.blocked.items():
            if any(op.outputs[o] in self.live for o in outputs):
                reason = f"{op.name} in {op.module or 'the model'} would notice a shift of its input"
                self._block(tracked[axis], reason)
        for (o, dim), joint in transfer.joint.items():
            terms = frozenset().union(*(tracked[axis] for axis in joint.passers))
            terms |= {self._uncentred(op, culprit) for culprit in joint.culprits}
            self.result.terms[op.outputs[o], dim] = terms
            self.scales.made[op.outputs[o], dim] = op, joint.passers, joint.scales and not joint.culprits

    def _through_scale(self, op: Operation, tracked: dict[Axis, frozenset[Term]]) -> bool:
        """Whether `op` multiplies by one parameter's value per channel, which folds into the writers of the rest."""
        for scale in tracked:
            rest = tuple(axis for axis in tracked if axis[0] != scale[0])
            transfer = self.prober.scaled(op, rest, scale) if rest else None
            if transfer is None or transfer.blocked or any(joint.culprits for joint in transfer.joint.values()):
                continue
            folds = [self.scales.fold(op, *((op.inputs[i], dim) for i, dim in (axis, scale))) for axis in rest]
            if not transfer.joint or None in folds:
                continue
            for axis in rest:  # before it is scaled, a shift is none of the stream's
                self._block(tracked[axis], f"{op.name} in {op.module or 'the model'} scales it by {folds[0][0]}")
            for (o, dim), joint in transfer.joint.items():
                terms = self.result.leaves(frozenset().union(*(tracked[axis] for axis in joint.passers)))
                if any(not isinstance(t, Writer) or t.kind != "parameter" or t.groups > 1 for t in terms):
                    continue
                scaled = {self._source(replace(t, scales=(*t.scales, folds[0][0]))) for t in terms}
                self.result.terms[op.outputs[o], dim] = frozenset(scaled)
                self.scales.made[op.outputs[o], dim] = op, joint.passers, joint.scales
            return True
        return False

    def _terms(self, op: Operation, v: int, dim: int) -> Terms:
        value = self.trace.values[v]
        if (v, dim) in self.result.terms:
            return self.result.terms[v, dim]
        if value.kind in ("parameter", "buffer") and value.is_float:
            groups = value.shape[dim] // self.prober.width
            return frozenset({self._source(Writer(value.name, value.kind, dim, groups, op.module))})
        if value.known is not None and value.is_float and not value.known.any():
            return frozenset()  # zeros, to be added into
        return None

    def _source(self, writer: Writer) -> Writer:
        self.result.blocked.setdefault(writer, [])
        return writer

    def _cross(self, v: int) -> None:
        """Where `v` crosses a boundary, its terms are hidden behind it."""
        boundary = self.boundaries.get(v)
        if boundary is None or v not in self.live:
            return
        value = self.trace.values[v]
        ndim = len(value.shape)
        # where nothing is known, of axes that may be the channels' the last is, but for rare layouts
        axes = self.prober.axes(value.shape)
        known = [dim for dim in axes if (v, dim) in self.result.terms]
        for dim in known or axes[-1:]:
            if value.shape[dim] != self.prober.width:
                continue
            before = self.result.terms.get((v, dim))
            if before == frozenset():
                continue  # centred as it is
            writer = self._source(Writer(boundary.module, boundary.kind, dim - ndim, 1, boundary.module))
            earlier = self.result.held.get(writer, frozenset())
            self.result.held[writer] = None if before is None or earlier is None else before | earlier
            self.result.terms[v, dim] = frozenset({writer})

    def _through_norm(self, op: Operation) -> None:
        spec, width, result = self.norms[op.norm], self.prober.width, self.result
        x, y = op.inputs[0], op.outputs[0]
        ndim = len(self.trace.values[x].shape)
        own = {axis % ndim for axis in spec.axes}
        for gate in op.inputs[1:]:
            for dim in self.prober.axes(self.trace.values[gate].shape):
                self._block(result.terms.get((gate, dim)), f"the gate of {op.norm} would notice a shift of it")
        for dim in self.prober.axes(self.trace.values[x].shape):
            terms = result.terms.get((x, dim))
            along = own == {dim} and spec.width == width
            if along:
                before = result.inputs.get(op.norm, frozenset())
                result.inputs[op.norm] = None if terms is None or before is None else before | terms
            if not (along and spec.kind == "layernorm"):
                self._block(terms, f"the {spec.kind} {op.norm} is not invariant to shifts")
            if along and spec.groups == 1:
                writer = self._source(Writer(op.norm, "output", dim - ndim, 1, op.norm))
                result.held[writer] = None
                result.terms[y, dim] = frozenset({writer})

    def _block(self, terms: Terms, reason: str) -> None:
        for term in terms or ():
            if isinstance(term, Writer) and reason not in self.result.blocked[term]:
                self.result.blocked[term].append(reason)

    def _pass_blocks_on(self) -> None:
        """A shift of what a crossing held is a shift of the crossing: whoever notices the one notices the other."""
        todo = list(self.result.held)
        while todo:
            writer = todo.pop()
            for term in self.result.held.get(writer) or ():
                if isinstance(term, Writer) and self.result.blocked[writer] and not self.result.blocked[term]:
                    self._block({term}, self.result.blocked[writer][0])
                    todo.append(term)

    def _uncentred(self, op: Operation, culprit: int) -> Uncentred:
        """The term that input `culprit` of `op` adds, or the operation itself (-1)."""
        where = op.module or "the model"
        if culprit < 0:
            return Uncentred(f"{op.name} in {where} gives its output a mean")
        value = self.trace.values[op.inputs[culprit]]
        if value.producer is None:
            return Uncentred(f"{op.name} in {where} adds {value.name or 'an input of the model'}, which has a mean")
        source = self.trace.operations[value.producer]
        return Uncentred(
            f"the result of {source.name} in {source.module or 'the model'} enters the stream in {where}, "
            f"and nothing here can centre it"
        )
