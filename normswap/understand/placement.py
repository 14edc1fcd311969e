"""Where norms stand: the streams of a trace, their blocks, and the slot of each norm in its block.

A block is one residual step, `x' = N_out(a S(x) + b N_branch(F(N_in(x))))`. Its sum is found in the graph: an
operation that adds to a value something computed from that value. What lies between a sum and the values of the
stream it was computed from is the block's branch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from normswap.norms.spec import NormSpec
from normswap.observe.trace import Operation, Trace
from normswap.understand.factors import Factor, factor_of
from normswap.understand.mixing import Meetings
from normswap.understand.transfer import Prober

#: (N_in, N_branch, N_out) -> the placement's name
PLACEMENTS = {
    (True, False, False): "pre",
    (False, False, True): "post",
    (True, True, False): "sandwich",
    (False, True, False): "reordered",
    (True, False, True): "keel",
    (False, False, False): "none",
    (True, True, True): "pre, branch and post",
    (False, True, True): "branch and post",
}


@dataclass
class Block:
    """One residual step.

    Attributes:
        add: index of the operation that adds the branch to the stream.
        module: path of the module in which that happens.
        n_in, n_branch, n_out: norm paths in each slot.
        skip, branch: the coefficients a and b.
        scales: what the skip alone is multiplied by on its way to the sum.
        damping: per norm of `n_in`, the numbers that what it gives is multiplied by before anything else reads it.
        parallel: several branches read the same value and are added together.
        beside: it reads what the sum before it read.
        result: the value after the sum.
        operands: the values that the sum adds, the skip's and the branch's.
        read: per norm of `n_in`, the value of the stream that it reads.
        layer: the number of the layer that it stands in, from 0; None outside of numbered layers.
    """

    add: int
    module: str
    result: int
    previous: int
    skip: float
    branch: float
    n_in: list[str] = field(default_factory=list)
    n_branch: list[str] = field(default_factory=list)
    n_out: list[str] = field(default_factory=list)
    parallel: bool = False
    inside: set[str] = field(default_factory=set)
    operands: tuple[int, int] = (-1, -1)
    read: dict[str, int] = field(default_factory=dict)
    scales: tuple[Factor, ...] = ()
    damping: dict[str, list[Factor]] = field(default_factory=dict)
    layer: int | None = None
    beside: bool = False

    @property
    def is_scaled(self) -> bool:
        """Whether the skip has a factor of its own."""
        return self.skip != 1 or bool(self.scales)

    @property
    def is_damped(self) -> bool:
        """Whether what its norms give to its branch is divided by the root of its layer's number (Sun et al., 2025)."""
        products = [math.prod(f.number for f in self.damping.get(path, ())) for path in self.n_in]
        if not self.layer or not products:
            return False
        return all(math.isclose(product, (self.layer + 1) ** -0.5, rel_tol=1e-7) for product in products)

    @property
    def placement(self) -> str:
        name = PLACEMENTS[bool(self.n_in), bool(self.n_branch), bool(self.n_out)]
        if name == "post" and self.is_scaled:
            name = "deepnorm"
        if name == "pre" and self.is_damped:
            name = "layernorm-scaling"
        return f"{name}, parallel" if self.parallel else name


@dataclass
class Stream:
    """A chain of blocks over one width, from `start` (the value before the first block) on."""

    width: int
    start: int
    analysis: Streams = field(repr=False)
    blocks: list[Block] = field(default_factory=list)
    embedding: list[str] = field(default_factory=list)  # norms between the embeddings and the first block
    final: list[str] = field(default_factory=list)  # norms that read the stream after its last block
    values: set[int] = field(default_factory=set)


