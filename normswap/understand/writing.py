"""Who writes what each batch norm reads: its input is followed back to the parameters that make it.

At inference a batch norm is `y = a x + c` per channel. Where `x = W h + b` goes into the norm and nowhere else, W and b
can do that themselves. Between the two may stand what moves values and changes none of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from normswap.norms.spec import NormSpec
from normswap.observe.trace import Operation, Trace
from normswap.understand.derived import Derived, derived
from normswap.understand.scale import ScaleTransfer
from normswap.understand.transfer import Prober
from normswap.understand.trial import Axis


@dataclass(frozen=True)
class Source:
    """A parameter that writes the input of a norm.

    Attributes:
        name: the parameter's name.
        axis: its axis along the norm's channels.
        module: path of the module that uses it.
        bias: name of the parameter that translates what it writes, None if there is none.
        grows: without such a parameter, whether a bias added to the module would do.
    """

    name: str
    axis: int
    module: str
    bias: str | None
    grows: bool


@dataclass
class Writings:
    """Result of the pass: by path of the norm, what writes its input, or why that cannot be told or changed.

    Attributes:
        operations: the same by the operation that writes.
    """

    sources: dict[str, list[Source]] = field(default_factory=dict)
    obstacles: dict[str, str] = field(default_factory=dict)
    operations: dict[str, dict[int, Source]] = field(default_factory=dict)


def writings(trace: Trace, norms: dict[str, NormSpec], prober: Prober) -> Writings:
    """Follow the inputs of batch norms over `prober.width` channels back to the parameters that write them."""
    result = Writings()
    back = _Back(trace, prober)
    for op in trace.norm_operations():
        spec = norms[op.norm]
        if spec.kind == "batchnorm" and spec.channels == prober.width and op.norm not in result.obstacles:
            source = back.source(op, spec.axes[0])
            if isinstance(source, str):
                result.obstacles[op.norm] = source
            else:
                result.operations.setdefault(op.norm, {}).update([source])
    for norm, sources in result.operations.items():
        if norm in result.obstacles:
            continue
        written = list(dict.fromkeys(sources.values()))
        names = [name for source in written for name in (source.name, source.bias) if name is not None]
        others = [f"{name} is used by {use} too" for name in names for use in back.uses(name, set(sources))]
        if others:
            result.obstacles[norm] = others[0]
        elif len(names) > len(set(names)):
            result.obstacles[norm] = f"{names[0]} writes its input in several ways"
        else:
            result.sources[norm] = written
    return result


class _Back:
    """Follows values of a trace back to parameters."""

    def __init__(self, trace: Trace, prober: Prober):
        self.trace, self.prober = trace, prober
        self.live, self.outputs, self.consumers = trace.live(), set(trace.outputs), trace.consumers()
        self.made: Derived = derived(trace, prober)

    def source(self, norm: Operation, axis: int) -> tuple[int, Source] | str:
        """The operation that writes what `norm` reads, by index, and by which parameter; or why there is none."""
        v, reader = norm.inputs[0], norm
        dim = axis % len(self.trace.values[v].shape)
        while True:
            if v in self.outputs:
                return "its input is an output of the model as well"
            if (other := next(self._others(v, dim, reader), None)) is not None:
                return f"its input is read by {other} as well"
            producer = self.trace.values[v].producer
            if producer is None:
                return f"its input is {self.trace.values[v].name or 'one of the model'}, which nothing writes"
            op = self.trace.operations[producer]
            if op.norm is not None:
                return f"its input is written by the norm {op.norm}"
            made: Axis = op.outputs.index(v), dim
            parameters = [
                (i, d)
                for i, u in enumerate(op.inputs)
                for d in range(len(self.trace.values[u].shape))
                if (u, d) in self.made.axes
            ]
            written = self.prober.writes(op, made, tuple(parameters))
            if written is not None:
                return self._source(op, written.parameter, written.bias, written.grows)
            before = self.before(op, made)
            if before is None:
                return f"its input is written by {op.name} in {op.module or 'the model'}, where no weight can take it"
            (v, dim), reader = before, op

    def _source(self, op: Operation, parameter: Axis, bias: int | None, grows: bool) -> tuple[int, Source] | str:
        name, axis = self.made.axes[op.inputs[parameter[0]], parameter[1]]
        held = set() if bias is None else self.made.made_of.get(op.inputs[bias], set())
        if bias is not None and len(held) != 1:
            return f"what {op.name} in {op.module or 'the model'} adds is no single parameter"
        return op.index, Source(name, axis, op.module, next(iter(held), None), grows)

    def before(self, op: Operation, made: Axis) -> tuple[int, int] | None:
        """The value and dimension that `op` hands on as it is, as the output axis `made` alone; None if it does not."""
        found = []
        for position, u in enumerate(op.inputs):
            if u in self.made.made_of or not self.trace.values[u].is_float:
                continue
            for dim in self.prober.axes(self.trace.values[u].shape):
                transfer = self.prober.scale(op, ((position, dim),))
                if transfer.passes == (made,) and transfer.translates:
                    found.append((u, dim))
        return found[0] if len(found) == 1 else None

    def _others(self, v: int, dim: int, reader: Operation) -> Iterator[str]:
        """What else than `reader` needs the value, and not only its shape, in words."""
        for op in self.consumers.get(v, ()):
            if op.index == reader.index or not any(o in self.live for o in op.outputs):
                continue
            if op.norm is not None or self.prober.scale(op, ((op.inputs.index(v), dim),)) != ScaleTransfer():
                yield f"{op.name} in {op.module or 'the model'}"

    def uses(self, name: str, known: set[int]) -> Iterator[str]:
        """What uses a parameter beside the operations `known`, in words."""
        for op in self.trace.operations:
            if op.index in self.made.operations or op.index in known:
                continue
            needed = op.norm is not None or any(o in self.live for o in op.outputs)
            if needed and any(name in self.made.made_of.get(v, ()) for v in op.inputs):
                yield f"{op.norm or op.name} in {op.module or 'the model'}"
