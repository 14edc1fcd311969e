"""Where in a model's source a block's sum, its norms' calls and its ends stand.

The trace knows for every call the frames of the model's own code that led to it. A place is an expression in a method
of one module: what is changed there changes nothing of any other module, and nothing that the expression did not do.
"""

from __future__ import annotations

import ast
import inspect
import linecache
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedModel

from normswap.errors import RefusedError
from normswap.observe.trace import Frame, Operation, Ref
from normswap.planning.edits import Change
from normswap.source.expressions import factors, first_of, helper, is_number, passed, summands
from normswap.source.methods import Method, place
from normswap.understand.normmap import NormMap, StreamInfo
from normswap.understand.placement import Block, Stream


class NoPlace(RefusedError):
    """The source does not have the expression that would have to change."""


@dataclass(frozen=True)
class Place:
    """An expression in a method of a module.

    Attributes:
        module: path of the module whose method is changed.
        method: the method, with its source.
        node: the expression, or the statement of a sum in place.
        inner: the expressions of a sum's skip and branch, None where the source has none of their own.
    """

    module: str
    method: Method
    node: ast.AST
    skip: ast.AST | None = None
    branch: ast.AST | None = None

    def change(self, kind: str, name: str | None = None, node: ast.AST | None = None) -> Change:
        return Change(kind=kind, span=place(node or self.node), name=name)


