"""What one forward pass did, as data: values, the operations between them, and the module calls around those."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten


@dataclass(frozen=True)
class Span:
    """Where in the source a call stands: file, function, and the exact lines and columns of the expression."""

    file: str
    function: str
    line: int
    end_line: int
    column: int
    end_column: int


@dataclass(frozen=True)
class Frame:
    """One function of the model's own code that stood open while a call was made.

    Attributes:
        span: the expression that it was at.
        module: path of the module whose method it is (its first argument), None for a helper function.
    """

    span: Span
    module: str | None


@dataclass(eq=False)
class Value:
    """One tensor at one moment: an in-place operation gives its target a new value.

    Attributes:
        index: position in `Trace.values`.
        shape, dtype: as the model saw it.
        name: of a parameter or buffer, the first name the model knows it by; None for anything else.
        kind: `parameter`, `buffer`, `constant` (depends on no parameter, so it was computed for real), `computed`.
        real: the tensor itself where its values are known (constants), else None.
        varies: a constant made from the model's inputs (a mask): it has other values in another pass.
        producer: index of the operation that made it, None for leaves.
    """

    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str
    name: str | None = None
    real: torch.Tensor | None = None
    producer: int | None = None
    varies: bool = False

    @property
    def known(self) -> torch.Tensor | None:
        """The values, if they are the same in every pass."""
        return None if self.varies else self.real

    @property
    def is_float(self) -> bool:
        return self.dtype.is_floating_point


@dataclass(frozen=True)
class Ref:
    """Stands for a value inside an operation's arguments."""

    value: int


@dataclass(eq=False)
class Operation:
    """One torch call (or one norm module, opaque) with its arguments as data.

    Attributes:
        function: what was called; None for an opaque norm.
        leaves, spec: the flattened arguments, each tensor replaced by a `Ref`.
        inputs: the values among the arguments, in order, without repeats.
        outputs: the values it made: those returned, then new versions of arguments changed in place.
        mutated: which of `inputs` were changed in place.
        module: path of the module it ran in.
        frames: the model's functions that stood open, from the one that made the call outwards to the `forward` of the
            module that ran it; code of torch is left out, so for a layer of torch it is the `forward` that calls it.
        norm: path of the norm module when opaque.
    """

    index: int
    function: Callable | None
    leaves: list[Any]
    spec: Any
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    mutated: tuple[int, ...]
    module: str
    frames: tuple[Frame, ...] = ()
    norm: str | None = None

    @property
    def span(self) -> Span | None:
        """Where the model's code makes the call."""
        return self.frames[0].span if self.frames else None

    @property
    def name(self) -> str:
        if self.function is None:
            return "norm"
        return getattr(self.function, "__name__", str(self.function)).strip("_")

    def call(self, tensors: dict[int, torch.Tensor], sizes: dict[int, int] | None = None) -> list[torch.Tensor]:
        """Run the operation again on other tensors, one per input value, in float64.

        Sizes among the arguments are replaced by `sizes`, floating dtypes by float64, and devices by the CPU.

        Returns the tensors standing for `outputs`. In-place changes act on copies.
        """
        private = {v: tensors[v].clone() if v in self.mutated else tensors[v] for v in self.inputs}
        leaves = []
        for leaf in self.leaves:
            if isinstance(leaf, Ref):
                leaf = private[leaf.value]
            elif type(leaf) is int:
                leaf = (sizes or {}).get(leaf, leaf)
            elif isinstance(leaf, torch.dtype) and leaf.is_floating_point:
                leaf = torch.float64
            elif isinstance(leaf, torch.device):
                leaf = torch.device("cpu")
            leaves.append(leaf)
        args, kwargs = tree_unflatten(leaves, self.spec)
        returned = self.function(*args, **kwargs)
        made = [t for t in tree_flatten(returned)[0] if isinstance(t, torch.Tensor)]
        fresh = [t for t in made if not any(t is private[v] for v in self.inputs)]
        if not fresh and not self.mutated:
            fresh = made  # nothing to do on these strides or this dtype (contiguous, to): an input itself came back
        return fresh + [private[v] for v in self.mutated]


