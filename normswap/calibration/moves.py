"""Moved norms, calibrated: measure the scales, plan with them, refit what writes the moved blocks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

from torch import nn

from normswap.apply.live import apply_plan
from normswap.calibration.costs import cost, costs_alone, within_budget
from normswap.calibration.data import Data
from normswap.calibration.refit import Fit, Target, refit
from normswap.calibration.scales import Scale, measure_scales
from normswap.calibration.taps import Tap, find_tap
from normswap.calibration.writers import writings
from normswap.norms.spec import NormSpec
from normswap.planning.plans import MovedBlock, Plan
from normswap.planning.request import Request
from normswap.planning.rewrites.moved import MovedStep, Scales
from normswap.planning.rewrites.steps import ROWS
from normswap.understand.normmap import NormMap, StreamInfo

#: makes the plan for a request with given constants; returns it with what calibration needs to know of its steps
Make = Callable[[Request, Scales | None], tuple[Plan, tuple[MovedStep, ...]]]

# behind a step's name, before a number: what that branch of it gives
_BRANCH = " branch"


def calibrated_moves(normmap: NormMap, request: Request, make: Make, data: Data) -> Plan:
    """The plan that `make` gives, its constants and writers fitted to what the model does on data.

    The same model and batches give the same plan, bit for bit, on one machine. Costs two more copies of the model and,
    per block, the features of its writers over all tokens.

    Raises:
        RefusedError: as `make`; or no layer can be moved within the budget of `--layers auto:KL`.
    """
    original = data.model
    everywhere = request.everywhere()
    draft, steps = make(everywhere, None)
    goal = original
    if request.norms:
        # what moves is the model whose norms have changed their kind: its streams have no mean
        goal = apply_plan(copy.deepcopy(original), make(request.model_copy(update={"placements": ()}), None)[0])
    found = measure_scales(goal, _taps(normmap, steps), data.batches, data.counts("measuring scales"))
    scales = _constants(steps, found)
    costs = costs_alone(original, everywhere, make, scales, draft, data)

    def fitted(asked: Request) -> tuple[Plan, nn.Module]:
        plan, steps = make(asked, scales)
        moved = apply_plan(copy.deepcopy(original), plan)
        targets = [target for step in steps if data.refit and (target := _target(normmap, step)) is not None]
        fits, tensors = refit(goal, moved, targets, data.batches, data.counts("refitting blocks"))
        told = tuple(_told(block, found, fits, costs) for block in plan.moved)
        return plan.model_copy(update={"moved": told, "calibrated_on": data.described}).with_fitted(tensors), moved

    if any(placement.budget is not None for placement in request.placements):
        return within_budget(request, costs, lambda asked: _judged(original, fitted(asked), data))
    return fitted(request)[0]


def _judged(original: nn.Module, result: tuple[Plan, nn.Module], data: Data) -> tuple[Plan, float]:
    plan, moved = result
    return plan, cost(original, moved, data.measured)


def _told(block: MovedBlock, found: Mapping[str, Scale], fits: Mapping[str, Fit], costs: Mapping[int | None, float]):
    """The block with what was measured of it."""
    scale, fit = found.get(block.name), fits.get(block.name)
    return block.model_copy(
        update={
            "spread": scale and scale.spread,
            "unfitted": fit and fit.before,
            "error": fit and fit.after,
            "kl": costs.get(block.layer),
        }
    )


def _constants(steps: Sequence[MovedStep], found: Mapping[str, Scale]) -> Scales:
    """The constants of the move, each the best for what it stands for."""
    rows = {step.name: ROWS[step.after] for step in steps}
    raw = {name for name, row in rows.items() if not row.n_out and not row.n_in}
    put_in = {step.name for step in steps if rows[step.name].n_in and step.adds_n_in and step.out is None}
    stream = {
        name: scale.least_squares if name in raw else scale.mean if name in put_in else scale.harmonic
        for name, scale in found.items()
        if _BRANCH not in name
    }
    branch = {}
    for step in steps:
        for index in range(len(step.branches)):
            given = found.get(f"{step.name}{_BRANCH} {index}")
            if given is not None:
                branch[step.name, index] = given.mean if rows[step.name].n_branch else given.least_squares
    return Scales(stream=stream, branch=branch)


def _taps(normmap: NormMap, steps: Sequence[MovedStep]) -> dict[str, tuple[Tap, NormSpec]]:
    """Per step the value whose scale it wants to know, the one behind it, and what its branch gives."""
    taps = {}
    for step in steps:
        base = _stream(normmap, step).found.analysis.base
        wanted = [(step.after_it, (step.result, step.norm))]
        wanted += [(f"{step.name}{_BRANCH} {i}", (value, step.norm)) for i, value in enumerate(step.branches)]
        wanted += [(step.name, step.scaled)] if step.scaled is not None else []
        for name, (value, norm) in wanted:
            tap = find_tap(normmap.trace, value, base)
            if tap is not None and (name not in taps or name == step.name):
                taps[name] = tap, norm
    return taps


def _target(normmap: NormMap, step: MovedStep) -> Target | None:
    """What is to be refitted for a step: None where nothing normalises its sum along the last axis."""
    stream = _stream(normmap, step)
    original = find_tap(normmap.trace, step.result, stream.found.analysis.base)
    if step.out is None or original is None or step.norm.axes != (-1,):
        return None
    writers = writings(normmap, stream, step.branches)
    # a frame stands where a normalised stream became raw; behind its last sum there is no branch to be scaled
    carried = step.frame is not None and step.result != stream.blocks[-1].result
    return Target(step.name, writers, Tap(step.out, "input"), step.frame, original, step.norm, carried)


def _stream(normmap: NormMap, step: MovedStep) -> StreamInfo:
    return next(stream for stream in normmap.streams if stream.name == step.stream)