class Places:
    """Finds places in the source of the model that `normmap` describes."""

    def __init__(self, normmap: NormMap):
        self.normmap, self.trace = normmap, normmap.trace
        self._methods: dict[tuple[type, str], Method] = {}

    @cached_property
    def _runs(self) -> dict[tuple[str, object], set[int]]:
        """Per expression of a module, the operations that it runs, over the whole pass."""
        found: dict[tuple[str, object], set[int]] = defaultdict(set)
        for op in self.trace.operations:
            for frame in op.frames:
                if frame.module is not None:
                    found[frame.module, frame.span].add(op.index)
        return found

    @cached_property
    def _times(self) -> dict[str, int]:
        """How many times each module runs."""
        found: dict[str, int] = defaultdict(int)
        for call in self.trace.calls:
            found[call.path] += 1
        return found

    @cached_property
    def _towers(self) -> list[list[StreamInfo]]:
        """Streams with the same sums in the same modules: one tower that runs several times."""
        found: dict[tuple, list[StreamInfo]] = {}
        for stream in self.normmap.streams:
            spans = [(block.module, self.trace.operations[block.add].span) for block in stream.blocks]
            found.setdefault(tuple(spans), []).append(stream)
        return list(found.values())

    def again(self, stream: StreamInfo) -> bool:
        """Whether an earlier stream is another run of the same tower."""
        return not any(tower[0] is stream for tower in self._towers)

    def runs(self, block: Block) -> int:
        """How many times the tower of a block runs."""
        return next(len(tower) for tower in self._towers for s in tower if any(b is block for b in s.blocks))

    def each_run(self, block: Block) -> list[Block]:
        """The block in every run of its tower."""
        tower = next(t for t in self._towers for s in t if any(b is block for b in s.blocks))
        number = next(i for s in tower for i, b in enumerate(s.blocks) if b is block)
        return [stream.blocks[number] for stream in tower]

    def product(self, index: int, times: int) -> tuple[Place, str]:
        """The product that the operation `index` is, and the side of it that is no number: `left` or `right`.

        Raises:
            NoPlace: it is no product of the method with a number of the module, or runs more often than `times`.
        """
        op = self.trace.operations[index]
        if not op.frames or op.frames[0].module is None:
            raise NoPlace(self._shown(op, "expected the product in a method of a module"))
        self._check_owner(op.frames[0], op)
        if len(self._runs[op.frames[0].module, op.frames[0].span]) > times:
            raise NoPlace(self._shown(op, "one line multiplies for several blocks"))
        found = self._at(op.frames[0])
        sides = factors(found.node)
        numbers = [side for side, node in sides.items() if is_number(found.method, node)]
        if len(numbers) != 1 or (isinstance(found.node.op, ast.Div) and numbers != ["right"]):
            raise NoPlace(self.shown(found, "expected a product with one number, written out or held by the module"))
        return found, "left" if numbers == ["right"] else "right"

    def sum(self, block: Block) -> Place:
        """The expression that gives the block's result: the sum itself, or the call of a helper that makes it.

        Raises:
            NoPlace: there is none that this block alone runs.
        """
        op = self.trace.operations[block.add]
        sums = {other.add for stream in self.normmap.streams for other in stream.blocks}
        times = self.runs(block)
        for depth, frame in enumerate(op.frames):
            if frame.module is None:
                continue
            self._check_owner(frame, op)
            run = self._runs[frame.module, frame.span]
            if len(run & sums) > times or (depth == 0 and len(run) > times):
                continue  # one line that serves several blocks
            found = self._at(frame)
            skip, branch = self._operands(op, block, depth, found.node)
            return Place(found.module, found.method, found.node, skip, branch)
        raise NoPlace(self._shown(op, "it is run for several blocks, or in no method of a module"))

    def call(self, norm: str, times: int = 1) -> Place:
        """The call of a norm that runs `times` times, always from the same line of the method that makes it."""
        ops = [op for op in self.trace.norm_operations() if op.norm == norm]
        if len(ops) != times or len({op.frames[:1] for op in ops}) != 1 or not ops[0].frames:
            raise NoPlace(f"{norm} runs {len(ops)} times; expected one call to change.")
        frame = ops[0].frames[0]
        if frame.module is None or len(self._runs[frame.module, frame.span]) > times:
            raise NoPlace(self._shown(ops[0], "it is called from a function, or one line calls several"))
        self._check_owner(frame, ops[0])
        return self._at(frame)

    def entry(self, stream: Stream, block: Block) -> tuple[str, Method, str, int]:
        """The innermost module that takes in what the block reads and adds to: its path, `forward`, argument and value.

        Raises:
            NoPlace: the value comes into being where it is used, in no module of its own.
        """
        readers = [block.add, *self._readers(stream, block)]
        base = stream.analysis.base
        for call in reversed(self.trace.calls):  # inner calls come after outer ones
            if not all(call.start <= index < call.end for index in readers):
                continue
            taken = [key for key, v in call.arguments if base(v) == base(block.operands[0])]
            produced = self.trace.values[base(block.operands[0])].producer
            if not taken or (produced is not None and call.start <= produced < call.end):
                continue
            if self._times[call.path] > self.runs(block):
                raise NoPlace(f"{call.path} runs {self._times[call.path]} times in one pass; expected once.")
            if issubclass(self.normmap.classes[call.path], PreTrainedModel) and not call.parent:
                continue
            method = self._method(call.path, "forward")
            value = dict(call.arguments)[taken[0]]
            return call.path, method, _parameter(self.normmap.classes[call.path], taken[0]), value
        raise NoPlace(self._shown(self.trace.operations[block.add], "no module takes in what this block reads"))

    def start(self, stream: Stream, block: Block) -> Place:
        """The expression, in the module of the block's sum, that gives the value which the block reads and adds to.

        Raises:
            NoPlace: it is not made there, or in several things at once.
        """
        base, module = stream.analysis.base, self.sum(block).module
        value = base(block.operands[0])
        producer = self.trace.values[value].producer
        op = None if producer is None else self.trace.operations[producer]
        if op is None or self._times[module] > self.runs(block):
            raise NoPlace(self._shown(self.trace.operations[block.add], "what this block reads comes from elsewhere"))
        frames = op.frames
        if op.module != module:
            calls = [c for c in self.trace.calls if c.parent == module and c.start <= producer < c.end]
            if not calls or value not in {base(v) for v in calls[0].outputs}:
                raise NoPlace(self._shown(op, f"what the block reads is made here and not in {module}"))
            frames = calls[0].frames
        frame = next((frame for frame in frames if frame.module == module), None)
        if frame is None:
            raise NoPlace(self._shown(op, f"what the block reads is made here and not in {module}"))
        found = self._at(frame)
        if op.module != module and not calls[0].single:
            first = first_of(found.method.tree, found.node)
            if first is None:
                raise NoPlace(self.shown(found, "expected the first of what it gives to be taken by [0]"))
            return Place(found.module, found.method, first)
        return found

    def branch_entries(self, stream: Stream, block: Block) -> list[Place]:
        """The arguments by which the block's branch reads the stream, in the method that also hands on the skip."""
        base, value = stream.analysis.base, stream.analysis.base(block.operands[0])
        around = [c for c in self.trace.calls if c.start <= block.add < c.end]
        branch = self._cone(block)
        for scope in reversed(around):
            found: list[Place] = []
            reads = [i for i in branch if value in {base(v) for v in self.trace.operations[i].inputs}]
            if not reads or not all(scope.start <= i < scope.end for i in reads):
                continue
            inside = [c for c in self.trace.calls if c.parent == scope.path and scope.start <= c.start < scope.end]
            left = set(reads)
            for call in inside:
                taken = [key for key, v in call.arguments if base(v) == value]
                served = {i for i in left if call.start <= i < call.end}
                if not served or not taken:
                    continue
                left -= served
                for key in taken:
                    found.append(self._argument(self._at(call.frames[0]), key))
            for index in sorted(left):
                op = self.trace.operations[index]
                frame = op.frames[0]
                if frame.module != scope.path:
                    raise NoPlace(self._shown(op, "the branch reads the stream in a function"))
                found.append(self._operand(self._at(frame), op, value, base))
            return found
        raise NoPlace(self._shown(self.trace.operations[block.add], "no method holds both the skip and the branch"))

    # -- from frames to nodes --------------------------------------------------------------------------------------

    def _at(self, frame: Frame) -> Place:
        method = self._method(frame.module, frame.span.function.rpartition(".")[2])
        try:
            return Place(frame.module, method, method.locate(frame.span))
        except RefusedError as error:
            raise NoPlace(str(error)) from error

    def _method(self, path: str, name: str) -> Method:
        key = self.normmap.classes[path], name
        if key not in self._methods:
            try:
                self._methods[key] = Method.of(*key)
            except RefusedError as error:
                raise NoPlace(str(error)) from error
        return self._methods[key]

    def _check_owner(self, frame: Frame, op: Operation) -> None:
        owner = self.normmap.classes[frame.module]
        if not frame.module or issubclass(owner, PreTrainedModel):
            raise NoPlace(self._shown(op, f"it stands in {owner.__name__} itself and not in a layer"))

    def _operands(self, op: Operation, block: Block, depth: int, node: ast.AST):
        """The expressions of the skip and the branch in a sum, or in the call of a helper that adds two of its own."""
        frame = op.frames[0]
        function = None
        if depth == 0:
            pair = summands(node)
        elif depth == 1 and frame.module is None:
            function, inner = helper(frame)
            pair = None if inner is None else summands(inner)
        else:
            return None, None
        values = [leaf.value for leaf in op.leaves if isinstance(leaf, Ref)]
        if pair is None or len(values) != 2:
            return None, None
        sides = dict(zip(values, pair, strict=True))
        skip, branch = (sides.get(v) for v in block.operands)
        if depth == 0:
            return skip, branch
        return tuple(passed(function, side, node) for side in (skip, branch))

    def _readers(self, stream: Stream, block: Block) -> list[int]:
        value = stream.analysis.base(block.operands[0])
        base = stream.analysis.base
        return [i for i in self._cone(block) if value in {base(v) for v in self.trace.operations[i].inputs}]

    def _cone(self, block: Block) -> list[int]:
        """Operations between the stream before the block and its branch."""
        found: set[int] = set()
        todo = [block.operands[1]]
        floor = self.trace.values[block.operands[0]].producer
        while todo:
            producer = self.trace.values[todo.pop()].producer
            if producer is None or producer in found or (floor is not None and producer <= floor):
                continue
            found.add(producer)
            todo += self.trace.operations[producer].inputs
        return sorted(found)

    def _argument(self, found: Place, key: int | str) -> Place:
        node = found.node
        if isinstance(node, ast.Call):
            named = {word.arg: word.value for word in node.keywords}
            if key in named:
                return Place(found.module, found.method, named[key])
            if isinstance(key, int) and key < len(node.args) and not isinstance(node.args[key], ast.Starred):
                return Place(found.module, found.method, node.args[key])
        raise NoPlace(self.shown(found, f"expected the argument {key} to be written out in this call"))

    def _operand(self, found: Place, op: Operation, value: int, base: Callable[[int], int]) -> Place:
        refs = [leaf.value for leaf in op.leaves if isinstance(leaf, Ref)]
        position = next(i for i, v in enumerate(refs) if base(v) == value)
        pair = summands(found.node)
        if pair is not None and len(refs) == 2:
            return Place(found.module, found.method, pair[position])
        if isinstance(found.node, ast.Call) and position < len(found.node.args):
            return Place(found.module, found.method, found.node.args[position])
        raise NoPlace(self._shown(op, "the branch reads the stream there in a way that is not followed"))

    def shown(self, found: Place, why: str) -> str:
        return f"{found.module}, {found.method.where}: {why}.\n    {found.method.source(found.node)}"

    def _shown(self, op: Operation, why: str) -> str:
        frame = next((f for f in op.frames if f.module is not None), None) or (op.frames[0] if op.frames else None)
        if frame is None:
            return f"{op.name} in {op.module or 'the model'}: {why}."
        lines = _lines(frame)
        where = f"{frame.span.file.rpartition('site-packages/')[2]}:{frame.span.line}"
        return f"{op.name} in {op.module or 'the model'} ({where}): {why}.\n{lines}"


def _lines(frame: Frame) -> str:
    span = frame.span
    return "\n".join(f"    {linecache.getline(span.file, n).rstrip()}" for n in range(span.line, span.end_line + 1))


def _parameter(owner: type, key: int | str) -> str:
    """The name of a parameter of `forward`, by position or keyword."""
    parameters = [p for name, p in inspect.signature(owner.forward).parameters.items() if name != "self"]
    named = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if key not in named and (isinstance(key, str) or key >= len(positional)):
        raise NoPlace(f"{owner.__name__}.forward takes what this block reads in *args or **kwargs; expected a name.")
    return key if isinstance(key, str) else positional[key]