@dataclass(eq=False)
class ModuleCall:
    """One call of one module: the values that went in and came out, the range of operations inside, who called.

    Attributes:
        arguments: the tensors that were arguments themselves: `(position or keyword, value)`.
        frames: as of an operation, of the code that called the module; empty for the model itself.
        plain: it gave out a tensor, or a tuple that begins with one.
        single: it gave out a tensor and nothing around it.
    """

    path: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...] = ()
    start: int = 0
    end: int = 0
    parent: str = ""
    arguments: tuple[tuple[int | str, int], ...] = ()
    frames: tuple[Frame, ...] = ()
    plain: bool = False
    single: bool = False

    @property
    def span(self) -> Span | None:
        """Where the model's code calls the module."""
        return self.frames[0].span if self.frames else None


@dataclass(eq=False)
class Trace:
    """All of one forward pass. `operations` are in execution order, so producers come before consumers.

    Attributes:
        calls: of modules, in order of entry.
        outputs: what the model returned.
        names: of those but caches, where each stands in what was returned.
        reads: stand-ins for numbers that code took out of tensors (`item`); each depends on its operation's inputs.
        strays: modules in which a tensor turned up that no observed call made.
        notes: where a value was asked for that an observation without weights does not have.
    """

    values: list[Value] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    calls: list[ModuleCall] = field(default_factory=list)
    outputs: tuple[int, ...] = ()
    names: dict[int, str] = field(default_factory=dict)
    reads: list[int] = field(default_factory=list)
    strays: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def consumers(self) -> dict[int, list[Operation]]:
        found: dict[int, list[Operation]] = {}
        for op in self.operations:
            for v in op.inputs:
                found.setdefault(v, []).append(op)
        return found

    def live(self) -> set[int]:
        """Values that some module's output depends on; others were made for their shape or thrown away.

        What a module gives out counts even where this model ignores it (a pooler under another head): the same module
        may serve a model that does not.
        """
        alive = {*self.outputs, *self.reads, *(v for call in self.calls for v in call.outputs)}
        for op in reversed(self.operations):
            if any(v in alive for v in op.outputs):
                alive.update(op.inputs)
        return alive

    def ancestors(self) -> list[int]:
        """Per value a bit set (as an int) of all values it depends on, itself included."""
        sets = [1 << v.index for v in self.values]
        for op in self.operations:
            union = 0
            for v in op.inputs:
                union |= sets[v]
            for v in op.outputs:
                sets[v] |= union
        return sets

    def norm_operations(self) -> Iterator[Operation]:
        return (op for op in self.operations if op.norm is not None)


def collapse_norms(trace: Trace, paths: set[str]) -> Trace:
    """The same trace with each call of a norm module as one opaque operation.

    Args:
        paths: the norm modules. Each call takes a float tensor, and a second one if the norm is gated; it gives one of
            the same shape.
    """
    starts = {call.start: call for call in trace.calls if call.path in paths and call.end > call.start}
    operations: list[Operation] = []
    moved: list[int] = []  # per operation, where it or what takes its place now stands
    position = 0
    while position < len(trace.operations):
        op = trace.operations[position]
        moved += [len(operations)] * (position + 1 - len(moved))
        call = starts.get(position)
        if call is None:
            operations.append(op)
            position += 1
            continue
        taken = tuple(dict.fromkeys(v for v in call.inputs if trace.values[v].is_float))
        operations.append(
            Operation(op.index, None, [], None, taken, call.outputs[:1], (), call.path, call.frames, norm=call.path)
        )
        position = call.end
        moved += [len(operations)] * (position - len(moved))
    moved += [len(operations)] * (len(trace.operations) + 1 - len(moved))
    calls = [replace(call, start=moved[call.start], end=moved[call.end]) for call in trace.calls]
    for index, op in enumerate(operations):
        op.index = index
        for v in op.outputs:
            trace.values[v].producer = index
    return replace(trace, operations=operations, calls=calls)
