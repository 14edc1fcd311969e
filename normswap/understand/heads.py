"""Queries and keys: which module gives them, and where in its output each head stands.

An operation where two activations meet, each of them from one weight matrix, brings queries and keys together. Their
channels are followed from the matrix on by running the operations in between on labels, as long as they only rearrange.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from normswap.observe.trace import Operation, Trace
from normswap.understand.mixing import Meetings


@dataclass(frozen=True)
class Heads:
    """Queries or keys as a module gives them.

    Attributes:
        name: `q` or `k`.
        module: path of the module whose last axis they stand on.
        starts: where on it each head begins.
        width: how many channels a head has.
    """

    name: str
    module: str
    starts: tuple[int, ...]
    width: int


@dataclass(frozen=True)
class NoHeads:
    """Why queries or keys that meet in `module` cannot be got hold of."""

    module: str
    reason: str


def find_heads(trace: Trace, meetings: Meetings, base: Callable[[int], int]) -> list[Heads | NoHeads]:
    """The queries and keys of a model, in the order in which they meet; each module's once.

    Args:
        base: the value that another is a view or copy of.
    """
    found: dict[Heads | NoHeads, None] = {}
    # what a module gives, by the value that it is a view of; of modules that give the same, the inner one
    outputs = {base(call.outputs[0]): (call.path, call.outputs[0]) for call in trace.calls if call.plain}
    for op in trace.operations:
        if not meetings.meet(op):
            continue
        pair = [v for v in op.inputs if meetings.is_activation(v)]
        ways = [_Way(trace, meetings, v) for v in pair]
        if len(ways) != 2 or not all(way.begins for way in ways):
            continue
        width = trace.values[pair[0]].shape[-1]
        for name, way in zip("qk", ways, strict=True):
            given = {outputs[base(v)] if base(v) in outputs else None for v in way.begins}
            found[_heads(trace, meetings, way, name, op.module, width, given)] = None
    return list(found)


class _Way:
    """What lies between a value that meets another and the matrices that it comes from.

    Attributes:
        value: that meets another.
        operations: by index.
        begins: outputs of the operations with a matrix; empty where the way leads through another meeting.
        norms: paths of norms on it.
    """

    def __init__(self, trace: Trace, meetings: Meetings, value: int):
        self.value = value
        self.operations: dict[int, Operation] = {}
        self.begins: set[int] = set()
        self.norms: set[str] = set()
        todo = [value]
        while todo:
            v = todo.pop()
            producer = trace.values[v].producer
            if producer is None or v in meetings.weights:
                continue
            op = trace.operations[producer]
            if op.index in self.operations or v in self.begins:
                continue
            if meetings.meet(op):
                self.begins = set()
                return
            if op.norm is not None:
                self.norms.add(op.norm)
            if any(meetings.is_matrix(u) for u in op.inputs) and not meetings.passes(op):
                self.begins.add(v)
                continue
            self.operations[op.index] = op
            todo += [u for u in op.inputs if meetings.is_activation(u)]


def _heads(
    trace: Trace, meetings: Meetings, way: _Way, name: str, met: str, width: int, given: set[tuple[str, int] | None]
) -> Heads | NoHeads:
    """Heads of `width` in what one module gives; `given`: path and value of what `way` begins with, as far as known."""
    if way.norms:
        return NoHeads(met, f"its {name} has the norm {min(way.norms)} already")
    if len(given) != 1 or None in given:
        return NoHeads(met, f"no single module gives its {name}")
    ((module, begin),) = given
    rows = _rows(trace, meetings, way, begin, width)
    if rows is None:
        return NoHeads(met, f"the heads of its {name} were not found in the output of {module}")
    starts = tuple(sorted(set(rows[:, 0].tolist())))
    whole = torch.tensor(starts)[:, None] + torch.arange(width)
    if not torch.equal(rows[rows[:, 0].argsort()], whole):
        return NoHeads(met, f"a head of its {name} is not one run of channels in the output of {module}")
    return Heads(name, module, starts, width)


def _rows(trace: Trace, meetings: Meetings, way: _Way, begin: int, width: int) -> torch.Tensor | None:
    """The channels of each head, `(heads, width)`, from the last value on the way that has heads on its last axis."""
    shape = trace.values[begin].shape
    channels = shape[-1]
    labels = {begin: torch.arange(_numel(shape), dtype=torch.float64).reshape(shape)}
    found = None
    for index in sorted(way.operations):
        op = way.operations[index]
        if len(op.inputs) != 1 or op.inputs[0] not in labels:
            continue
        try:
            made = op.call({op.inputs[0]: labels[op.inputs[0]]})
            made = [m / meetings.prober.factor(op, 0) for m in made]  # queries may be scaled on their way
        except (RuntimeError, TypeError, ValueError, IndexError):
            continue
        made = [m.round() for m in made if (m - m.round()).abs().max() < 1e-6]
        if len(made) != len(op.outputs) or not all(_are_labels(m, labels[begin]) for m in made):
            continue
        labels |= dict(zip(op.outputs, made, strict=True))
    for v, value in labels.items():
        if v != begin and value.ndim > 1 and value.shape[-1] == width and _on_way(v, way):
            rows = _distinct(value, channels)
            found = rows if rows is not None else found
    return found


def _on_way(v: int, way: _Way) -> bool:
    """Whether something on the way reads it, or it is what meets: of a split, the other parts are not."""
    return any(v in op.inputs for op in way.operations.values()) or v == way.value


def _are_labels(made: torch.Tensor, labels: torch.Tensor) -> bool:
    return made.numel() > 0 and 0 <= float(made.min()) and float(made.max()) < labels.numel()


def _distinct(value: torch.Tensor, channels: int) -> torch.Tensor | None:
    """The different runs of channels along the last axis, if each is of one token and they share no channel."""
    flat = value.reshape(-1, value.shape[-1]).long()
    if not ((flat // channels) == (flat // channels)[:, :1]).all():
        return None
    rows = torch.unique(flat % channels, dim=0)
    return rows if rows.unique().numel() == rows.numel() else None


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
