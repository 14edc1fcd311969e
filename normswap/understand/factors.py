"""What a value is multiplied by on its way: numbers that code writes out, and tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass

from normswap.observe.trace import Operation, Trace
from normswap.understand.scale import signed_factor
from normswap.understand.transfer import Prober

_SAME = 1e-7  # relative: a number in the code is the one that was measured


@dataclass(frozen=True)
class Factor:
    """One multiplication.

    Attributes:
        op: index of the operation.
        number: by how much, exactly as the code has it; None where that is no number of the code.
        by: what it is, in words.
    """

    op: int
    number: float | None
    by: str


def factor_of(trace: Trace, prober: Prober, op: Operation, position: int) -> Factor | None:
    """What `op`, which passes scales of `inputs[position]` on, multiplies that by; None: by nothing."""
    tensors = [v for i, v in enumerate(op.inputs) if i != position and trace.values[v].is_float]
    if tensors:
        names = ", ".join(trace.values[v].name or "a tensor" for v in tensors)
        return Factor(op.index, None, names)
    measured = prober.ask("signed factor", op, ((position, 0),), lambda trial: signed_factor(trial, position))
    if measured is None:
        return Factor(op.index, None, "what cannot be measured")
    written = [leaf for leaf in op.leaves if isinstance(leaf, int | float) and not isinstance(leaf, bool) and leaf]
    for number in (way for leaf in written for way in (float(leaf), 1 / leaf)):
        if number != 1 and math.isclose(number, measured, rel_tol=_SAME):
            return Factor(op.index, number, f"{number:g}")
    return None if math.isclose(measured, 1, rel_tol=_SAME) else Factor(op.index, None, f"{measured:g}")
