"""A norm map as it is drawn: per stream the layers that are alike, the steps of one, and the norm of each slot."""

from __future__ import annotations

import math
from collections.abc import Sequence

from normswap.paths import blurred, folded
from normswap.report.findings.model import Layers, MapDrawing, SlotNorm, Step, StreamDrawing
from normswap.understand.normmap import NormMap, StreamInfo
from normswap.understand.placement import Block

# How far behind a branch's end its modules are looked for: views, casts and sums stand between.
_REACH = 12


def drawing(normmap: NormMap) -> MapDrawing:
    """What is drawn of `normmap`."""
    buffers = {value.name for value in normmap.trace.values if value.kind == "buffer"}
    stored = [name for name in normmap.parameters if name in normmap.stored and name not in buffers]
    return MapDrawing(
        architecture=normmap.architecture,
        streams=tuple(_stream(normmap, stream) for stream in normmap.streams),
        parameters=sum(math.prod(normmap.parameters[name]) for name in stored),
        notes=tuple(normmap.notes),
    )


def _stream(normmap: NormMap, stream: StreamInfo) -> StreamDrawing:
    return StreamDrawing(
        name=stream.name,
        width=stream.width,
        embedding=_norms(normmap, stream.found.embedding, ""),
        layers=tuple(_layers(normmap, stream)),
        final=_norms(normmap, stream.found.final, ""),
    )


def _layers(normmap: NormMap, stream: StreamInfo) -> list[Layers]:
    """Layers in order, those that are alike as one."""
    layers: dict[object, list[Block]] = {}
    for number, block in enumerate(stream.blocks):
        layers.setdefault(block.layer if block.layer is not None else f"step {number}", []).append(block)
    named = {}
    for layer, blocks in layers.items():
        root = _root(stream.name, blocks[0])
        shown = f"layer {layer}" if isinstance(layer, int) else (root or str(layer))
        named[shown] = tuple(_step(normmap, block, root) for block in blocks)
    return [
        Layers(shown=shown, count=len(paths), steps=named[paths[0]])
        for shown, paths in folded([(name, blurred(repr(steps))) for name, steps in named.items()])
    ]


def _root(stream: str, block: Block) -> str:
    """The path of the layer that a block stands in: up to the first number below the stream's name."""
    start = len(stream.partition("#")[0].split("."))
    parts = block.module.split(".")
    number = next((i for i, part in enumerate(parts) if i >= start and part.isdigit()), None)
    return block.module if number is None else ".".join(parts[: number + 1])


def _step(normmap: NormMap, block: Block, root: str) -> Step:
    return Step(
        name=" + ".join(_branch_modules(normmap, block, root)) or "branch",
        placement=block.placement,
        n_in=_norms(normmap, block.n_in, root),
        n_branch=_norms(normmap, block.n_branch, root),
        n_out=_norms(normmap, block.n_out, root),
        inside=_norms(normmap, sorted(block.inside - {*block.n_in, *block.n_branch, *block.n_out}), root),
        skip=block.skip,
        branch=block.branch,
        scaled=bool(block.scales),
    )


def _named(path: str) -> str:
    """The first name of a path that is not of a list: `SelfAttention` in `layer.0.SelfAttention.o`."""
    parts = path.split(".")
    while len(parts) > 2 and parts[1].isdigit():
        parts = parts[2:]
    return parts[0]


def _norms(normmap: NormMap, paths: Sequence[str], root: str) -> tuple[SlotNorm, ...]:
    return tuple(
        SlotNorm(
            name=path.removeprefix(f"{root}.") if root else path,
            kind=normmap.sites[path].spec.kind,
            eps=normmap.sites[path].spec.eps,
            weightless=not (normmap.sites[path].spec.gain or normmap.sites[path].spec.bias),
        )
        for path in paths
        if path in normmap.sites
    )


def _branch_modules(normmap: NormMap, block: Block, root: str) -> list[str]:
    """Names below the layer of the modules whose output the branch is: `attn`, `mlp`."""
    trace = normmap.trace
    norms = {*block.n_in, *block.n_branch, *block.n_out}
    found: dict[str, None] = {}
    frontier = [block.operands[1]]
    for _ in range(_REACH):
        behind: list[int] = []
        for value in frontier:
            if value < 0 or (producer := trace.values[value].producer) is None:
                continue
            op = trace.operations[producer]
            below = op.module.removeprefix(f"{root}.") if op.module.startswith(f"{root}.") else ""
            if below and op.norm not in norms:
                found[_named(below)] = None
            else:
                behind += [v for v in op.inputs if trace.values[v].kind == "computed"]
        frontier = list(dict.fromkeys(behind))
        if found or not frontier:
            break
    return list(found)