class Streams:
    """The streams over one width, and the role of each norm on them."""

    def __init__(self, trace: Trace, norms: dict[str, NormSpec], prober: Prober):
        self.trace, self.norms, self.prober = trace, norms, prober
        self.activations = {v.index for v in trace.values if v.kind in ("computed", "constant") and v.is_float}
        self.bases: dict[int, int] = {}
        self.factors: dict[int, float] = {}
        self.norm_of = {op.outputs[0]: op for op in trace.norm_operations()}
        self.meetings = Meetings(trace, prober)
        self.blocks = self._find_blocks()
        self.streams = self._chain()
        self._fill_slots()

    # -- values of the stream, seen through views, dropouts, casts and constant factors ----------------------------

    def base(self, v: int) -> int:
        """The earliest value that `v` is a rearrangement or a constant multiple of."""
        if v not in self.bases:
            self.bases[v], self.factors[v] = v, 1.0
            op = self._producer(v)
            carried = self._carried(op, v) if op is not None and op.norm is None else None
            if carried is not None:
                source = op.inputs[carried]
                self.bases[v] = self.base(source)
                floats = [u for u in op.inputs if self.trace.values[u].is_float]
                factor = self.prober.factor(op, carried) if len(floats) == 1 else 1.0
                self.factors[v] = self.factors[source] * factor
        return self.bases[v]

    def _producer(self, v: int) -> Operation | None:
        index = self.trace.values[v].producer
        return None if index is None else self.trace.operations[index]

    def _carried(self, op: Operation, v: int) -> int | None:
        """Position of the one computed input that `op` hands on as its output `v`, if there is one.

        Another may be a matrix without channels that it is multiplied by (hyper-connections mix copies of a stream so).
        """
        computed = [
            i for i, u in enumerate(op.inputs) if self.trace.values[u].kind == "computed" and u in self.activations
        ]
        wide = [i for i in computed if self.prober.axes(self.trace.values[op.inputs[i]].shape)]
        if len(wide) != 1:
            return None
        position = wide[0]
        whole = self.trace.values[op.inputs[position]].shape
        if any(_broadcasts(self.trace.values[op.inputs[i]].shape, whole) for i in computed if i != position):
            return None
        for dim in self.prober.axes(self.trace.values[op.inputs[position]].shape):
            passes = self.prober.scale(op, ((position, dim),)).passes
            if any(op.outputs[o] == v for o, _ in passes):
                return position
        return None

    def rearranged(self, v: int, floor: int = 0) -> int | None:
        """What `v` holds the very values of in another order, neither scaled nor pooled: its base, or the value that
        operations before `floor` made. None where it is more than another order.
        """
        while self.base(v) != v:
            op = self._producer(v)
            if op.index < floor:
                return v
            position = self._carried(op, v)
            if not self.prober.rearranges(op, position):
                return None
            v = op.inputs[position]
        return v

    def _factors(self, v: int) -> list[Factor]:
        """What is multiplied into `v` on its way from its base."""
        found = []
        while self.base(v) != v:
            op = self._producer(v)
            position = self._carried(op, v)
            factor = factor_of(self.trace, self.prober, op, position)
            found += [factor] if factor is not None else []
            v = op.inputs[position]
        return found

    def _shared(self, factor: Factor, ancestors: int) -> bool:
        """Whether what a factor gives is among `ancestors`."""
        return any(ancestors >> v & 1 for v in self.trace.operations[factor.op].outputs)

    def trunk(self, v: int) -> tuple[int, list[str]]:
        """Back from `v` along the stream to where it was last added to: that value, and the norms in between."""
        passed: list[str] = []
        while True:
            v = self.base(v)
            op = self.norm_of.get(v)
            if op is None:
                return v, passed
            passed.insert(0, op.norm)
            v = op.inputs[0]

    # -- residual sums ---------------------------------------------------------------------------------------------

    def _find_blocks(self) -> list[Block]:
        ancestors = self.trace.ancestors()
        chains: dict[int, int] = {}  # per residual sum, a bit set of the stream's values up to it
        blocks: list[Block] = []

        def chain(v: int) -> int:
            bits = 1 << v
            root, _ = self.trunk(v)
            u = v
            while True:  # every value met on the way back counts as the stream's
                bits |= 1 << self.base(u) | 1 << u
                op = self.norm_of.get(self.base(u))
                if op is None:
                    break
                u = op.inputs[0]
            return bits | chains.get(root, 0)

        for op in self.trace.operations:
            if op.norm is not None or len(op.outputs) != 1:
                continue
            shape = self.trace.values[op.outputs[0]].shape
            if self.prober.width not in shape:
                continue
            same = [
                i
                for i, v in enumerate(op.inputs)
                if self.trace.values[v].kind == "computed"
                and v in self.activations
                and self.trace.values[v].shape == shape
            ]
            for a, b in [(a, b) for a in same for b in same if a != b]:
                skip, branch = op.inputs[a], op.inputs[b]
                own = chain(skip)
                if not ancestors[branch] & own or chain(branch) & own & ~(1 << branch):
                    continue
                coefficients = self.prober.sum(op, a, b)
                if coefficients is None:
                    continue
                root, _ = self.trunk(skip)
                self.base(branch)
                own_scales = tuple(f for f in self._factors(skip) if not self._shared(f, ancestors[branch]))
                # a factor before the first block scales the embeddings, not the skip
                numbers = math.prod(abs(f.number or 1.0) for f in own_scales)
                factor = self.factors[skip] if root in chains else round(numbers, 9)
                scales = coefficients[0] * factor, coefficients[1] * self.factors[branch]
                block = Block(op.index, op.module, op.outputs[0], root, *scales, operands=(skip, branch))
                block.scales = own_scales
                blocks.append(block)
                chains[op.outputs[0]] = own | 1 << op.outputs[0]
                self.bases[op.outputs[0]], self.factors[op.outputs[0]] = op.outputs[0], 1.0
                break
        return blocks

    def _chain(self) -> list[Stream]:
        streams: dict[int, Stream] = {}
        of_result: dict[int, Stream] = {}
        for block in self.blocks:
            stream = of_result.get(block.previous)
            if stream is None:
                stream = streams.setdefault(block.previous, Stream(self.prober.width, block.previous, self))
            stream.blocks.append(block)
            of_result[block.result] = stream
        for stream in streams.values():
            stream.values = {stream.start, *(block.result for block in stream.blocks)}
        # an activation such as x + c x^3 adds to a value something computed from it too, but no norm stands there
        normed = {self.base(op.inputs[0]) for op in self.trace.norm_operations()}
        kept = [stream for stream in streams.values() if stream.values & normed or self._trunk_norms(stream)]
        self.blocks = [block for block in self.blocks if any(block in stream.blocks for stream in kept)]
        return kept

    def _trunk_norms(self, stream: Stream) -> set[str]:
        return {path for block in stream.blocks for path in self.trunk(block.operands[0])[1]}

    # -- slots -----------------------------------------------------------------------------------------------------

    def _fill_slots(self) -> None:
        by_result = {block.result: block for block in self.blocks}
        values = {v for stream in self.streams for v in stream.values}
        order: dict[str, int] = {}
        for op in self.trace.norm_operations():
            order.setdefault(op.norm, op.index)
        trunk_norms: set[str] = set()
        own: dict[int, set[int]] = {}  # per stream its values, and what norms on its trunk make of them
        for stream in self.streams:
            trunk = self._trunk_norms(stream)
            own[stream.start] = stream.values | {v for v, op in self.norm_of.items() if op.norm in trunk}
            for block in stream.blocks:
                root, passed = self.trunk(block.operands[0])
                target = by_result[root].n_out if root in by_result else stream.embedding
                target.extend(path for path in passed if path not in target)
                trunk_norms.update(passed)
        stops = values | {v for v, op in self.norm_of.items() if op.norm in trunk_norms}
        claimed = set(trunk_norms)
        damping = self._damping()
        for stream, block in [(s, block) for s in self.streams for block in s.blocks]:
            branch = block.operands[1]
            touched = self._cone(block, branch, stops)
            # what reads another stream (cross-attention to an encoder's final norm) is no norm of this block
            block.n_in = [path for path in block.n_in if block.read[path] in own[stream.start]]
            block.n_in.sort(key=order.get)
            end = self.norm_of.get(self.base(branch))
            if end is not None and end.norm not in trunk_norms:
                block.n_branch.append(end.norm)
            block.damping = {op.norm: damping[op.index] for op in self.norm_of.values() if self._reads(op, block)}
            block.inside -= set(block.n_in) | set(block.n_branch)
            claimed |= block.inside | set(block.n_in) | set(block.n_branch)
            earlier = by_result.get(self.base(block.operands[0]))
            if earlier is not None and touched & own[stream.start] and earlier.result not in touched:
                block.parallel = earlier.parallel = block.beside = True
            elif self._two_branches(branch):
                block.parallel = True
        for op in self.trace.norm_operations():
            base = self.base(op.inputs[0])
            if op.norm in claimed or base not in values:
                continue
            block = by_result.get(base)
            if block is not None and _closes(op.norm, block):
                block.n_out.append(op.norm)  # the last block of a post-norm stream
            else:
                next(s for s in self.streams if base in s.values).final.append(op.norm)

    def _damping(self) -> dict[int, list[Factor]]:
        """Per norm operation, by index, the numbers that its output is multiplied by before anything else reads it."""
        consumers, live = self.trace.consumers(), self.trace.live()
        found: dict[int, list[Factor]] = {}
        for op in self.trace.norm_operations():
            factors, v = [], op.outputs[0]
            while True:
                readers = [reader for reader in consumers.get(v, ()) if any(o in live for o in reader.outputs)]
                if len(readers) != 1 or readers[0].norm is not None or len(readers[0].outputs) != 1:
                    break
                position = self._carried(readers[0], readers[0].outputs[0])
                if position is None or readers[0].inputs[position] != v:
                    break
                factor = factor_of(self.trace, self.prober, readers[0], position)
                if factor is not None and factor.number is None:
                    break
                factors += [factor] if factor is not None else []
                v = readers[0].outputs[0]
            found[op.index] = factors
        return found

    def _reads(self, op: Operation, block: Block) -> bool:
        """Whether a norm operation is one of the block's N_in, in the block's own run of it."""
        return op.norm in block.n_in and self.base(op.inputs[0]) == block.read[op.norm]

    def _cone(self, block: Block, branch: int, stops: set[int]) -> set[int]:
        """Walk back from the branch to the stream: fills `n_in` and `inside`, returns the stream values it read."""
        touched: set[int] = set()
        seen: set[int] = set()
        todo = [branch]
        while todo:
            v = todo.pop()
            if v in seen:
                continue
            seen.add(v)
            if v in stops:
                touched.add(v)
                continue
            op = self._producer(v)
            if op is None:
                continue
            if op.norm is not None:
                slot = self.base(op.inputs[0])
                if slot in stops:
                    block.read[op.norm] = slot
                    block.n_in = block.n_in if op.norm in block.n_in else [op.norm, *block.n_in]
                    touched.add(slot)
                    continue
                block.inside.add(op.norm)
            todo.extend(u for u in op.inputs if u in self.activations)
        return touched

    def _two_branches(self, branch: int) -> bool:
        """A sum of two, of which one mixes positions (attention) and the other does not."""
        op = self._producer(self.base(branch))
        if op is None or op.norm is not None:
            return False
        shape = self.trace.values[op.outputs[0]].shape
        parts = [
            v for v in op.inputs if self.trace.values[v].kind == "computed" and self.trace.values[v].shape == shape
        ]
        return len(parts) == 2 and self._mixes(parts[0]) != self._mixes(parts[1])

    def _mixes(self, v: int) -> bool:
        """Whether two computed values are brought together between the stream and `v`."""
        stops = {u for stream in self.streams for u in stream.values}
        seen, todo = set(), [v]
        while todo:
            u = todo.pop()
            op = self._producer(u)
            if u in seen or u in stops or op is None:
                continue
            seen.add(u)
            if self.meetings.meet(op):
                return True
            todo.extend(w for w in op.inputs if w in self.activations)
        return False


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    return all(a in (1, b) for a, b in zip(reversed(shape), reversed(to), strict=False)) and len(shape) <= len(to)


