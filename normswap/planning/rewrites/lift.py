"""From a normalised stream to a raw one: post-norm to pre-norm.

A post-norm stream is `x' = N'(x + F(x))`, and the skip goes through every norm: with `x = g n(y) + b`,

    y' = x + F(x) = (g / s) y + b + F(x),        s = s(y), the scale of each token,

so that gains multiply along the skip. Carry `z = y / D` with `D' = D g / s`, per channel, and a constant for s:

    z' = z + (F(x) + b) / D',        x = g n(D z) + b,

an ordinary pre-norm block: an affine in front of each N_in multiplies by D; what F ends in takes b and is
divided by D'. For the first block y is what the embedding's norm gave without gain and bias, so that s is 1 and the
step exact. The last N_out stays as the final norm. For LayerNorm the skip also loses the mean of y at each norm, of
which no constant knows.

Exact is the form whose skip is normalised, `u' = N(u) + F(N(u))`, with u the sum before its norm: the norm that closed
a layer opens the next one.
"""

from __future__ import annotations

from normswap.norms.spec import NormSpec
from normswap.planning.edits import Copy, Fill, Gain, Running, Unscale
from normswap.planning.rewrites.places import NoPlace, Place, Places
from normswap.planning.rewrites.slots import Slots
from normswap.planning.rewrites.steps import Step
from normswap.understand.centring import Writer
from normswap.understand.normmap import NormMap, StreamInfo


def lift(
    normmap: NormMap, places: Places, slots: Slots, stream: StreamInfo, steps: list[Step], scales: dict[str, float]
) -> tuple[list[str], list[tuple[str, str]]]:
    """Plan a pre-norm form of a post-norm stream, all of it.

    Args:
        scales: s by step name, of what the norm before the step read; missing ones are 1.

    Returns:
        The norms concerned; and per step, what reads its sum in the moved model, and the name of D on the way there.

    Raises:
        NoPlace: a step that is not post-norm, a branch without linear writers, source that cannot change.
    """
    feeding = [*stream.found.embedding[-1:], *(step.n_out[0] for step in steps)]
    if len(stream.found.embedding) != 1 or any(step.source.n_in or len(step.n_out) != 1 for step in steps):
        raise NoPlace(f"{stream.name}: expected a norm on the embeddings and one after each block, and no other.")
    for path in feeding:
        spec = slots.spec(path)
        if spec.weight is None or spec.kind not in ("layernorm", "rmsnorm") or len(spec.axes) != 1:
            raise NoPlace(f"{path}: expected a LayerNorm or RMSNorm with a gain, found {spec.kind}.")
    gains: list[Gain] = []
    factor = 1.0
    read: list[tuple[str, str]] = []
    for index, step in enumerate(steps):
        before = slots.spec(feeding[index])
        source = feeding[index]
        reader = _put_in(places, slots, stream, step, source, before, gains, factor)
        read += [reader] if index else []
        gains = [*gains, Gain(weight=f"{source}.{before.weight}", form=before.gain)]
        factor /= scales.get(step.name, 1.0) if index else 1.0
        bias = f"{source}.{before.bias}" if before.bias else None
        _divide(normmap, slots, stream, step, tuple(gains), factor, bias)
        if index + 1 < len(steps):
            call = places.call(step.n_out[0])
            slots.change(call, "unwrap", step.n_out[0].rpartition(".")[2])
            slots.remove(step.n_out[0])
    _neutral(slots, feeding[0])
    # the last N_out stays, as the final norm
    last = _scale(slots, places.sum(steps[-1].blocks[-1]), slots.spec(feeding[-1]), "scale_out", gains, factor)
    return feeding, [*read, (feeding[-1], last)]


def normalise_skip(places: Places, slots: Slots, stream: StreamInfo, steps: list[Step]) -> list[str]:
    """Plan the form `u' = N(u) + F(N(u))`: what layers hand on is the sum, and each normalises what it is given.

    Returns the norms concerned. Raises NoPlace as `lift` does.
    """
    moved = []
    for step, after in zip(steps, steps[1:], strict=False):
        if step.layer == after.layer:
            continue  # inside a layer both forms are the same
        if len(step.n_out) != 1 or len(after.n_in):
            raise NoPlace(f"{step.name} is {step.blocks[-1].placement}: expected post-norm.")
        path, spec = step.n_out[0], slots.spec(step.n_out[0])
        slots.change(places.call(path), "unwrap", path.rpartition(".")[2])
        module, method, argument, _ = places.entry(stream.found, after.blocks[0])
        name = slots.new_name(module, "norm_first")
        slots.enter(module, method, argument, name)
        slots.add_norm(f"{module}.{name}", spec, spec.kind, spec.gain, spec.bias is not None)
        slots.edits += [
            Copy(tensor=f"{module}.{name}.{own}", source=f"{path}.{theirs}")
            for own, theirs in (("weight", spec.weight), ("bias", spec.bias))
            if theirs
        ]
        slots.remove(path)
        moved.append(path)
    if not moved:
        raise NoPlace(f"{stream.name}: expected layers that each close with a norm.")
    return moved


