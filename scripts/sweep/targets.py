"""What a moved model has to compute, from the placement table: placements for `slots.placed`.

A raw stream `x` becomes a normalised one, `u = n(x)`, with `n` the norm that reads the value, without gain and bias,
and `s` a constant in the place of each token's scale:

    u_0 = n(x_0)        u_{i+1} = n(s_i u_i + F(g_i u_i + b_i))        the final norm gives g u_N + b

What reads the stream without a norm gets `s_i u_i`. With `s` each token's own scale this is the model as it was. A
first step without a norm of its own needs none before it: `u_1 = n(x_0 + F(x_0))`.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from normswap.errors import VerificationError
from normswap.norms.spec import NormSpec
from normswap.understand.normmap import NormMap
from normswap.understand.placement import Block, Stream
from sweep.slots import Function, Placement, Slots, StreamReaders, placed, times

Scales = Mapping[int, "float | torch.Tensor"]


def standardise(x: torch.Tensor, spec: NormSpec) -> torch.Tensor:
    """`x` normalised as `spec` says, without gain and bias."""
    if spec.kind == "layernorm":
        x = x - x.mean(spec.axes, keepdim=True)
    return x / scale(x, spec)


def scale(x: torch.Tensor, spec: NormSpec) -> torch.Tensor:
    """What `standardise` divides `x` by, behind the centring."""
    if spec.kind == "layernorm":
        x = x - x.mean(spec.axes, keepdim=True)
    return (x.square().mean(spec.axes, keepdim=True) + spec.eps).sqrt()


def affine(x: torch.Tensor, spec: NormSpec, norm: nn.Module) -> torch.Tensor:
    """The norm's gain and bias, without normalising."""
    shape = [1] * x.ndim
    shape[spec.axes[0]] = -1
    if spec.weight is not None:
        weight = getattr(norm, spec.weight).reshape(shape)
        x = x * (1 + weight if spec.gain == "1 + w" else weight)
    return x if spec.bias is None else x + getattr(norm, spec.bias).reshape(shape)


def steps(normmap: NormMap, stream: Stream) -> list[list[Block]]:
    """The blocks of a stream, those together that read the same value (parallel branches, added one by one)."""
    readers = StreamReaders(normmap.trace, stream)
    found: list[list[Block]] = []
    for block in stream.blocks:
        read = {readers.source(v) for _, v in readers.of_branch(block)}
        before = found[-1][0] if found else None
        # nothing read what the sum before gave: both branches are of the same value
        if before and found[-1][-1].result not in read and readers.source(before.operands[0]) in read:
            found[-1].append(block)
        else:
            found.append([block])
    return found


def final_norms(normmap: NormMap, stream: Stream) -> list[str]:
    """The norms that read the stream's last value, and nothing else, and stand in no block."""
    readers = StreamReaders(normmap.trace, stream)
    reads: dict[str, set[int | None]] = {}
    size = math.prod(normmap.trace.values[stream.blocks[-1].result].shape)
    for op in normmap.trace.norm_operations():
        whole = math.prod(normmap.trace.values[op.inputs[0]].shape) == size  # not one row of it, or some pooled
        reads.setdefault(op.norm, set()).add(readers.source(op.inputs[0]) if whole else None)
    inside = {path for block in stream.blocks for path in (*block.n_in, *block.n_out)}
    inside |= {path for path in reads if normmap.sites[path].spec.channels != stream.width}  # of several tokens at once
    return [path for path, values in reads.items() if values == {stream.blocks[-1].result} and path not in inside]


class _Raw:
    """A raw stream: what norms read each of its values."""

    def __init__(self, model: nn.Module, normmap: NormMap, stream: Stream):
        self.modules, self.sites, self.stream = dict(model.named_modules()), normmap.sites, stream
        self.steps = steps(normmap, stream)
        self.final = final_norms(normmap, stream)

    def spec_before(self, i: int) -> NormSpec:
        """Of the norm that makes the value that step `i` reads; of the last value for `i = len(steps)`."""
        own = self.steps[min(i, len(self.steps) - 1)]
        paths = [path for block in own for path in block.n_in]
        if i == len(self.steps):
            paths = self.final + paths
        paths += [path for block in own for path in block.n_branch]
        paths += [path for step in self.steps for block in step for path in (*block.n_in, *block.n_branch)]
        if not paths:
            raise VerificationError(f"no block of the stream of {own[0].module} has a norm: there is none to move.")
        return self.sites[paths[0]].spec

    def affine(self, path: str) -> Function:
        return lambda x: affine(x, self.sites[path].spec, self.modules[path])


