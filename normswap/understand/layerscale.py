"""Scales per channel between a writer and the stream, `x + s * (W h + b)`: they fold into the writer.

    s * (W h + b) = (diag(s) W) h + s * b,    and from there on s is 1.

That holds when nothing else sees what the writer makes before it is scaled, and when the scale is used for nothing
else. Then the writer can be centred as any other.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from normswap.observe.trace import Operation, Trace
from normswap.understand.trial import Axis

ValueAxis = tuple[int, int]


@dataclass
class Scales:
    """Which operations lead from parameters to each value, and what is scaled by which parameter.

    Attributes:
        made: per (value, dimension), the operation that made it, the inputs that a scale of it can be moved to, and
            whether it can.
        folded: per scale and writer parameter, the operations that lie between them and their product.
    """

    trace: Trace
    live: set[int]
    made: dict[ValueAxis, tuple[Operation, tuple[Axis, ...], bool]] = field(default_factory=dict)
    folded: dict[tuple[str, str], set[int]] = field(default_factory=dict)

    def __post_init__(self):
        self.users: dict[int, set[int]] = {
            v: {op.index for op in ops if any(o in self.live for o in op.outputs)}
            for v, ops in self.trace.consumers().items()
        }
        self.seen_whole = {*self.trace.outputs, *self.trace.reads}
        self.index = {value.name: value.index for value in self.trace.values if value.name is not None}

    def chain(self, op: Operation, v: int, dim: int) -> tuple[set[int], set[str]] | None:
        """The operations from parameters to input `v` of `op`, and those parameters; None if others see between."""
        operations, parameters, todo = {op.index}, set(), [(v, dim)]
        while todo:
            v, dim = todo.pop()
            value = self.trace.values[v]
            if value.kind == "parameter":
                parameters.add(value.name)
                continue
            made = self.made.get((v, dim))
            if made is None or not made[2] or v in self.seen_whole or self.users.get(v, set()) - operations:
                return None
            producer, passers, _ = made
            operations.add(producer.index)
            todo += [(producer.inputs[position], d) for position, d in passers]
        return operations, parameters

    def fold(self, op: Operation, x: ValueAxis, scale: ValueAxis) -> tuple[str, set[str]] | None:
        """`scale` as a parameter, and the parameters that it can be folded into, where `op` scales `x` by it."""
        writers, scales = self.chain(op, *x), self.chain(op, *scale)
        if writers is None or scales is None or len(scales[1]) != 1:
            return None
        (name,) = scales[1]
        for writer in writers[1]:
            self.folded.setdefault((name, writer), set()).update(writers[0] | scales[0])
        return name, writers[1]

    def obstacle(self, scale: str, writer: str) -> str | None:
        """Why `scale` cannot be folded into `writer` after all, None if it can; to be asked when all has been seen."""
        of_scale = set().union(*(ops for (name, _), ops in self.folded.items() if name == scale))
        if self.users.get(self.index[scale], set()) - of_scale:
            return f"{scale} scales it, and is used for something else too"
        if self.users.get(self.index[writer], set()) - self.folded[scale, writer]:
            return f"{scale} scales it in one place and not in another"
        return None
