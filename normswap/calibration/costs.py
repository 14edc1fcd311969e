"""What moves cost: of each layer alone, and the most layers that stay within a budget."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from normswap.apply.live import apply_plan
from normswap.errors import RefusedError
from normswap.planning.plans import Plan
from normswap.planning.request import Placement, Request
from normswap.planning.rewrites.moved import Scales
from normswap.verification.metrics import TokenComparison
from normswap.verification.outputs import main_output, outputs_of

if TYPE_CHECKING:
    from normswap.calibration.data import Data
    from normswap.calibration.moves import Make


def cost(original: nn.Module, moved: nn.Module, batches: Sequence[Mapping[str, Any]]) -> float:
    """Mean KL of `moved` to `original` in nats per token; where they give no logits, the mean relative error."""
    comparison = None
    for inputs in batches:
        a, b = outputs_of(original, inputs, False, "A"), outputs_of(moved, inputs, False, "B")
        name = main_output(a)
        comparison = comparison or TokenComparison(distributions=name == "logits")
        comparison.add(a[name], b[name])
    metrics = comparison.metrics()
    return (metrics.kl or metrics.error).mean


def costs_alone(
    original: nn.Module, request: Request, make: Make, scales: Scales, draft: Plan, data: Data
) -> dict[int | None, float]:
    """By layer, the cost of moving that layer and no other."""
    layers = sorted({block.layer for block in draft.moved if block.layer is not None})
    found: dict[int | None, float] = {}
    for done, layer in enumerate(layers):
        asked = tuple(p for p in request.placements if p.takes(layer))[-1:]
        alone = request.model_copy(
            update={"placements": tuple(Placement(name=p.name, layers=str(layer)) for p in asked)}
        )
        try:
            plan, _ = make(alone, scales)
        except RefusedError:
            continue  # a move of the whole stream alone
        found[layer] = cost(original, apply_plan(copy.deepcopy(original), plan), data.measured)
        data.progress("moving layers alone", done + 1, len(layers))
    return found


def within_budget(
    request: Request, costs: Mapping[int | None, float], fitted: Callable[[Request], tuple[Plan, float]]
) -> Plan:
    """The plan that moves most layers, the cheapest first, and costs no more than the budget, all of it measured.

    Costs are taken to grow with the layers moved, so that the number is found by bisection.

    Raises:
        RefusedError: not even the cheapest layer stays within it.
    """
    placement = next(p for p in request.placements if p.budget is not None)
    order = sorted(costs, key=lambda layer: costs[layer])
    best: Plan | None = None
    low, high, least = 0, len(order), float("inf")
    while low < high:
        count = (low + high + 1) // 2
        layers = ",".join(str(layer) for layer in sorted(order[:count]))
        chosen = tuple(p if p is not placement else Placement(name=p.name, layers=layers) for p in request.placements)
        plan, found = fitted(request.model_copy(update={"placements": chosen}))
        least = min(least, found)
        if found <= placement.budget:
            best, low = plan, count
        else:
            high = count - 1
    if best is None:
        raise RefusedError(
            f"no layer can be moved for {placement.budget:g} nats per token: the cheapest measured costs {least:.2g}. "
            f"Allow more, or calibrate on more tokens."
        )
    return best
