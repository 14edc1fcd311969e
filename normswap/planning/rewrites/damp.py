"""LayerNorm Scaling (Sun et al., 2025): what the norm in front of a branch gives is divided by the root of its layer l.

    x' = x + F(N(x) / sqrt(l)),        l = 1, 2, ...

A pre-norm model is one exactly, with sqrt(l) times the gain and bias of its norms, `N(x) = (sqrt(l) N(x)) / sqrt(l)`,
and in training behaves as one. The other way the division goes from the source, and the gain and bias are divided.
"""

from __future__ import annotations

import math

from normswap.planning.edits import SetScale
from normswap.planning.rewrites.places import NoPlace, Places
from normswap.planning.rewrites.slots import Slots
from normswap.planning.rewrites.steps import Step
from normswap.understand.normmap import NormMap, StreamInfo
from normswap.understand.rescaling import Noticed, rescaled


def damp(places: Places, slots: Slots, step: Step) -> list[str]:
    """Plan a step with damped norms. Returns them. Raises NoPlace where their source cannot change."""
    if step.layer is None:
        raise NoPlace(f"{step.name} stands in no numbered layer; what its norm gives is divided by the layer's number.")
    depth = step.layer + 1
    for path in step.n_in:
        call = places.call(path, places.runs(step.blocks[0]))
        name = slots.new_name(call.module, f"{path.rpartition('.')[2]}_scale")
        slots.change(call, "scale", name)
        slots.edits.append(SetScale(module=call.module, name=name, value=depth**-0.5))
        slots.rescale(path, depth**0.5)
    return step.n_in


def undamp(normmap: NormMap, places: Places, slots: Slots, stream: StreamInfo, step: Step) -> list[str]:
    """Plan a step whose norms are not damped any more. Returns them.

    Raises:
        NoPlace: something else reads what a norm gives before it is divided, or source that cannot change.
    """
    specs = {path: site.spec for path, site in normmap.sites.items()}
    runs = [run for block in step.blocks for run in places.each_run(block)]
    for path in step.n_in:
        damping = {f.op: f.number for run in runs for f in run.damping.get(path, ())}
        first = [f for block in step.blocks for f in block.damping.get(path, ())]
        factor = math.prod({f.op: f.number for f in first}.values())
        try:
            rescaled(normmap.trace, specs, stream.found.analysis.prober, {}, {path: factor}, damping, ())
        except Noticed as error:
            raise NoPlace(f"{path} cannot be scaled by {factor:g}: {error}.") from error
        for index in dict.fromkeys(f.op for f in first):
            place, side = places.product(index, places.runs(step.blocks[0]))
            slots.change(place, side, None)
        slots.rescale(path, factor)
    return step.n_in
