"""Norms in other places, evaluated on a live model without changing it: residual sums and norms are intercepted.

This says what a moved model has to compute, and knows nothing of how models are rewritten. A block of the trace is

    x' = N_out(skip * N_skip(x) + branch * N_branch(F(N_in(x))))

where `F` is whatever the model's own code does between the stream and the sum. The model's own forward runs; the
operation that the trace calls the sum gets other operands and gives another result, a norm module gives another
output, and what else reads the stream gets `N_in(x)` of it.

An operation of the running model is the trace's one when it is the same function, called from the same expression, for
the same time in the same call of the same module. Its arguments and the shape of its result must then agree, too.
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from normswap.errors import VerificationError
from normswap.observe.trace import Operation, Ref, Trace
from normswap.understand.normmap import NormMap
from normswap.understand.placement import Block, Stream
from normswap.verification import precision

Function = Callable[[torch.Tensor], torch.Tensor]

# frames of these files stand between a call in the model and us
_PLUMBING = (str(Path(torch.__file__).parent), __file__, precision.__file__, contextmanager.__code__.co_filename)


@dataclass(frozen=True)
class Slots:
    """One residual sum: what stands in each slot. None, and the factor 1, leave the slot as the model has it.

    Attributes:
        n_in: what the branch gets in place of the stream, where it reads it without a norm of its own.
        n_branch: what the sum gets in place of the branch.
        n_out: what the model goes on with in place of the sum.
        n_skip: what the sum gets in place of the stream, or what makes its other operand of the stream.
        skip, branch: factors on the two, behind `n_skip` and `n_branch`: numbers, or one value for each token.
    """

    n_in: Function | None = None
    n_branch: Function | None = None
    n_out: Function | None = None
    n_skip: Function | None = None
    skip: float | torch.Tensor = 1.0
    branch: float | torch.Tensor = 1.0


@dataclass
class Placement:
    """Where norms are to stand.

    Attributes:
        blocks: by the index of the sum in the trace (`Block.add`).
        norms: what each norm module does instead, by path.
    """

    blocks: dict[int, Slots] = field(default_factory=dict)
    norms: dict[str, Function] = field(default_factory=dict)


class StreamReaders:
    """Who reads the values of one stream, seen through what rearranges them: views, dropouts, constant factors.

    A mean over tokens is no rearrangement, although it keeps the channels apart: it reads the stream.
    """

    def __init__(self, trace: Trace, stream: Stream):
        self.trace, self.stream = trace, stream
        self.bases = {v: v for v in stream.values}
        self.sources = {*(self._base(block.operands[0]) for block in stream.blocks), *stream.values}

    def _base(self, v: int) -> int:
        """The earliest value that `v` is a rearrangement of."""
        if v not in self.bases:
            self.bases[v] = v
            analysis, producer = self.stream.analysis, self.trace.values[v].producer
            op = None if producer is None else self.trace.operations[producer]
            if op is not None and op.norm is None and analysis.base(v) != v:
                position = next(i for i, u in enumerate(op.inputs) if analysis.base(u) == analysis.base(v))
                if analysis.prober.rearranges(op, position):
                    self.bases[v] = self._base(op.inputs[position])
        return self.bases[v]

    def source(self, v: int) -> int | None:
        """The value of the stream that `v` shows, None if it shows none."""
        return self._base(v) if self._base(v) in self.sources else None

    def of(self, op: Operation, operand: int) -> Iterator[tuple[Operation, int]]:
        """`(operation, value)` for each reading of the stream that `operand` of `op` is made of, the next before it.

        That is `op` itself where the operand is the stream's value; norms are such operations too.
        """
        todo, seen = [(op, operand)], set()
        while todo:
            op, v = todo.pop()
            if (op.index, v) in seen:
                continue
            seen.add((op.index, v))
            if self.source(v) is not None:
                yield op, v
            elif (producer := self.trace.values[v].producer) is not None:
                made_by = self.trace.operations[producer]
                todo.extend((made_by, u) for u in made_by.inputs)

    def of_branch(self, block: Block) -> Iterator[tuple[Operation, int]]:
        return self.of(self.trace.operations[block.add], block.operands[1])

    def of_skip(self, block: Block) -> Iterator[tuple[Operation, int]]:
        return self.of(self.trace.operations[block.add], block.operands[0])


class _Patches:
    """A placement as changes of operations: of the values that go in, by operation and value, and of what comes out."""

    def __init__(self, normmap: NormMap, placement: Placement):
        self.inputs: dict[tuple[int, int], list[Function]] = defaultdict(list)
        self.outputs: dict[int, Function] = {}
        self.norms = placement.norms
        found = [info.found for info in normmap.streams]
        known = {block.add for stream in found for block in stream.blocks}
        if unknown := placement.blocks.keys() - known:
            raise VerificationError(f"operation {min(unknown)} is no residual sum of a stream of this model.")
        for stream in found:
            self._add(StreamReaders(normmap.trace, stream), stream, placement)

    def _add(self, readers: StreamReaders, stream: Stream, placement: Placement) -> None:
        for block in stream.blocks:
            slots = placement.blocks.get(block.add, Slots())
            for norm, read in ((slots.n_skip, readers.of_skip), (slots.n_in, readers.of_branch)):
                for op, v in read(block) if norm is not None else ():
                    if op.norm is None and norm not in self.inputs[op.index, v]:
                        self.inputs[op.index, v].append(norm)
            skip, branch = block.operands
            self._factor(block.add, skip, slots.skip)
            if slots.n_branch is not None:
                self.inputs[block.add, branch].append(slots.n_branch)
            self._factor(block.add, branch, slots.branch)
            if slots.n_out is not None:
                self.outputs[block.add] = slots.n_out

    def _factor(self, add: int, operand: int, factor: float | torch.Tensor) -> None:
        if isinstance(factor, torch.Tensor) or factor != 1:
            self.inputs[add, operand].append(lambda x: times(factor, x))


@contextmanager
def placed(model: nn.Module, normmap: NormMap, placement: Placement) -> Iterator[nn.Module]:
    """While active, `model` computes as if its norms stood where `placement` says; gradients follow.

    Args:
        model: in eager attention, with its values; the one that `normmap` was made of, or a copy.
        normmap: of the same inputs, by their shapes, as the model is then run on.

    Raises:
        VerificationError: at the operation that is not as in the trace, or at the end, if one of the trace was not met.
    """
    interception = _Interception(model, normmap.trace, _Patches(normmap, placement))
    with interception.hooks():
        yield model
    interception.check()


class _Interception(TorchFunctionMode):
    """Changes operations of a running model that a trace has."""

    def __init__(self, model: nn.Module, trace: Trace, patches: _Patches):
        super().__init__()
        self.trace, self.patches = trace, patches
        self.model = model
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.positions: dict[tuple, tuple[int, ...]] = {}
        self.norm_ops: dict[str, list[Operation]] = defaultdict(list)
        for op in trace.norm_operations():
            self.norm_ops[op.norm].append(op)
        changed = {op for op, _ in patches.inputs} | set(patches.outputs)
        self.wanted = {key: op for key, op in _keys(trace) if op.index in changed and op.norm is None}
        self.names = {op.name for op in self.wanted.values()}
        self.watched = {op.norm for index in changed if (op := trace.operations[index]).norm} | set(patches.norms)
        self.met: set[int] = set()
        self.paused = False
        self._begin()

    def _begin(self) -> None:
        self.stack: list[tuple[str, int]] = []
        self.calls: Counter[str] = Counter()
        self.seen: Counter[tuple] = Counter()

    # -- modules -----------------------------------------------------------------------------------------------

    @contextmanager
    def hooks(self) -> Iterator[None]:
        def enter(module, args):
            if self.paused:
                return  # a norm of the model at work in another slot
            path = self.paths[id(module)]
            if module is self.model:
                self._begin()
            self.stack.append((path, self.calls[path]))
            self.calls[path] += 1

        def leave(module, args, output):
            if not self.paused:
                self.stack.pop()

        handles = []
        try:
            for path, module in self.model.named_modules():
                handles.append(module.register_forward_pre_hook(enter))
                if path in self.watched:
                    handles.append(module.register_forward_hook(self._norm, with_kwargs=True))
                handles.append(module.register_forward_hook(leave))
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _norm(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        if self.paused:
            return output
        path, call = self.stack[-1]
        if call >= len(self.norm_ops[path]):
            raise VerificationError(f"the norm {path} is called more often than in the trace.")
        op = self.norm_ops[path][call]
        x = next(t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.is_floating_point())
        self._check_shape(op, output)
        self.met.add(op.index)
        changes = self.patches.inputs.get((op.index, op.inputs[0]), ())
        if len(op.inputs) > 1:
            raise VerificationError(f"the norm {path} is gated, and stands in no slot of a block.")
        function = self.patches.norms.get(path, module.forward)
        if not changes and path not in self.patches.norms:
            return output
        with self._pause():
            result = function(_through(changes, x))
        return result.contiguous() if output.is_contiguous() else result  # `view` may follow

    # -- operations --------------------------------------------------------------------------------------------

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", str(function)).strip("_")
        if self.paused or name not in self.names or not self.stack:
            return function(*args, **kwargs)
        place = (*self.stack[-1], name, self._position())
        op = self.wanted.get((*place, self.seen[place]))
        self.seen[place] += 1
        if op is None:
            return function(*args, **kwargs)
        self.met.add(op.index)
        with self._pause():
            return self._changed(op, function, args, kwargs)

    def _changed(self, op: Operation, function: Callable, args: tuple, kwargs: dict) -> torch.Tensor:
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [isinstance(leaf, torch.Tensor) for leaf in leaves]
        if tensors != [isinstance(leaf, Ref) for leaf in op.leaves]:
            raise VerificationError(f"{_words(op)} has other arguments than in the trace.")
        target = None
        for i, ref in enumerate(op.leaves):
            if not isinstance(ref, Ref):
                continue
            if ref.value in op.mutated:
                target = leaves[i]
                leaves[i] = leaves[i].clone()
            leaves[i] = _through(self.patches.inputs.get((op.index, ref.value), ()), leaves[i])
        args, kwargs = tree_unflatten(leaves, spec)
        result = function(*args, **kwargs)
        self._check_shape(op, result)
        if op.index in self.patches.outputs:
            result = self.patches.outputs[op.index](result)
        return result if target is None else target.copy_(result)

    def _check_shape(self, op: Operation, result: Any) -> None:
        expected = self.trace.values[op.outputs[0]].shape
        if not isinstance(result, torch.Tensor):
            raise VerificationError(f"{_words(op)} gives no single tensor.")
        if result.shape != expected:
            raise VerificationError(f"{_words(op)} gives the shape {tuple(result.shape)}, in the trace {expected}.")

    @contextmanager
    def _pause(self) -> Iterator[None]:
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    def _position(self) -> tuple:
        frame = sys._getframe(2)
        while frame is not None and frame.f_code.co_filename.startswith(_PLUMBING):
            frame = frame.f_back
        if frame is None:
            return ()
        key = (frame.f_code, frame.f_lasti)
        if key not in self.positions:
            position = next(itertools.islice(frame.f_code.co_positions(), frame.f_lasti // 2, None))
            self.positions[key] = (frame.f_code.co_filename, *(number or 0 for number in position))
        return self.positions[key]

    def check(self) -> None:
        wanted = {op.index for op in self.wanted.values()}
        wanted |= {op.index for path in self.watched for op in self.norm_ops[path]}
        if missed := sorted(wanted - self.met):
            raise VerificationError(f"{_words(self.trace.operations[missed[0]])} was not met in the running model.")


def times(factor: float | torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`x` by a number, or by one value for each token in whatever shape the tokens are."""
    if isinstance(factor, torch.Tensor) and factor.numel() * x.shape[-1] == x.numel():
        factor = factor.reshape(*x.shape[:-1], 1)
    return factor * x


def _through(functions, x: torch.Tensor) -> torch.Tensor:
    for function in functions:
        x = function(x)
    return x


def _keys(trace: Trace) -> Iterator[tuple[tuple, Operation]]:
    """What tells an operation of the trace from all others, without its number."""
    calls: Counter[str] = Counter()
    starts = defaultdict(list)
    for call in trace.calls:
        starts[call.start].append((call, calls[call.path]))
        calls[call.path] += 1
    open_calls: list[tuple[Any, int]] = []
    seen: Counter[tuple] = Counter()
    for op in trace.operations:
        open_calls = [(call, number) for call, number in open_calls if call.end > op.index]
        open_calls += [(call, number) for call, number in starts[op.index] if call.end > op.index]
        number = next((number for call, number in reversed(open_calls) if call.path == op.module), 0)
        span = op.span
        where = () if span is None else (span.file, span.line, span.end_line, span.column, span.end_column)
        place = (op.module, number, op.name, where)
        yield (*place, seen[place]), op
        seen[place] += 1


def _words(op: Operation) -> str:
    where = f", {op.span.function}, line {op.span.line}" if op.span else ""
    return f"the {'norm' if op.norm else op.name} in {op.module or 'the model'}{where}"
