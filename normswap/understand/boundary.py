"""Where a value can be got hold of from outside: as all that a module gives out, or as what goes into one.

The source of a model is not changed by a conversion that centres, but what a module takes or gives can be changed in
the module itself. A value that crosses no such boundary cannot be centred but through the parameters that make it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from normswap.observe.trace import ModuleCall, Trace


@dataclass(frozen=True)
class Boundary:
    """`output`: what `module` gives out, alone or first. `input`: what goes into `module` first, and nowhere else."""

    kind: str
    module: str


def boundaries(trace: Trace) -> dict[int, Boundary]:
    """The boundary at which each value can be changed, the outermost where there are several; outputs before inputs.

    A module that runs more than once counts where every run of it is of that kind: a change of the module reaches all
    of them.
    """
    calls: dict[str, list[ModuleCall]] = defaultdict(list)
    for call in trace.calls:
        if call.path:
            calls[call.path].append(call)
    used = {v: [op.index for op in ops] for v, ops in trace.consumers().items()}

    def alone(call: ModuleCall) -> bool:
        """Whether the call's first input is used inside it and nowhere else."""
        uses = used.get(call.inputs[0], ()) if call.inputs else ()
        return bool(uses) and all(call.start <= index < call.end for index in uses)

    found: dict[int, Boundary] = {}
    for path, its in calls.items():  # in order of entry: a module comes before those inside it
        if all(alone(call) for call in its):
            found |= {v: Boundary("input", path) for call in its if (v := call.inputs[0]) not in found}
    outputs: dict[int, Boundary] = {}
    for path, its in calls.items():
        if all(call.plain and call.outputs[0] not in call.inputs for call in its):
            outputs |= {v: Boundary("output", path) for call in its if (v := call.outputs[0]) not in outputs}
    return {v: b for v, b in (found | outputs).items() if trace.values[v].is_float}
