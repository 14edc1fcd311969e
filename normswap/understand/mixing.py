"""Where activations meet each other: products over a shared axis, as of queries with keys."""

from __future__ import annotations

import torch

from normswap.observe.trace import Operation, Trace
from normswap.understand.transfer import Prober
from normswap.understand.trial import Trial


def weight_values(trace: Trace) -> set[int]:
    """Parameters, and what is made of them alone (the matrix of one expert)."""
    found = {v.index for v in trace.values if v.kind == "parameter"}
    for op in trace.operations:
        made = [v for v in op.inputs if trace.values[v].is_float and trace.values[v].kind != "constant"]
        if made and all(v in found for v in made) and not any(trace.values[v].varies for v in op.inputs):
            found.update(op.outputs)
    return found


class Meetings:
    """Tells which operations of a trace bring activations together."""

    def __init__(self, trace: Trace, prober: Prober):
        self.trace, self.prober = trace, prober
        self.weights = weight_values(trace)
        self.consumers = trace.consumers()

    def meet(self, op: Operation) -> bool:
        """Whether two activations go into `op` of each of which one value reaches several outputs.

        Sums, products element by element and concatenations bring values together one by one.
        """
        if op.norm is not None or not op.outputs:
            return False
        met = [i for i, v in enumerate(op.inputs) if self.is_activation(v)]
        return len(met) > 1 and sum(i in self.prober.spreading(op, spreading) for i in met) > 1

    def passes(self, op: Operation) -> bool:
        """Whether activations go through `op` value by value, as through a sum with a table, and are not mixed."""
        through = [i for i, v in enumerate(op.inputs) if self.is_activation(v)]
        return bool(through) and not set(through) & self.prober.spreading(op, spreading)

    def is_activation(self, v: int) -> bool:
        value = self.trace.values[v]
        return value.kind == "computed" and value.is_float and v not in self.weights

    def reach(self, value: int) -> bool:
        """Whether `value` meets another activation, and attention scores come out, before it meets a weight matrix.

        What is averaged by scores (attention's values) comes out in its own shape.
        """
        seen, todo = set(), [value]
        while todo:
            v = todo.pop()
            for op in self.consumers.get(v, []):
                if op.index in seen or any(self.is_matrix(u) for u in op.inputs):
                    continue
                if self.meet(op) and self.trace.values[op.outputs[0]].shape != self.trace.values[v].shape:
                    return True
                seen.add(op.index)
                todo.extend(op.outputs)
        return False

    def is_matrix(self, v: int) -> bool:
        return v in self.weights and sum(n > 1 for n in self.trace.values[v].shape) > 1


def spreading(trial: Trial) -> frozenset[int]:
    """Positions of the inputs of which one value reaches several outputs."""
    found = set()
    for position, x in enumerate(trial.base):
        if not x.is_floating_point() or not x.numel():
            continue
        for entry in (0, -1):  # a causal mask hides all but the first key from the first query
            changed = list(trial.base)
            changed[position] = x.clone()
            changed[position].view(-1)[entry] += 1
            pairs = zip(trial.run(changed), trial.result, strict=True)
            if sum(int((~torch.isclose(a, b, rtol=1e-9, equal_nan=True)).sum()) for a, b in pairs) > 1:
                found.add(position)
    return frozenset(found)
