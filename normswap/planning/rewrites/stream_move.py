"""The steps of one stream moved: each slot of each block, with the source around it. The mathematics is in `move`."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

from normswap.norms.spec import NormSpec
from normswap.planning.edits import SetScale
from normswap.planning.rewrites.carry import carry, gate
from normswap.planning.rewrites.damp import damp, undamp
from normswap.planning.rewrites.lift import lift, normalise_skip
from normswap.planning.rewrites.moved import Moved, MovedStep, Scales
from normswap.planning.rewrites.places import NoPlace, Place, Places
from normswap.planning.rewrites.slots import Slots
from normswap.planning.rewrites.steps import ROWS, SKIP, Step
from normswap.planning.rewrites.unscale import unscale
from normswap.understand.normmap import NormMap, StreamInfo
from normswap.understand.placement import Block


class StreamMove:
    """Moves the steps of one stream, or raises NoPlace."""

    def __init__(
        self,
        normmap: NormMap,
        places: Places,
        stream: StreamInfo,
        steps: list[Step],
        scales: Scales,
        swapped: set[str],
        named: set[str],
        exact: bool,
    ):
        self.exact = exact
        self.normmap, self.places, self.slots = normmap, places, Slots(normmap, swapped, named)
        self.stream, self.steps, self.scales = stream, steps, scales
        self.result = Moved()

    def run(self) -> Moved:
        chosen = [step for step in self.steps if not step.stays]
        if chosen and all(self._keeps(step) is not None for step in chosen):
            for step in chosen:
                self._keep(step)
            self.result.exact = True
            return self._done()
        if any(step.source.n_out and not step.target.n_out for step in chosen) and not self._gated(chosen):
            self._leave(chosen)
            return self._done()
        if self.exact and chosen and self._exactly(chosen):
            return self._done()
        for before, step in zip(self.steps, self.steps[1:], strict=False):
            if chosen and step.blocks[0].previous != before.blocks[-1].result:
                raise NoPlace(f"{step.name} reads {before.name} and adds to what was before it: no chain of blocks.")
        post = [step for step in self.steps if step.source.n_out and not step.n_in]
        if all(step.source.n_out for step in self.steps) and not any(
            s.target.scaled or s.source.scaled for s in chosen
        ):
            return self.result  # every block closes with a norm already
        if chosen and post and len(post) < len(self.steps):
            odd = next(step for step in self.steps if step not in post)
            raise NoPlace(f"{odd.name} is {_name(odd)} on a stream of post-norm blocks; expected one or the other.")
        for step, after in zip(self.steps, [*self.steps[1:], None], strict=True):
            if step.stays:
                continue
            if self._keeps(step) is not None:
                self._keep(step)
            else:
                self._check(step)
                self._move(step, after)
        self._end()
        return self._done()

    def _done(self) -> Moved:
        self.result.edits += [*self.slots.edits, *self.slots.rewrites()]
        return self.result

    def _gated(self, chosen: list[Step]) -> bool:
        return self.exact and all(step.placement == "sandwich" for step in chosen)

    def _exactly(self, chosen: list[Step]) -> bool:
        """The exact form where there is one: a carried scale for all of a stream, gated norms on branches."""
        if self._gated(chosen):
            self.result.sites = gate(self.places, self.slots, self.stream, chosen)
        elif {step.placement for step in self.steps} == {"post"}:
            self.result.sites = carry(self.normmap, self.places, self.slots, self.stream, self.steps)
        else:
            return False
        self.result.exact = True
        for step in chosen:
            self._tell(step, None, None, None, self._norm_for(step))
        return True

    def _leave(self, chosen: list[Step]) -> None:
        """The whole stream becomes raw."""
        placements = {step.placement for step in self.steps}
        if placements == {SKIP}:
            self.result.sites = normalise_skip(self.places, self.slots, self.stream, self.steps)
            self.result.exact = True
            for step in self.steps:
                self._tell(step, None, None, None, self.slots.spec(step.n_out[0]))
        elif placements == {"pre"}:
            scales = dict(self.scales.stream)
            self.result.sites, read = lift(self.normmap, self.places, self.slots, self.stream, self.steps, scales)
            before = None
            for step, (out, frame) in zip(self.steps, read, strict=True):
                norm = self.slots.spec(step.n_out[0])
                self._tell(step, before, out, frame, norm)
                before = step.blocks[-1].result, norm
        else:
            raise NoPlace(
                f"{self.stream.name} is {_name(chosen[0])}: from there all its layers go to pre or {SKIP}, or none."
            )

    # -- one step, exactly ------------------------------------------------------------------------------------------

    def _keeps(self, step: Step) -> Callable[[], list[str]] | None:
        """What changes one step alone and keeps its function: the rewrite, None where there is none."""
        source, target = step.source, step.target
        if source.scaled and not source.n_in and target == ROWS["post"]:
            axis = self._norm_for(step).axes[0]
            return lambda: unscale(self.normmap, self.places, self.slots, self.stream, step, axis)
        if target.damped and source.n_in and not source.n_out and not source.scaled:
            return lambda: damp(self.places, self.slots, step)
        if source.damped and replace(source, damped=False) == target:
            return lambda: undamp(self.normmap, self.places, self.slots, self.stream, step)
        return None

    def _keep(self, step: Step) -> None:
        self.result.sites += self._keeps(step)()
        if step.source.n_branch and not step.target.n_branch:
            self._leaves_branches()
        self._tell(step, None, None, None, self._norm_for(step))

    # -- one step --------------------------------------------------------------------------------------------------

    def _check(self, step: Step) -> None:
        if step.target.damped:
            raise NoPlace(f"{step.name} is {_name(step)}: expected a pre-norm block, whose norm can be damped.")
        if step.target.scaled and not step.n_in and not step.source.n_out:
            raise NoPlace(f"{step.name}: its branch reads the stream without a norm, and would miss its scale.")
        if step.blocks[0].skip != 1:
            raise NoPlace(f"{step.name}: its skip has a factor of its own ({step.blocks[0].skip:g}); expected none.")
        for block in step.blocks:
            if not self._whole(block.operands[0]):
                raise NoPlace(
                    f"{step.name}: its skip pools or scales the stream, which does not go with a norm before."
                )
        kinds = {self.slots.kind(path) for other in self.steps for path in other.n_in}
        if len(kinds) > 1 or kinds - {"layernorm", "rmsnorm"}:
            raise NoPlace(f"{self.stream.name}: expected one kind of norm on it, found {', '.join(sorted(kinds))}.")
        trace = self.normmap.trace
        axis = self._norm_for(step).axes[0]
        for v in (step.blocks[0].operands[0], step.blocks[-1].result):
            shape = trace.values[v].shape
            if len(shape) < -axis or shape[axis] != self.stream.width:
                raise NoPlace(f"{step.name}: its sum has its channels in another axis than its norms ({tuple(shape)}).")
        for op in trace.norm_operations():
            if op.norm in step.n_in and not self._whole(op.inputs[0]):
                raise NoPlace(f"{op.norm} reads the stream scaled or pooled; expected it as it is.")
        for path in step.n_in:
            if len(self.slots.spec(path).axes) != 1 or self.slots.spec(path).gate or self.slots.spec(path).groups != 1:
                raise NoPlace(f"{path} normalises axes {self.slots.spec(path).axes} in groups or with a gate.")

    def _move(self, step: Step, after: Step | None) -> None:
        source, target = step.source, step.target
        sums = {id(block): self.places.sum(block) for block in self._changed_sums(step)}
        places = [sums.get(id(block)) for block in step.blocks]
        out = None
        if target.n_out and source.n_in and not self._before(step):
            self._enter(step)
        spare = None
        if source.n_in and not target.n_in:
            spare = self._take_in(step, places[-1] if target.n_out and not source.n_out else None)
        elif target.n_in and not source.n_in:
            self._put_in(step)
        for index, (block, place) in enumerate(zip(step.blocks, places, strict=True)):
            t = self.scales.branch.get((step.name, index), 1.0)
            if target.n_branch and not block.n_branch:
                self._put_branch(step, place, t)
            elif block.n_branch and not target.n_branch and not target.n_out:
                for path in block.n_branch:
                    self.slots.affine(path, t)
        if target.n_out:
            if target.scaled:
                self._scale(step, places[0])
            out = step.n_out[0] if source.n_out else self._put_out(step, after, places[-1], spare)
        if target.n_out and source.n_branch and not target.n_branch:
            self._leaves_branches()
        self.result.sites += [path for path in (*step.n_in, *step.n_branch) if path not in self.result.sites]
        reads = step.blocks[0].operands[0]
        self._tell(step, (reads, self._norm_for(step)), out, None, self._norm_for(after))

    def _leaves_branches(self) -> None:
        self.result.notes.append(f"The norms on the branches of {self.stream.name} stay where they are.")

    def _tell(self, step: Step, scaled, out: str | None, frame: str | None, norm: NormSpec) -> None:
        names = [*(other.name for other in self.steps), f"{self.stream.name}[end]"]
        self.result.steps.append(
            MovedStep(
                step.name,
                self.stream.name,
                step.layer,
                _name(step),
                step.placement,
                step.blocks[-1].result,
                tuple(block.operands[1] for block in step.blocks),
                scaled,
                out,
                frame,
                norm,
                names[self.steps.index(step) + 1],
                step.target.n_in and not step.n_in,
            )
        )

    def _changed_sums(self, step: Step) -> list[Block]:
        """The blocks whose sum's source changes."""
        if step.target.n_branch and not step.source.n_branch:
            return step.blocks
        if not step.target.n_out or (step.source.n_out and not step.target.scaled):
            return []
        return [step.blocks[0], step.blocks[-1]] if step.target.scaled else step.blocks[-1:]

    def _before(self, step: Step) -> bool:
        """Whether the step reads what a norm without gain and bias gives, by the move of the step before."""
        index = self.steps.index(step)
        return index > 0 and self._gives_norm(self.steps[index - 1])

    def _gain(self, step: Step | None) -> float:
        """c: the gain of the norm whose result the step reads (None: the end of the stream)."""
        if step is None:
            return 1.0 if self._ends_in_norms() else self.scales.stream.get(f"{self.stream.name}[end]", 1.0)
        if step.target is not None and step.target.scaled:
            return 1.0
        return self.scales.stream.get(step.name, 1.0)

    def _enter(self, step: Step) -> None:
        """The norm in front of the first moved step: `argument = self.norm_first(argument)` where its layer begins."""
        try:
            module, method, argument, value = self.places.entry(self.stream.found, step.blocks[0])
            norm, shape = self._norm_for(step), self.normmap.trace.values[value].shape
            if shape[norm.axes[0]] != self.stream.width:
                raise NoPlace(f"{module} takes the stream with its channels in another axis ({tuple(shape)}).")
            name = self.slots.new_name(module, "norm_first")
            self.slots.enter(module, method, argument, name)
        except NoPlace:
            place = self.places.start(self.stream.found, step.blocks[0])
            module, name = place.module, self.slots.new_name(place.module, "norm_first")
            self.slots.change(place, "wrap", name)
        self.slots.add(f"{module}.{name}", self._norm_for(step), self._gain(step))

    def _put_out(self, step: Step, after: Step | None, place: Place, spare: str | None) -> str:
        """`sum` becomes `self.norm(sum)`; the norm that stood before the branch serves where it can."""
        norm = self._norm_for(after)
        gain = self._gain(after)
        path = spare
        if spare is None or not self.slots.serves(spare, norm, gain):
            if spare is not None:
                self.slots.remove(spare)
            path = f"{place.module}.{self.slots.new_name(place.module, 'norm_out')}"
            self.slots.add(path, norm, gain)
        else:
            self.slots.refill(spare, gain)
        self.slots.change(place, "wrap", path.rpartition(".")[2])
        return path

    def _take_in(self, step: Step, place: Place | None) -> str | None:
        """N_in leaves: its gain and bias go to its readers, or it stays as an affine.

        Returns a norm that is free to serve in the module of `place`.
        """
        spare = None
        for path in step.n_in:
            if self._stays_called(path, step):
                raise NoPlace(f"{path} reads the stream in several blocks; expected one.")
            c = self._gain(step) if step.target.n_out else self.scales.stream.get(step.name, 1.0)
            if self.slots.fold(path, c):
                if spare is None and place is not None and path.rpartition(".")[0] == place.module:
                    try:
                        call = self.places.call(path, self.places.runs(step.blocks[0]))
                    except NoPlace:
                        call = None
                    if call is not None and call.module == place.module:
                        self.slots.change(call, "unwrap", path.rpartition(".")[2])
                        spare = path
                        continue
                self.slots.remove(path)
            else:
                self.slots.affine(path, c)
        return spare

    def _put_in(self, step: Step) -> None:
        for block in step.blocks:
            entries = self.places.branch_entries(self.stream.found, block)
            if len({place.module for place in entries}) != 1:
                raise NoPlace(f"{step.name}: its branch reads the stream in several modules.")
            module = entries[0].module
            name = self.slots.new_name(module, "norm_in")
            self.slots.add(f"{module}.{name}", self._norm_for(step), self.scales.stream.get(step.name, 1.0))
            for place in entries:
                self.slots.change(place, "wrap", name)

    def _put_branch(self, step: Step, place: Place, t: float) -> None:
        if place.branch is None:
            raise NoPlace(self.places.shown(place, "the branch is no expression of its own in this sum"))
        name = self.slots.new_name(place.module, "norm_branch")
        self.slots.add(f"{place.module}.{name}", self._norm_for(step), t)
        self.slots.change(place, "wrap", name, place.branch)

    def _scale(self, step: Step, place: Place) -> None:
        if place.skip is None:
            raise NoPlace(self.places.shown(place, "the skip is no expression of its own in this sum"))
        name = self.slots.new_name(place.module, "skip_scale")
        self.slots.change(place, "scale", name, place.skip)
        value = 1.0 if step.source.n_out and not step.n_in else self.scales.stream.get(step.name, 1.0)
        self.slots.edits.append(SetScale(module=place.module, name=name, value=value))

    def _end(self) -> None:
        """Norms that read the end of a moved stream, or a moved value on the way, become affines."""
        for path, index in self._affines().items():
            after = self.steps[index + 1] if index + 1 < len(self.steps) else None
            self.slots.affine(path, self._gain(after))
            self.result.sites.append(path)

    def _affines(self) -> dict[str, int]:
        """Norms behind the stream that read nothing but the result of one moved step, whole: the step by norm.

        A norm of what is pooled, or of other values too, stays one: it does not see c.
        """
        base = self.stream.found.analysis.base
        moved = {base(step.blocks[-1].result): i for i, step in enumerate(self.steps) if self._gives_norm(step)}
        reads: dict[str, list[int]] = defaultdict(list)
        for op in self.normmap.trace.norm_operations():
            reads[op.norm].append(op.inputs[0])
        found = {}
        for path in self.stream.found.final:
            read = {moved.get(base(v)) for v in reads[path]}
            if len(read) == 1 and None not in read and self._own(path) and all(self._whole(v) for v in reads[path]):
                found[path] = read.pop()
        return found

    def _own(self, path: str) -> bool:
        """Whether a norm is over the stream's channels, and not over those of several tokens side by side."""
        return self.slots.spec(path).channels == self.stream.width

    def _whole(self, v: int) -> bool:
        """Whether a value is the stream rearranged, and not scaled, pooled or a part of it."""
        values = self.normmap.trace.values
        whole = self.stream.found.analysis.rearranged(v, self._floor)
        return whole is not None and math.prod(values[v].shape) == math.prod(values[whole].shape)

    @cached_property
    def _floor(self) -> int:
        """The operation at which the module of the first step begins: what came before it is no matter."""
        try:
            path, _, _, _ = self.places.entry(self.stream.found, self.steps[0].blocks[0])
        except NoPlace:
            return 0
        return next(call.start for call in self.normmap.trace.calls if call.path == path)

    def _gives_norm(self, step: Step) -> bool:
        """Whether a norm is added after the step."""
        return step.target is not None and step.target != step.source and step.target.n_out and not step.source.n_out

    def _ends_in_norms(self) -> bool:
        """Whether norms alone read what the last step gives."""
        found = self.stream.found
        result = self.steps[-1].blocks[-1].result
        consumers = [
            op for op in self.normmap.trace.operations if any(found.analysis.base(v) == result for v in op.inputs)
        ]
        live = self.normmap.trace.live()
        carried = [op for op in consumers if all(found.analysis.base(v) == result for v in op.outputs)]
        rest = [op for op in consumers if op not in carried and any(v in live for v in op.outputs)]
        given = any(found.analysis.base(v) == result for v in self.normmap.trace.outputs)
        return bool(rest) and not given and all(op.norm in self._affines() for op in rest)

    def _norm_for(self, step: Step | None) -> NormSpec:
        """The norm n of what a step reads: as its own N_in is, or as another norm of the stream."""
        index = len(self.steps) if step is None else self.steps.index(step)
        near = [*self._affines()] if step is None else step.n_in
        others = sorted(range(len(self.steps)), key=lambda i: abs(i - index))
        near += [path for i in others for path in (*self.steps[i].n_in, *self.steps[i].n_out, *self.steps[i].n_branch)]
        near = [path for path in near if self._own(path)]
        path = next((p for p in near if self.slots.spec(p).kind in ("layernorm", "rmsnorm")), None)
        if path is None:
            raise NoPlace(f"{self.stream.name}: no norm on it says what kind of norm a new one is to be.")
        return self.slots.spec(path).model_copy(update={"kind": self.slots.kind(path)})

    def _stays_called(self, path: str, step: Step) -> bool:
        """Whether a norm before this step's branch serves another step as well."""
        runs = sum(op.norm == path for op in self.normmap.trace.norm_operations())
        return runs > self.places.runs(step.blocks[0]) or any(path in s.n_in for s in self.steps if s is not step)


def _name(step: Step) -> str:
    first = step.blocks[0]
    return replace(step.blocks[-1], skip=first.skip, scales=first.scales).placement
