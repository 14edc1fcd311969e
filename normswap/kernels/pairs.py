"""Residual sums and the norms beside them that one call of a fused norm can compute, found in a model's own source.

    h = residual + f; y = self.norm(h)                      y, h = self.norm.add_norm(f, residual)
    y = self.norm(f + residual)                             y = self.norm.add_norm(f, residual)[0]
    f = self.norm(f); h = residual + f                      h = self.norm.norm_add(f, residual)
    f = self.norm(f); h = residual + f; y = self.norm2(h)   y, h = self.norm.norm_add_norm(f, residual, self.norm2)

The trace says that the norm reads the very sum, or gives the very summand, and the source that it does so whenever it
runs: a dropout, which an observed pass does without, is seen there. What is not proved stays, with the reason.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass

from normswap.errors import RefusedError
from normswap.kernels.call import Form, unserved
from normswap.kernels.merging import Beside, Giver, Reader, given, merged, new_name
from normswap.observe.trace import Operation, Ref, Span
from normswap.planning.edits import Change
from normswap.planning.rewrites.places import NoPlace, Place, Places
from normswap.source.expressions import summands
from normswap.source.flow import SIMPLE, Flow, Route
from normswap.source.methods import place
from normswap.understand.normmap import NormMap, StreamInfo
from normswap.understand.placement import Block


@dataclass(frozen=True)
class Pair:
    """A residual sum, and what becomes of it.

    Attributes:
        form: of the call that they become; None where sum and norms stay as they are.
        module: path of the module in which the sum is.
        method: the method that is changed, `Class.name`; None where it stays.
        norms: paths of the norms in the call, in the order in which they run.
        reason: why it stays, None where it does not.
        name, digest: of the method's source.
        changes: of it.
    """

    form: Form | None
    module: str
    method: str | None = None
    norms: tuple[str, ...] = ()
    reason: str | None = None
    name: str = ""
    digest: str = ""
    changes: tuple[Change, ...] = ()


def find_pairs(normmap: NormMap, paths: Collection[str] | None = None) -> list[Pair]:
    """Every residual sum of a model, each once, with what it becomes or why it stays.

    Args:
        normmap: of the model.
        paths: the norms that have the methods of a fused norm; by default all that could have.
    """
    finder = _Finder(normmap, paths)
    found = []
    for stream in normmap.streams:
        if finder.places.again(stream):
            continue
        for block in stream.blocks:
            try:
                found.append(finder.pair(stream, block))
            except NoPlace as error:
                found.append(Pair(None, block.module, reason=str(error)))
    return found


class _Finder:
    def __init__(self, normmap: NormMap, paths: Collection[str] | None):
        self.normmap, self.trace, self.paths = normmap, normmap.trace, paths
        self.places = Places(normmap)
        self.norms = list(self.trace.norm_operations())
        self.made = {op.outputs[0]: op for op in self.norms}
        self.consumers = self.trace.consumers()
        self.given = {v for call in self.trace.calls for v in call.outputs if call.path not in normmap.sites}
        self.given |= {*self.trace.outputs, *self.trace.reads}
        self.spans: dict[str | None, set[Span]] = defaultdict(set)
        for seen in (*self.trace.operations, *self.trace.calls):
            for frame in seen.frames:
                self.spans[frame.module].add(frame.span)
        self.used: set[str] = set()
        self.kept: dict[tuple[str, str], set[str]] = defaultdict(set)

    def pair(self, stream: StreamInfo, block: Block) -> Pair:
        found = self.places.sum(block)
        sides = self._sides(block, found)
        flow = self._flow(found)
        giver, no_giver = self._giver(block, found, sides, flow)
        reader, no_reader = self._reader(stream, block, found, flow)
        if giver is None and reader is None:
            raise NoPlace("; ".join(dict.fromkeys(filter(None, (no_reader, no_giver)))))
        form: Form = "norm-add-norm" if giver and reader else "norm-add" if giver else "add-norm"
        branch = next(side for side, (_, value) in sides.items() if value == block.operands[1])
        key = found.module, found.method.where
        name = new_name(found.method, self.kept[key])
        changes = merged(found, {side: node for side, (node, _) in sides.items()}, branch, giver, reader, form, name)
        self.kept[key] |= {change.name for change in changes if change.name == name}
        norms = tuple(beside.norm.path for beside in (giver, reader) if beside is not None)
        self.used.update(norms)
        method = found.method
        where = f"{method.owner.__name__}.{method.name}"
        return Pair(form, found.module, where, norms, None, method.name, method.digest, changes)

    # -- the sum ---------------------------------------------------------------------------------------------------

    def _sides(self, block: Block, found: Place) -> dict[str, tuple[ast.AST, int]]:
        """Expression and value of `left` and `right`."""
        op, pair = self.trace.operations[block.add], summands(found.node)
        if isinstance(found.node, ast.AugAssign) or op.mutated:
            raise NoPlace(self.places.shown(found, "the sum is made in place, which others may see"))
        values = [leaf.value for leaf in op.leaves if isinstance(leaf, Ref)]
        if pair is None or op.frames[0].span.function != found.method.function.__code__.co_qualname:
            raise NoPlace(self.places.shown(found, "the sum is made elsewhere, in a function that this calls"))
        if len(op.leaves) != 2 or len(set(values)) != 2:
            raise NoPlace(self.places.shown(found, "expected a sum of two tensors"))
        try:
            found.method.global_names()
        except RefusedError as error:
            raise NoPlace(str(error)) from error
        return dict(zip(("left", "right"), zip(pair, values, strict=True), strict=True))

    def _flow(self, found: Place) -> Flow:
        code = found.method.function.__code__
        spans = self.spans[found.module]
        lines = {s.line for s in spans if s.file == code.co_filename and s.function == code.co_qualname}
        return Flow(found.method, {line - found.method.first_line for line in lines})

    # -- the norm before it ----------------------------------------------------------------------------------------

    def _giver(self, block: Block, found: Place, sides, flow: Flow) -> tuple[Giver | None, str | None]:
        """The norm that gives a side, rather the branch than the skip, or why there is none."""
        why = None
        for side, (node, value) in sorted(sides.items(), key=lambda item: item[1][1] == block.operands[0]):
            op = self.made.get(value)
            if op is None:
                continue
            try:
                norm = self._norm(op.norm, block, found)
                self._check_moves(norm, node, found, flow)
                self._check_only_reader(block, op)
                return Giver(norm, side), None
            except RefusedError as error:
                why = why or f"{op.norm} gives a side of it, but {error}"
        return None, why

    def _check_only_reader(self, block: Block, op: Operation) -> None:
        """Whether the sum alone reads what a norm gives, and nothing changes before it does."""
        results = {o.outputs[0]: o.index for o in self.norms if o.norm == op.norm}
        for run in self.places.each_run(block):
            value = next((v for v in run.operands if v in results), None)
            if value is None or value in self.given or [o.index for o in self.consumers[value]] != [run.add]:
                raise NoPlace("others read what it gives as well")
            if any(other.mutated for other in self.trace.operations[results[value] : run.add]):
                raise NoPlace("something is changed in place between them")

    def _check_moves(self, norm: Beside, side: ast.AST, found: Place, flow: Flow) -> None:
        """Whether a norm may run where its result is added, on what the variable of its result holds until then."""
        if side is norm.call.node:
            return
        made, used = flow.statement(norm.call.node), flow.statement(found.node)
        match made, side:
            case ast.Assign(targets=[ast.Name(id=name)], value=value), ast.Name(id=read) if name == read:
                plain = value is norm.call.node
            case _:
                plain = False
        if not plain:
            raise NoPlace(f"its result goes through `{found.method.source(made).strip()}` to the sum")
        *around, (_, block, first) = flow.standing(made)
        *_, (_, other, last) = flow.standing(used)
        if block is not other or first > last:
            raise NoPlace("they stand in different branches")
        reads = [n for n in ast.walk(used) if isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Load)]
        between = [n for s in block[first + 1 : last] for n in ast.walk(s) if isinstance(n, ast.Name) and n.id == name]
        if reads != [side] or between:
            raise NoPlace(f"`{name}` is used elsewhere as well")
        if not all(isinstance(s, SIMPLE) for s in block[first + 1 : last]):
            raise NoPlace("a branch between them may change what it reads")
        replaced = isinstance(used, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in used.targets)
        loops = any(isinstance(owner, ast.For | ast.While | ast.AsyncFor) for owner, *_ in around)
        later = [n for n in ast.walk(found.method.tree) if isinstance(n, ast.Name) and n.id == name]
        later = [n for n in later if isinstance(n.ctx, ast.Load) and place(n)[:2] > place(used)[2:]]
        if not replaced and (later or loops) and not isinstance(used, ast.Return):
            raise NoPlace(f"`{name}` is used elsewhere as well")

    # -- the norm after it -----------------------------------------------------------------------------------------

    def _reader(self, stream: StreamInfo, block: Block, found: Place, flow: Flow) -> tuple[Reader | None, str | None]:
        """The first norm that reads the sum, or why there is none."""
        why = None
        base = stream.found.analysis.base
        for op in self.norms:
            if base(op.inputs[0]) != block.result:
                continue
            try:
                norm = self._norm(op.norm, block, found)
                return Reader(norm, self._route(stream, block, op, norm, found, flow)), None
            except RefusedError as error:
                why = why or f"{op.norm} reads it, but {error}"
        return None, why or "no norm reads it"

    def _route(self, stream, block: Block, op: Operation, norm: Beside, found: Place, flow: Flow) -> Route | None:
        for run in self.places.each_run(block):
            inputs = [o.inputs[0] for o in self.norms if o.norm == op.norm]
            if not any(self._same_rows(stream, v, run.result) for v in inputs):
                raise NoPlace("what it reads is scaled, pooled or in another order")
        read = given(norm.call.node)
        if read is found.node:
            return None
        made = flow.statement(found.node)
        match made, read:
            case ast.Assign(targets=[ast.Name()], value=value), ast.Name() if value is found.node:
                route = flow.route(made, read)
            case ast.Assign(targets=[ast.Name()], value=value), _ if value is found.node:
                raise NoPlace(f"it is given `{found.method.source(read)}`: expected a variable that holds the sum")
            case _:
                raise NoPlace(f"the sum is part of `{found.method.source(made).strip()}`")
        exact = op.inputs[0] == block.result
        if route.reshaped == exact:
            raise NoPlace("the sum has another shape there than its source says")
        return route

    def _same_rows(self, stream: StreamInfo, value: int, result: int) -> bool:
        """Whether a value is a sum, or has its rows in a shape of its own."""
        analysis, values = stream.found.analysis, self.trace.values
        same = value == result or (analysis.base(value) == result and analysis.rearranged(value) == result)
        a, b = values[value].shape, values[result].shape
        return same and a[-1] == b[-1]

    # -- both ------------------------------------------------------------------------------------------------------

    def _norm(self, path: str, block: Block, found: Place) -> Beside:
        """The norm as the method with the sum calls it, with one argument."""
        if self.paths is not None and path not in self.paths:
            raise NoPlace("no kernel serves it")
        if path in self.used:
            raise NoPlace("it is part of another sum's call")
        if why := unserved(self.normmap.sites[path].spec):
            raise NoPlace(f"no kernel is for it ({why})")
        op = next(op for op in self.norms if op.norm == path)
        if op.frames and op.frames[0].module not in (found.module, None):
            frame = op.frames[0]
            raise NoPlace(f"{frame.span.function} of {frame.module or 'the model'} calls it")
        call = self.places.call(path, self.places.runs(block))
        if call.module != found.module or call.method is not found.method:
            raise NoPlace(f"{call.method.owner.__name__}.{call.method.name} calls it")
        name = _attribute(call)
        if name is None or f"{call.module}.{name}" != path:
            raise NoPlace(f"it is called as `{call.method.source(call.node)}`: expected an attribute of the module")
        own = name.partition(".")[0]
        if any(
            isinstance(n, ast.Attribute) and n.attr == own and not isinstance(n.ctx, ast.Load)
            for n in ast.walk(found.method.tree)
        ):
            raise NoPlace(f"the method sets {own}")
        if given(call.node) is None:
            raise NoPlace(f"it is called as `{call.method.source(call.node)}`: expected one argument")
        return Beside(path, call, name)


def _attribute(call: Place) -> str | None:
    """`a.b` for a call `self.a.b(..)`."""
    node, names = getattr(call.node, "func", None), []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    first = call.method.tree.args.args[0].arg
    own = isinstance(node, ast.Name) and node.id == first == "self"
    return ".".join(reversed(names)) if own and names else None
