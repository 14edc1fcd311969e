"""Which writers make up each value along one width, and who would notice a shift of them.

One pass over a trace, in execution order: every axis of every value that could be centred carries its terms: the
sources (a parameter used in a module, or a norm's output) that would have to be centred, and the operations that put in
a mean nothing controls. A source is blocked when a shift of it reaches an operation that answers with anything but a
shift.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from normswap.norms.spec import NormSpec
from normswap.observe.trace import Operation, Trace
from normswap.understand.transfer import Prober

ValueAxis = tuple[int, int]


@dataclass(frozen=True)
class Writer:
    """Something that can be centred so that what it adds to a stream has no mean.

    Attributes:
        name: the parameter's or buffer's name, or the path of the norm module whose output it is.
        kind: `parameter`, `buffer` or `norm`.
        axis: the axis along the stream; of the output for a norm.
        groups: how many runs of the stream's width lie side by side in that axis.
        module: path of the module that uses it.
    """

    name: str
    kind: str
    axis: int
    groups: int
    module: str


@dataclass(frozen=True)
class Uncentred:
    """A term of a value that nothing controls: which operation adds it, where, in words."""

    reason: str


Term = Writer | Uncentred


@dataclass
class Centring:
    """Result of the first pass.

    Attributes:
        terms: per (value, dimension) what it consists of. An axis that is missing cannot be centred at all.
        blocked: per writer, why a shift of what it writes would be noticed (empty: nobody notices).
        inputs: per norm path, the terms of its input along the normalised axis; None where the input has none.
    """

    terms: dict[ValueAxis, frozenset[Term]] = field(default_factory=dict)
    blocked: dict[Writer, list[str]] = field(default_factory=dict)
    inputs: dict[str, frozenset[Term] | None] = field(default_factory=dict)


def centring(trace: Trace, norms: dict[str, NormSpec], prober: Prober) -> Centring:
    """Follow shifts along axes of `prober.width` channels through the trace."""
    result = Centring()
    live = trace.live()
    for op in trace.operations:
        if not any(v in live for v in op.outputs):
            continue
        if op.norm is not None:
            _through_norm(trace, op, norms[op.norm], prober, result)
            continue
        tracked: dict[tuple[int, int], frozenset[Term]] = {}
        for position, v in enumerate(op.inputs):
            for dim in prober.axes(trace.values[v].shape):
                if (terms := _terms(trace, op, v, dim, prober, result)) is not None:
                    tracked[position, dim] = terms
        if not tracked:
            continue
        transfer = prober.shift(op, tuple(tracked))
        for axis, outputs in transfer.blocked.items():
            if any(op.outputs[o] in live for o in outputs):
                _block(
                    result, tracked[axis], f"{op.name} in {op.module or 'the model'} would notice a shift of its input"
                )
        for (o, dim), joint in transfer.joint.items():
            terms = frozenset().union(*(tracked[axis] for axis in joint.passers))
            terms |= {_uncentred(trace, op, culprit) for culprit in joint.culprits}
            result.terms[op.outputs[o], dim] = terms
    for v in trace.outputs:
        for dim in prober.axes(trace.values[v].shape):
            _block(result, result.terms.get((v, dim), frozenset()), "the stream itself is an output of the model")
    return result


def _terms(trace: Trace, op: Operation, v: int, dim: int, prober: Prober, result: Centring) -> frozenset[Term] | None:
    value = trace.values[v]
    if (v, dim) in result.terms:
        return result.terms[v, dim]
    if value.kind in ("parameter", "buffer") and value.is_float:
        groups = value.shape[dim] // prober.width
        writer = Writer(value.name, value.kind, dim, groups, op.module)
        result.blocked.setdefault(writer, [])
        return frozenset({writer})
    if value.known is not None and value.is_float and not value.known.any():
        return frozenset()  # zeros, to be added into
    return None


def _block(result: Centring, terms: frozenset[Term], reason: str) -> None:
    for term in terms:
        if isinstance(term, Writer) and reason not in result.blocked[term]:
            result.blocked[term].append(reason)


def _uncentred(trace: Trace, op: Operation, culprit: int) -> Uncentred:
    """The term that input `culprit` of `op` adds, or the operation itself (-1)."""
    where = op.module or "the model"
    if culprit < 0:
        return Uncentred(f"{op.name} in {where} gives its output a mean")
    value = trace.values[op.inputs[culprit]]
    if value.producer is None:
        return Uncentred(f"{op.name} in {where} adds {value.name or 'an input of the model'}, which has a mean")
    source = trace.operations[value.producer]
    return Uncentred(
        f"the result of {source.name} in {source.module or 'the model'} enters the stream in {where}, "
        f"and nothing here can centre it"
    )


def _through_norm(trace: Trace, op: Operation, spec: NormSpec, prober: Prober, result: Centring) -> None:
    x, y = op.inputs[0], op.outputs[0]
    ndim = len(trace.values[x].shape)
    own = {axis % ndim for axis in spec.axes}
    for dim in prober.axes(trace.values[x].shape):
        terms = result.terms.get((x, dim))
        if own == {dim} and spec.width == prober.width:
            before = result.inputs.get(op.norm, frozenset())
            result.inputs[op.norm] = None if terms is None or before is None else before | terms
        if terms and not (own == {dim} and spec.width == prober.width and spec.kind == "layernorm"):
            _block(result, terms, f"the {spec.kind} {op.norm} is not invariant to shifts")
        if own == {dim} and spec.width == prober.width:
            writer = Writer(op.norm, "norm", dim - ndim, 1, op.norm)
            result.blocked.setdefault(writer, [])
            result.terms[y, dim] = frozenset({writer})
