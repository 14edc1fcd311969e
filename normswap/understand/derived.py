"""What is made of parameters alone: weights transposed or reshaped, and which axis of the parameter each axis is."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from normswap.observe.trace import Trace
from normswap.understand.transfer import Prober


@dataclass
class Derived:
    """Values that no activation has a part in.

    Attributes:
        axes: per (value, dimension), the one parameter that it is a rearrangement of, and that parameter's axis.
        made_of: per value, the names of the parameters that it is made of.
        operations: those that make such values, by index.
    """

    axes: dict[tuple[int, int], tuple[str, int]] = field(default_factory=dict)
    made_of: dict[int, set[str]] = field(default_factory=dict)
    operations: set[int] = field(default_factory=set)


def derived(trace: Trace, prober: Prober) -> Derived:
    """Follow parameters until activations meet them."""
    result = Derived(made_of={v.index: {v.name} for v in trace.values if v.kind == "parameter"})
    for v in trace.values:
        if v.kind == "parameter":
            result.axes.update({(v.index, dim): (v.name, dim) for dim in prober.axes(v.shape)})
    for op in trace.operations:
        floats = [v for v in op.inputs if trace.values[v].is_float and trace.values[v].kind != "constant"]
        alone = not any(trace.values[v].kind == "constant" and _many(trace, v) for v in op.inputs)
        varies = any(trace.values[v].varies for v in op.inputs)  # what tokens pick from a table is an activation
        if op.norm is not None or not floats or not alone or varies or not all(v in result.made_of for v in floats):
            continue
        result.operations.add(op.index)
        names = set().union(*(result.made_of[v] for v in floats))
        result.made_of.update(dict.fromkeys(op.outputs, names))
        for position, v in enumerate(op.inputs):
            for dim in range(len(trace.values[v].shape)):
                if (v, dim) in result.axes:
                    for o, made in prober.scale(op, ((position, dim),)).passes:
                        result.axes[op.outputs[o], made] = result.axes[v, dim]
    return result


def _many(trace: Trace, v: int) -> bool:
    """Whether `v` is floating and more than one number: something that a weight may read."""
    return trace.values[v].is_float and math.prod(trace.values[v].shape) > 1