def value_scales(model: nn.Module, normmap: NormMap, streams: Iterable[Stream], inputs: Mapping[str, Any]) -> Scales:
    """Each token's own scale of each value, by the value that a step's first sum adds to (`Block.previous`)."""
    found: dict[int, torch.Tensor] = {}

    def noting(value: int, spec: NormSpec) -> Function:
        def note(x):
            found[value] = scale(x, spec)
            return x

        return note

    placement = Placement()
    for stream in streams:
        raw = _Raw(model, normmap, stream)
        for i, step in enumerate(raw.steps):
            note = noting(step[-1].result, raw.spec_before(i + 1))
            placement.blocks[step[-1].add] = Slots(n_out=note)
        first = raw.steps[0][0].add
        slots = placement.blocks.get(first, Slots())
        placement.blocks[first] = replace(slots, n_skip=noting(stream.start, raw.spec_before(0)))
    with placed(model, normmap, placement), torch.no_grad():
        model(**inputs)
    return found


def normalised(
    model: nn.Module,
    normmap: NormMap,
    streams: Iterable[Stream],
    scales: Scales | None = None,
    keep_n_in: bool = False,
    only: Container[int] | None = None,
) -> Placement:
    """Raw streams as post-norm streams (with scales that are not 1: deepnorm), see above.

    Args:
        scales: by `Stream.start` or `Block.result`, that value's `s`; 1 where there is none.
        keep_n_in: blocks keep their first norm (keel).
        only: the sums that move (`Block.add`), None: all. Others stay pre-norm; before one of these the stream is
            `s u` again.
    """
    scales = scales or {}
    placement = Placement()
    for stream in streams:
        raw = _Raw(model, normmap, stream)
        before, is_normal = stream.start, False
        for i, step in enumerate(raw.steps):
            s, plain = scales.get(before, 1.0), _weightless(raw.spec_before(i))
            moves = only is None or step[-1].add in only
            raw_in = not is_normal and not any(block.n_in for block in step)  # nothing there asks for a norm
            into = [_identity if is_normal else plain] if moves and not raw_in else []
            into += [_times(s)] if (moves and not raw_in) or is_normal else []
            given = _chain(*into) if into else None
            for block in step:
                closes = moves and block is step[-1] and not block.n_out  # one that closes with a norm keeps it
                out = _weightless(raw.spec_before(i + 1)) if closes else None
                placement.blocks[block.add] = Slots(given, n_out=out, n_skip=given if block is step[0] else None)
                for path in block.n_in:
                    placement.norms |= _first_norm(raw, path, plain, s, moves, is_normal, keep_n_in)
            before, is_normal = step[-1].result, moves and not step[-1].n_out
        placement.norms.update({path: raw.affine(path) for path in raw.final if is_normal})
    return placement


def _first_norm(
    raw: _Raw, path: str, plain: Function, s, moves: bool, is_normal: bool, keep: bool
) -> dict[str, Function]:
    """What the norm at the beginning of a block does; nothing where it stays as it is."""
    norm = raw.modules[path]
    if not moves:
        return {path: _chain(_times(s), norm)} if is_normal else {}
    if keep:
        return {} if is_normal else {path: _chain(plain, norm)}
    return {path: raw.affine(path)} if is_normal else {}


def unmoved(
    model: nn.Module, normmap: NormMap, streams: Iterable[Stream], only: Container[int] | None = None
) -> Placement:
    """The model as it is: what an exact move must compute."""
    return Placement()


def sandwiched(normmap: NormMap, streams: Iterable[Stream], norm: Function) -> Placement:
    """Every branch goes through `norm` before it is added."""
    return Placement({block.add: Slots(n_branch=norm) for stream in streams for block in stream.blocks})


