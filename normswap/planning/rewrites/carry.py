"""Pre-norm to post-norm exactly: the stream carries the scale of every token in one more lane.

With `x = s n(x)` the block `x' = x + F(g n(x) + b)` is, of `u = [n(x), s]`,

    u' = [n(y), s(y)],        y = s n + F(g n + b),

a post-norm block whose skip is scaled by the lane, and the lane is made anew by each norm. A constant in the place of
the lane is the post-norm model that calibration finds; from one to the other a lane can be tapered in training.

Exact too is a norm on a branch behind a gate that starts as the identity, `x + (1 - t) F + t N(F)` with t = 0.
"""

from __future__ import annotations

from normswap.planning.rewrites.places import NoPlace, Places
from normswap.planning.rewrites.slots import Slots
from normswap.planning.rewrites.steps import Step
from normswap.understand.normmap import NormMap, StreamInfo


def carry(normmap: NormMap, places: Places, slots: Slots, stream: StreamInfo, steps: list[Step]) -> list[str]:
    """Plan the carried form of a raw stream, all of it. Returns the norms concerned.

    Raises:
        NoPlace: something else than the blocks' own norms and sums and the final norms reads the stream.
    """
    norms = [path for step in steps for path in step.n_in] + list(stream.found.final)
    if any(step.source.n_out or not step.n_in for step in steps) or not stream.found.final:
        raise NoPlace(f"{stream.name}: expected pre-norm blocks and a final norm; the lane has to end in one.")
    if odd := [step for step in steps for block in step.blocks if block.is_scaled]:
        raise NoPlace(f"{odd[0].name}: its skip has a factor of its own, which the lane would have too; expected none.")
    _check_readers(normmap, stream, steps, set(norms))
    spec = slots.spec(norms[0]).model_copy(update={"kind": slots.kind(norms[0])})
    if any(_unlike(slots, path, norms[0]) for path in norms) or spec.axes != (-1,):
        raise NoPlace(f"{stream.name}: expected norms of one kind and eps over the last axis.")
    kind = f"carried-{spec.kind}"
    module, method, argument, _ = places.entry(stream.found, steps[0].blocks[0])
    name = slots.new_name(module, "norm_first")
    slots.enter(module, method, argument, name)
    slots.add_norm(f"{module}.{name}", spec, kind, None, False)
    for step in steps:
        first, last = places.sum(step.blocks[0]), places.sum(step.blocks[-1])
        if first.skip is None:
            raise NoPlace(places.shown(first, "the skip is no expression of its own in this sum"))
        skip, out = slots.new_name(first.module, "recovered"), slots.new_name(last.module, "norm_out")
        slots.change(first, "wrap", skip, first.skip)
        slots.add_norm(f"{first.module}.{skip}", spec, "recovered", None, False)
        slots.change(last, "wrap", out)
        slots.add_norm(f"{last.module}.{out}", spec, kind, None, False)
    for path in norms:
        slots.swap(path, "carried-affine")
    return norms


def gate(places: Places, slots: Slots, stream: StreamInfo, steps: list[Step]) -> list[str]:
    """Plan a gated norm on every branch. Returns the norms beside them. Raises NoPlace where a sum cannot change."""
    beside = []
    for step in steps:
        near = next((p for p in (*step.n_in, *step.n_out) if slots.spec(p).kind in ("layernorm", "rmsnorm")), None)
        if near is None:
            raise NoPlace(f"{step.name}: no norm of its own says what kind of norm a new one is to be.")
        spec = slots.spec(near).model_copy(update={"kind": f"gated-{slots.kind(near)}"})
        for block in step.blocks:
            if block.n_branch:
                continue
            place = places.sum(block)
            if place.branch is None:
                raise NoPlace(places.shown(place, "the branch is no expression of its own in this sum"))
            name = slots.new_name(place.module, "norm_branch")
            slots.change(place, "wrap", name, place.branch)
            slots.add(f"{place.module}.{name}", spec, 1.0)
        beside.append(near)
    return beside


def _unlike(slots: Slots, path: str, other: str) -> bool:
    a, b = slots.spec(path), slots.spec(other)
    return (slots.kind(path), a.eps, a.axes, a.width) != (slots.kind(other), b.eps, b.axes, b.width)


def _check_readers(normmap: NormMap, stream: StreamInfo, steps: list[Step], norms: set[str]) -> None:
    """Nothing but these norms and the sums may meet the stream: it has one channel more."""
    base, trace = stream.found.analysis.base, normmap.trace
    values = {base(step.blocks[0].operands[0]) for step in steps} | {base(steps[-1].blocks[-1].result)}
    sums = {block.add for step in steps for block in step.blocks}
    live = trace.live()
    first = min(op.index for op in trace.norm_operations() if op.norm in steps[0].n_in)
    for op in trace.operations[first:]:
        if not any(base(v) in values for v in op.inputs) or op.index in sums or op.norm in norms:
            continue
        handed_on = all(base(v) in values and stream.found.analysis.rearranged(v) is not None for v in op.outputs)
        if not handed_on and any(v in live for v in op.outputs):
            raise NoPlace(f"{op.name} in {op.module or 'the model'} reads the stream, which gets one channel more.")
    if any(base(v) in values for v in trace.outputs):
        raise NoPlace(f"{stream.name}: the stream itself is an output of the model, and would get one channel more.")