def _scale(slots: Slots, place: Place, spec: NormSpec, wanted: str, gains: list[Gain], factor: float) -> str:
    """The expression times D. Returns the name of D."""
    name = slots.new_name(place.module, wanted)
    path = f"{place.module}.{name}"
    slots.add_norm(path, spec, "affine", "w", False)
    slots.edits.append(Running(tensor=f"{path}.weight", gains=tuple(gains), factor=factor))
    slots.change(place, "wrap", name)
    return f"{path}.weight"


def _put_in(
    places: Places,
    slots: Slots,
    stream: StreamInfo,
    step: Step,
    source: str,
    spec: NormSpec,
    gains: list[Gain],
    factor: float,
) -> tuple[str, str]:
    """`F(x)` becomes `F(self.norm_in(z))`, with the gain and bias of the norm that gave x."""
    path = scale = ""
    for block in step.blocks:
        entries = places.branch_entries(stream.found, block)
        if len({place.module for place in entries}) != 1:
            raise NoPlace(f"{step.name}: its branch reads the stream in several modules.")
        module = entries[0].module
        name = slots.new_name(module, "norm_in")
        path = f"{module}.{name}"
        if gains and len(entries) > 1:
            raise NoPlace(f"{step.name}: its branch reads the stream in several places.")
        for place in entries:
            if gains:
                scale = _scale(slots, place, spec, "scale_in", gains, factor)
            slots.change(place, "wrap", name)
        slots.add_norm(path, spec, spec.kind, spec.gain, spec.bias is not None)
        slots.edits.append(Copy(tensor=f"{path}.weight", source=f"{source}.{spec.weight}"))
        if spec.bias is not None:
            slots.edits.append(Copy(tensor=f"{path}.bias", source=f"{source}.{spec.bias}"))
    return path, scale


def _divide(
    normmap: NormMap,
    slots: Slots,
    stream: StreamInfo,
    step: Step,
    gains: tuple[Gain, ...],
    factor: float,
    bias: str | None,
) -> None:
    """What writes the step's branches is divided by D; one of its biases takes the bias that the skip went through."""
    writers: list[Writer] = []
    centring = normmap.centrings[stream.width]
    for block in step.blocks:
        value = block.operands[1]
        dim = len(normmap.trace.values[value].shape) - 1
        found = centring.leaves(centring.terms.get((value, dim)))
        if not found or not all(isinstance(w, Writer) and w.kind == "parameter" and w.groups == 1 for w in found):
            raise NoPlace(f"{step.name}: its branch is not written by linear maps alone, so it cannot be rescaled.")
        writers += sorted((w for w in found if w not in writers), key=lambda w: (w.name, w.module))
    for writer in writers:
        if writer.scales or len(normmap.names(writer.name)) > 1 or normmap.users(writer.name) != {writer.module}:
            raise NoPlace(f"{writer.name}, which writes {step.name}, is used elsewhere or scaled.")
    takers = [w for w in writers if len(normmap.parameters[w.name]) == 1]
    if bias is not None and not takers:
        raise NoPlace(f"{step.name}: no bias of its branch can take the bias of {bias}.")
    for writer in writers:
        taken = bias if takers and writer == takers[0] else None
        slots.edits.append(Unscale(tensor=writer.name, axis=writer.axis, gains=gains, factor=factor, bias=taken))


def _neutral(slots: Slots, path: str) -> None:
    """The norm of the embeddings loses its gain and bias, which the first N_in has now."""
    spec = slots.spec(path)
    slots.edits.append(Fill(tensor=f"{path}.{spec.weight}", value=0.0 if spec.gain == "1 + w" else 1.0))
    if spec.bias is not None:
        slots.edits.append(Fill(tensor=f"{path}.{spec.bias}", value=0.0))