def outermost(found: list[Streams], ancestors: list[int]) -> list[Stream]:
    """All streams in order of their first block, without those inside one branch of another (a scan, a rotation)."""
    every = [(streams, stream) for streams in found for stream in streams.streams]

    def inside(stream: Stream, streams: Streams, block: Block) -> bool:
        branch = ancestors[block.operands[1]] & ~ancestors[block.previous]
        results = [inner.result for inner in stream.blocks]
        return all(branch >> v & 1 and ancestors[v] >> block.previous & 1 for v in results)

    kept = [
        stream
        for _, stream in every
        if not any(
            inside(stream, streams, block)
            for streams, other in every
            if other.width != stream.width
            for block in other.blocks
        )
    ]
    # where a layer has as many positions as another has channels, its sums are found once for each
    specs = {path: spec for streams in found for path, spec in streams.norms.items()}

    def own(stream: Stream) -> int:
        slots = [path for block in stream.blocks for path in (*block.n_in, *block.n_branch, *block.n_out)]
        return sum(stream.width in (specs[path].width, specs[path].channels) for path in slots)

    def better(stream: Stream) -> bool:
        adds = {block.add for block in stream.blocks}
        return any(
            other.width != stream.width and own(other) > own(stream) and adds & {block.add for block in other.blocks}
            for other in kept
        )

    return sorted((stream for stream in kept if not better(stream)), key=lambda stream: stream.blocks[0].add)


def _closes(norm: str, block: Block) -> bool:
    """Whether a norm behind the last block belongs to it: it stands in the same layer, or, outside of numbered layers,
    in the module of the sum, and the block has no norm of its own before its branch.
    """
    layer = _layer(norm)
    return layer == _layer(block.module) if layer else not block.n_in and norm.rpartition(".")[0] == block.module != ""


def _layer(path: str) -> str:
    """The path up to its last number: the repeated layer it belongs to, empty if none."""
    parts = path.split(".")
    numbered = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbered[-1] + 1]) if numbered else ""