def reordered(
    model: nn.Module, normmap: NormMap, streams: Iterable[Stream], norm: Function, scales: Scales | None = None
) -> Placement:
    """`x + norm(F(g x / s + b))`: the first norm of each block goes behind its branch, gain and bias stay before it."""
    placement = sandwiched(normmap, streams := list(streams), norm)
    for stream in streams:
        raw, before = _Raw(model, normmap, stream), stream.start
        for step in raw.steps:
            for path in (path for block in step for path in block.n_in):
                placement.norms[path] = _scaled_affine(raw, path, (scales or {}).get(before, 1.0))
            before = step[-1].result
    return placement


def raw(model: nn.Module, normmap: NormMap, streams: Iterable[Stream], scales: Mapping[str, Any]) -> Placement:
    """Post-norm streams as pre-norm ones: `z` carries what each norm reads, over `D`.

    With `D = 1` before the first norm, and `D' = g D / s` behind each:

        x = g n(D z) + b        z' = z + (F(x) + b) / D'        the last norm gives g n(D z) + b

    Args:
        scales: by path of the norm, the `s` of what it reads.
    """
    placement = Placement()
    modules = dict(model.named_modules())
    for stream in streams:
        norms = [*stream.embedding[-1:], *(block.n_out[0] for block in stream.blocks)]
        if len(norms) == len(stream.blocks):
            norms.insert(0, None)  # nothing stands before the first block
        d: float | torch.Tensor = 1.0
        for path, block in zip(norms, stream.blocks, strict=False):
            shift: float | torch.Tensor = 0.0
            n_in = None
            if path is not None:
                spec, module = normmap.sites[path].spec, modules[path]
                placement.norms[path] = _identity
                n_in = _read(module, d)
                shift = affine(torch.zeros(spec.width, dtype=torch.float64), spec, module)
                gain = affine(torch.ones(spec.width, dtype=torch.float64), spec, module) - shift
                d = gain * d / scales[path]
            placement.blocks[block.add] = Slots(n_in=n_in, n_branch=_over(shift, d))
        placement.norms[norms[-1]] = _read(modules[norms[-1]], d)
    return placement


def normalised_skip(model: nn.Module, normmap: NormMap, streams: Iterable[Stream]) -> Placement:
    """Post-norm streams as pre-norm ones whose skip is normalised too: `x' = N(x) + F(N(x))`; the same function."""
    placement = Placement()
    modules = dict(model.named_modules())
    for stream in streams:
        norms = [*stream.embedding[-1:], *(block.n_out[0] for block in stream.blocks)]
        if len(norms) == len(stream.blocks):
            norms.insert(0, None)
        for path, block in zip(norms, stream.blocks, strict=False):
            if path is not None:
                placement.norms[path] = _identity
                placement.blocks[block.add] = Slots(n_in=modules[path], n_skip=modules[path])
    return placement


def raw_streams(normmap: NormMap) -> Iterator[Stream]:
    """The streams without norms behind their sums, or with some only here and there (the layers of conformers).

    Another axis of a multiple of the width makes no other stream.
    """
    for info in normmap.streams:
        norms = [path for block in info.blocks for path in (*block.n_in, *block.n_branch)]
        fits = not norms or any(normmap.sites[path].spec.channels == info.width for path in norms)
        closed = any(block.n_out for block in info.blocks)
        if fits and (not closed or any(block.n_in for block in info.blocks)):
            yield info.found


def _weightless(spec: NormSpec) -> Function:
    return lambda x: standardise(x, spec)


def _chain(*functions: Function) -> Function:
    def run(x):
        for function in functions:
            x = function(x)
        return x

    return run


def _identity(x: torch.Tensor) -> torch.Tensor:
    return x


def _read(norm: nn.Module, d: float | torch.Tensor) -> Function:
    return lambda z: norm(d * z)


def _over(shift: float | torch.Tensor, d: float | torch.Tensor) -> Function:
    return lambda y: (y + shift) / d


def _scaled_affine(stream: _Raw, path: str, scale: float | torch.Tensor) -> Function:
    give = stream.affine(path)
    return lambda x: give(x / scale)


def _times(factor: float | torch.Tensor) -> Function:
    return lambda x: times(factor, x)
