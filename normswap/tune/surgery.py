"""The model that a recipe trains: converted as `convert` would, or with scaffolding that tapers from the exact form.

A taper is two plans for one source. The one that computes the same function is where training starts; the other says
what is left in the end. What lies between them is

- `tapers.Tapered`, where a norm becomes one of another kind, or stands behind a gate that opens;
- the ramp of RepBN;
- `tapers.TaperedLane`, where norms move: the exact form carries each token's scale in one more lane.

`finish` takes the scaffolding away.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from normswap.apply.live import apply_plan
from normswap.calibration.data import Data
from normswap.drafting import draft, with_scales
from normswap.errors import RefusedError, VerificationError
from normswap.norms.kinds import KINDS
from normswap.planning.edits import AddNorm, GrowBias, Initialise, SwapNorm, TensorEdit, Untie
from normswap.planning.plans import Plan
from normswap.planning.request import Request
from normswap.planning.rewrites.moved import Scales
from normswap.planning.rewrites.steps import ROWS
from normswap.tune.tapers import Tapered, TaperedLane, ramped, set_ramps
from normswap.verification.outputs import main_output, outputs_of

# of the output, relative, what the start of a taper may be off, by the precision that it runs in
_SAME = {torch.float64: 1e-9, torch.float32: 1e-3}


@dataclass(frozen=True)
class Surgery:
    """What is to be made of the source.

    Attributes:
        target: the plan of what is left in the end.
        exact: the plan of the exact form where norms move in a taper; None: there the source itself is that form.
        tapers: whether there is a taper.
    """

    target: Plan
    exact: Plan | None = None
    tapers: bool = False


def plan_surgery(source: nn.Module, request: Request, data: Data, tapers: bool) -> Surgery:
    """The plans for a request, calibrated on data.

    Args:
        source: with its weights.
        tapers: start from the exact form. What writes to the streams is not refitted then.

    Raises:
        RefusedError: as `convert`; or there is no exact form to start from.
    """
    if not tapers:
        return Surgery(draft(source, request, None, lambda: data))
    target = draft(source, request, None, lambda: replace(data, refit=False))
    if target.moved:
        return Surgery(target, _exact_move(source, request, target), True)
    if target.claim != "exact" and not _exchanged(target):
        raise RefusedError(
            f"{request.words()}: there is no exact form that a taper could start from. Leave `taper` out: training "
            f"then starts from the calibrated form."
        )
    return Surgery(target, None, True)


def _exact_move(source: nn.Module, request: Request, target: Plan) -> Plan:
    """The plan of the same move that computes the same function. Raises RefusedError where it is no way to the target.

    Weights of the source's names are what is trained, so that the target's constants can go into them in the end.
    """
    try:
        exact = draft(source, _unscaled(request).model_copy(update={"exact": True}), None)
    except RefusedError as error:
        reason = error.refusals[0][1].rstrip(".") if error.refusals else ""
        why = f" ({reason})" if reason else ""
        raise RefusedError(
            f"{request.words()}: there is no exact form that a taper could start from{why}. Leave `taper` out: "
            f"training then starts from the calibrated form.",
            error.refusals,
        ) from error
    gates = {edit.module for edit in _gated(exact)}
    lost = [edit.tensor for edit in exact.edits if isinstance(edit, TensorEdit) and edit not in target.edits]
    lost = [tensor for tensor in lost if tensor.rpartition(".")[0] not in gates]
    lost += [edit.tensor for edit in exact.edits if isinstance(edit, Untie)]
    lost += [f"{edit.module}.bias" for edit in exact.edits if isinstance(edit, GrowBias)]
    if lost and _lanes(exact):
        raise RefusedError(
            f"{request.words()}: the exact form that a taper would start from has a {lost[0]} of its own, which is not "
            f"in the target. Ask for the move alone, or leave `taper` out."
        )
    return exact


def _unscaled(request: Request) -> Request:
    """The same with no constants on skips: there or in the weights, they are what a taper ends in."""
    same = {row: name for name, row in reversed(ROWS.items()) if not row.scaled}
    places = (
        place.model_copy(update={"name": same.get(replace(ROWS[place.name], scaled=False), place.name)})
        for place in request.placements
    )
    return request.model_copy(update={"placements": tuple(places)})


def operate(source: nn.Module, surgery: Surgery) -> nn.Module:
    """The model to train, made of a copy of the source, which stays as it is."""
    if not surgery.tapers:
        return apply_plan(copy.deepcopy(source), surgery.target)
    if surgery.exact is not None:
        model = apply_plan(copy.deepcopy(source), surgery.exact)
        _taper_lanes(model, surgery)
    else:
        model = apply_plan(copy.deepcopy(source), surgery.target)
        for path in _exchanged(surgery.target):
            if ramped(model.get_submodule(path)):
                continue  # it has both forms in itself
            old = copy.deepcopy(source.get_submodule(path))
            model.set_submodule(path, Tapered(old, model.get_submodule(path)))
    _taper_gates(model, surgery.exact or surgery.target)
    found = ramped(model)
    if not found:
        raise RefusedError(
            f"{surgery.target.request.words()}: nothing of it can be tapered, it is exact as it is. Leave `taper` out."
        )
    set_ramps(model, dict.fromkeys(found, 1.0))
    return model


def _exchanged(plan: Plan) -> list[str]:
    """The norms that are made anew, in the place where they were, in the order of the plan."""
    made = {edit.module for edit in plan.edits if isinstance(edit, Initialise)}
    return [e.module for e in plan.edits if isinstance(e, SwapNorm) and e.module in made]


def _lanes(exact: Plan) -> list[str]:
    """The modules of an exact move that give the skip its scale back, in the order of the steps."""
    return [edit.module for edit in exact.edits if isinstance(edit, AddNorm) and edit.kind == "recovered"]


def _taper_lanes(model: nn.Module, surgery: Surgery) -> None:
    paths = _lanes(surgery.exact)
    if not paths:
        return  # gates, then
    steps = surgery.target.moved
    if len(paths) != len(steps):
        raise RefusedError(f"{len(steps)} blocks move, and the exact form has {len(paths)} lanes: it moves others.")
    for path, step in zip(paths, steps, strict=True):
        like = next(p for p in model.parameters() if p.is_floating_point())
        model.set_submodule(path, TaperedLane(step.scale, like))


def _taper_gates(model: nn.Module, plan: Plan) -> None:
    """Gated norms, of which the gate opens as the ramp goes down: `x + (1 - ramp) (N(x) - x)`."""
    for edit in _gated(plan):
        gated = model.get_submodule(edit.module)
        norm = _ungated(edit).build().to(gated.gate)
        norm.load_state_dict({name: value for name, value in gated.state_dict().items() if name != "gate"})
        model.set_submodule(edit.module, Tapered(nn.Identity(), norm.train(gated.training)))


def _gated(plan: Plan) -> list[AddNorm]:
    return [edit for edit in plan.edits if isinstance(edit, AddNorm) and KINDS[edit.kind].opened]


def _ungated(edit: AddNorm) -> AddNorm:
    return edit.model_copy(update={"kind": KINDS[edit.kind].opened})


def finish(source: nn.Module, surgery: Surgery, trained: nn.Module) -> tuple[Plan, nn.Module]:
    """What is left of a trained model without its scaffolding: the plan of its structure, and the model.

    Args:
        source: of the structure of the source; its values are not read.
        trained: made by `operate`, its ramps at 0. It is used up.

    RepBN, whose training is at its end, is folded by `repbn.fold_repbn`, which is not this function's.
    """
    if not surgery.tapers:
        return surgery.target, trained
    if any(float(module.ramp) for module in ramped(trained).values()):
        raise AssertionError("the taper has not ended")
    if surgery.exact is not None and _lanes(surgery.exact):
        return _without_lanes(source, surgery, trained)
    for path, module in list(trained.named_modules()):
        if isinstance(module, Tapered):
            trained.set_submodule(path, module.new)
    return _opened(surgery.exact or surgery.target), trained


def _opened(plan: Plan) -> Plan:
    """The same with norms in the place of gated ones."""
    opened = {edit.module: _ungated(edit) for edit in _gated(plan)}
    gates = {f"{path}.gate" for path in opened}
    edits = [opened.get(edit.module, edit) if isinstance(edit, AddNorm) else edit for edit in plan.edits]
    return plan.model_copy(update={"edits": tuple(e for e in edits if getattr(e, "tensor", None) not in gates)})


def _without_lanes(source: nn.Module, surgery: Surgery, trained: nn.Module) -> tuple[Plan, nn.Module]:
    """The target's plan, with the constants as trained, carried out on the trained weights of the source's names.

    What the exact form has in common with it, such as centring, was done before training and is not done again.
    """
    scales = {
        step.name: trained.get_submodule(path).scale
        for path, step in zip(_lanes(surgery.exact), surgery.target.moved, strict=True)
    }
    target = surgery.target
    plan = with_scales(source, target.request, Scales(stream=scales))
    told = {block.name: block for block in target.moved}
    moved = tuple(told[block.name].model_copy(update={"scale": block.scale}) for block in plan.moved)
    plan = plan.model_copy(update={"moved": moved, "claim": target.claim, "calibrated_on": target.calibrated_on})
    gates = [edit.module for edit in _gated(plan)]
    plan = _opened(plan)
    left = [e for e in plan.edits if not (isinstance(e, TensorEdit) and e in surgery.exact.edits)]
    state = trained.state_dict()
    result = copy.deepcopy(source)
    result.load_state_dict({name: state[name] for name in result.state_dict()})
    apply_plan(result, plan.model_copy(update={"edits": tuple(left)}))
    for path in gates:
        result.get_submodule(path).load_state_dict(trained.get_submodule(path).new.state_dict())
    return plan, result


@torch.no_grad()
def difference(a: nn.Module, b: nn.Module, batches: Sequence[Mapping[str, Any]]) -> float:
    """The relative difference of the main output of two models in eval mode: the norm of it over the norm of a's."""
    off, size = 0.0, 0.0
    for batch in batches:
        x, y = outputs_of(a, batch, False, "A"), outputs_of(b, batch, False, "B")
        name = main_output(x)
        off += float((x[name].double() - y[name].double()).square().sum())
        size += float(x[name].double().square().sum())
    return (off / size) ** 0.5 if size else off


def check_start(source: nn.Module, model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> float:
    """The difference with which a taper starts. Raises VerificationError where it is not rounding."""
    found = difference(source, model, batches)
    dtype = next(p.dtype for p in source.parameters() if p.is_floating_point())
    if found > (limit := _SAME.get(dtype, 0.1)):
        raise VerificationError(
            f"the taper was to start from the source's function, and starts {found:.1e} away from it (expected "
            f"{limit:.0e} at most). Nothing was trained. Please report the model: this is a fault of normswap."
        )
    return found
