"""DeepNorm to post-norm exactly: the scale of the skip goes into what writes the branches.

A norm does not see the scale of what it reads, but for its eps: with a > 0,

    N(a x + F(x); eps) = N(a (x + F(x) / a); eps) = N(x + F(x) / a; eps / a^2).

F / a is F with the linear maps that end it, or the gain and bias of a norm there, divided by a. The product `a x` goes
from the source. That nothing else reads what is divided is followed through all operations (`understand.rescaling`).
"""

from __future__ import annotations

import math

from normswap.planning.edits import Scale
from normswap.planning.rewrites.places import NoPlace, Places
from normswap.planning.rewrites.slots import Slots
from normswap.planning.rewrites.steps import Step
from normswap.understand.centring import Writer
from normswap.understand.normmap import NormMap, StreamInfo
from normswap.understand.placement import Block
from normswap.understand.rescaling import Noticed, rescaled


def unscale(normmap: NormMap, places: Places, slots: Slots, stream: StreamInfo, step: Step, axis: int) -> list[str]:
    """Plan a step without the scale of its skip. Returns the norms behind its sum.

    Args:
        axis: of the stream's channels, counted from the end.

    Raises:
        NoPlace: the scale is no positive number of the code, what the branches end in cannot take it, something else
            reads it, or source that cannot change.
    """
    first = step.blocks[0]
    if any(block.is_scaled for block in step.blocks[1:]):
        raise NoPlace(f"{step.name}: the skip is scaled between its branches; expected a scale in front of all.")
    a = _scale_of(step.name, first)
    runs = [run for block in step.blocks for run in places.each_run(block)]
    parameters, outputs = _ends(normmap, stream, step, runs, axis)
    removed = {factor.op: factor.number for run in places.each_run(first) for factor in run.scales}
    specs = {path: site.spec for path, site in normmap.sites.items()}
    ending = [
        path
        for path, spec in specs.items()
        if spec.kind in ("layernorm", "rmsnorm") and len(spec.axes) == 1 and spec.groups == 1 and spec.gate is None
    ]
    divided, norms = dict.fromkeys(parameters, 1 / a), dict.fromkeys(outputs, 1 / a)
    try:
        ended = rescaled(
            normmap.trace, specs, stream.found.analysis.prober, divided, norms, removed, set(ending) - {*outputs}
        )
    except Noticed as error:
        raise NoPlace(f"{step.name}: its sum cannot be divided by {a:g}, the scale of its skip: {error}.") from error
    if idle := slots.idle.refuse_centring([normmap.sites[path] for path in ended]):
        raise NoPlace(f"{step.name}: {next(iter(idle.values()))}.")
    for factor in first.scales:
        place, side = places.product(factor.op, places.runs(first))
        slots.change(place, side, None)
    slots.edits += [Scale(tensor=name, factor=1 / a) for name in parameters]
    for path in outputs:
        slots.rescale(path, 1 / a)
    for path, scale in ended.items():
        if normmap.sites[path].spec.eps:
            slots.swap(path, slots.kind(path), eps=normmap.sites[path].spec.eps * scale**2)
    return [*ended]


def _scale_of(name: str, block: Block) -> float:
    """a, as the code has it."""
    if unknown := [factor.by for factor in block.scales if factor.number is None]:
        raise NoPlace(
            f"{name}: its skip is scaled by {unknown[0]}; a norm's eps takes a number that the code has, not a tensor. "
            f"Put its value into the code as a number first."
        )
    a = math.prod(factor.number for factor in block.scales)
    if not math.isclose(abs(a), block.skip, rel_tol=1e-6):
        raise NoPlace(f"{name}: its skip has a factor ({block.skip:g}) that is no product `a * x` of the skip alone.")
    if a < 0:
        raise NoPlace(f"{name}: its skip is scaled by {a:g}, and a norm sees the sign; expected a positive number.")
    return a


def _ends(
    normmap: NormMap, stream: StreamInfo, step: Step, runs: list[Block], axis: int
) -> tuple[list[str], list[str]]:
    """What ends the branches: names of parameters and buffers, and paths of norms."""
    centring = normmap.centrings[stream.width]
    parameters, norms = set(), set()
    for block in runs:
        value = block.operands[1]
        terms = centring.leaves(centring.terms.get((value, axis % len(normmap.trace.values[value].shape))))
        if not terms:
            raise NoPlace(f"{step.name}: what ends its branch is not known; expected linear maps or a norm.")
        for term in terms:
            if isinstance(term, Writer) and term.kind in ("parameter", "buffer") and term.name in normmap.stored:
                parameters.add(term.name)
            elif isinstance(term, Writer) and term.kind == "output" and term.name in normmap.sites:
                norms.add(term.name)
            else:
                why = f"{term.kind} of {term.name}" if isinstance(term, Writer) else term.reason
                raise NoPlace(f"{step.name}: its branch does not end in linear maps or a norm alone: {why}.")
    return sorted(parameters), sorted(norms)
