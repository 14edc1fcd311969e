"""Who reads each norm: its output is followed until parameters absorb its gain, or something else happens to it.

One pass over a trace, in execution order.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from normswap.norms.spec import NormSpec
from normswap.observe.trace import Trace
from normswap.understand.derived import derived
from normswap.understand.transfer import Prober

#: why the gain of a norm stays that the model gives out
GIVEN_OUT = "it is an output of the model"


@dataclass(frozen=True)
class Reader:
    """A parameter that consumes a norm's output.

    Attributes:
        name: the parameter's name.
        axis: its axis that meets the normalised channels, once or in runs of them side by side.
        module: path of the module that uses it.
        sums: what a translation `b` of the norm's output does is `W b`: W times b along `axis`, summed over these axes.
        bias: name of the parameter that takes over a translation of the norm's output, if there is one.
        grows: without such a parameter, whether a bias added to the module would do.
    """

    name: str
    axis: int
    module: str
    sums: tuple[int, ...]
    bias: str | None
    grows: bool


@dataclass
class Readings:
    """Result of the second pass.

    Attributes:
        readers: per norm path, the parameters that consume its output.
        others: per norm path, what else consumes it (reasons why its gain cannot move into readers).
        translates: per norm path, whether a translation of its output reaches the readers unchanged.
        uses: per (parameter, module using it), paths of all norms it reads there, and "" for anything else.
    """

    readers: dict[str, list[Reader]] = field(default_factory=dict)
    others: dict[str, list[str]] = field(default_factory=dict)
    translates: dict[str, bool] = field(default_factory=dict)
    uses: dict[tuple[str, str], set[str]] = field(default_factory=dict)


def readings(trace: Trace, norms: dict[str, NormSpec], prober: Prober) -> Readings:
    """Follow the outputs of norms over `prober.width` channels to the parameters that read them."""
    result = Readings()
    live = trace.live()
    carried: dict[tuple[int, int], str] = {}  # a dimension of a value that is a norm's output, rearranged
    made = derived(trace, prober)
    outputs = set(trace.outputs)
    for op in trace.operations:
        if op.norm is not None:
            for v in op.inputs:
                for dim in prober.axes(trace.values[v].shape):
                    if (norm := carried.get((v, dim))) is not None:
                        _add(result.others, norm, f"the norm {op.norm} follows it and does not pass a gain on")
                for name in made.made_of.get(v, ()):
                    result.uses.setdefault((name, op.module), set()).add("")
            spec = norms[op.norm]
            ndim = len(trace.values[op.outputs[0]].shape)
            if spec.channels == prober.width and (len(spec.axes) == 1 or spec.kind == "groupnorm"):
                carried[op.outputs[0], spec.axes[0] % ndim] = op.norm
                result.readers.setdefault(op.norm, [])
                result.others.setdefault(op.norm, [])
                result.translates.setdefault(op.norm, True)
                if op.outputs[0] in outputs:
                    _add(result.others, op.norm, GIVEN_OUT)
            continue
        if op.index in made.operations or not any(v in live for v in op.outputs):
            continue
        floats = [v for v in op.inputs if trace.values[v].is_float and trace.values[v].kind != "constant"]
        entering: dict[str, list[tuple[int, int]]] = {}
        for position, v in enumerate(op.inputs):
            for dim in _dims(trace, v):
                if (norm := carried.get((v, dim))) is not None:
                    entering.setdefault(norm, []).append((position, dim))
        parameters = [(i, dim) for i, v in enumerate(op.inputs) for dim in _dims(trace, v) if (v, dim) in made.axes]
        names = set().union(*(made.made_of.get(v, set()) for v in floats))
        read: set[str] = set()
        passed: dict[tuple[int, int], list[str]] = {}
        for norm, axes in entering.items():  # all that came from one norm has its gain
            transfer = prober.scale(op, tuple(axes), tuple(parameters))
            for o, dim in transfer.passes:
                passed.setdefault((op.outputs[o], dim), []).append(norm)
                if op.outputs[o] in outputs:
                    _add(result.others, norm, GIVEN_OUT)
            result.translates[norm] &= transfer.translates or not transfer.passes
            if any(op.outputs[o] in live for o in transfer.other):
                where = op.module or "the model"
                _add(result.others, norm, f"{op.name} in {where} reads it, and no weight there can take a gain")
            for absorber in transfer.absorbers[:1]:
                position, dim = absorber.parameter
                name, pdim = made.axes[op.inputs[position], dim]
                whole = trace.values[op.inputs[position]].kind == "parameter"
                sums = absorber.sums if whole else (pdim,)  # of a part, the other axes are not known to be the same
                understood = whole or absorber.sums == (dim,)
                bias = None
                if absorber.bias is not None and understood:
                    held = made.made_of.get(op.inputs[absorber.bias], set())
                    bias = next(iter(held)) if len(held) == 1 else None
                reader = Reader(name, pdim, op.module, sums, bias, absorber.grows and understood)
                if reader not in result.readers[norm]:
                    result.readers[norm].append(reader)
                result.uses.setdefault((name, op.module), set()).add(norm)
                read.add(name)
                if bias is not None:
                    result.uses.setdefault((bias, op.module), set()).add(norm)
                    read.add(bias)
        for value_axis, norms_passed in passed.items():
            if len(norms_passed) == 1:
                carried[value_axis] = norms_passed[0]
                continue
            for norm in norms_passed:  # their gains meet in a product
                where = op.module or "the model"
                _add(result.others, norm, f"{op.name} in {where} multiplies it with what another norm gave")
        for name in names - read:
            result.uses.setdefault((name, op.module), set()).add("")
    return result


def _dims(trace: Trace, v: int) -> range:
    return range(len(trace.values[v].shape))


def _add(reasons: dict[str, list[str]], norm: str, reason: str) -> None:
    if reason not in reasons.setdefault(norm, []):
        reasons[norm].append(reason)
