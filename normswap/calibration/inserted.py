"""Norms on heads of queries and keys, fitted so that they change as little as they can.

Behind a gate of 0 they do nothing, so that all of them are fitted to one model, and the claim stays what it is. With
the gate at 1 each head has one scale for all tokens, whatever it had, and gains for all heads are the same: something
changes. Gains and biases are least squares for `N(x) = x`, channel by channel, over the heads of all tokens,

    min over g, b of sum |x|^p |g n(x) + b - x|^2.

Which p does best depends on how much more heads of large scale have to say: so each of some is tried, a gain of 1 too,
and what is kept is what the opened model is nearest to the original with, on tokens that nothing was fitted to.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from normswap.apply.live import apply_plan
from normswap.calibration.costs import cost
from normswap.calibration.data import Data
from normswap.calibration.taps import Tap, rows, watch
from normswap.errors import RefusedError
from normswap.norms.fits import root_mean_square
from normswap.norms.kinds import KINDS
from normswap.planning.edits import AddNorm, NormOutput
from normswap.planning.plans import Plan
from normswap.planning.rewrites.qk_norm import NEUTRAL

_POWERS = (-2, 0, 2)
#: what so many norms read is held at once, for all tokens
_TOGETHER = 8
Tensors = dict[str, torch.Tensor]


def inserted(plan: Plan) -> list[AddNorm]:
    """The norms of a plan that stand on heads, where no other norm says what their gains are to be."""
    on_heads = {f"{e.module}.{name}" for e in plan.edits if isinstance(e, NormOutput) for name, *_ in e.runs}
    found = [edit for edit in plan.edits if isinstance(edit, AddNorm) and edit.module in on_heads]
    return [edit for edit in found if KINDS[edit.kind].inserted is not None]


@torch.no_grad()
def fit_inserted(plan: Plan, data: Data) -> Plan:
    """`plan`, with gains and biases of its inserted norms. On random inputs, which are no data, they stay neutral.

    Raises:
        RefusedError: a norm that nothing of the data reaches.
    """
    norms = inserted(plan)
    if not norms or data.random:
        return plan
    model = apply_plan(copy.deepcopy(data.model), plan)
    closed = copy.deepcopy(model)
    found: dict[int, Tensors] = {power: {} for power in _POWERS}
    for done, (edit, x) in enumerate(_read(model, norms, data)):
        normalised, scale = model.get_submodule(edit.module).normalised(x), root_mean_square(x)
        for power in _POWERS:
            values = KINDS[edit.kind].inserted(normalised, x, scale**power)
            found[power] |= {f"{edit.module}.{name}": value for name, value in values.items()}
        data.progress("fitting norms of heads", done + 1, len(norms))
    for edit in norms:
        model.get_submodule(edit.module).gate.fill_(1)
    costs = {None: cost(closed, model, data.measured)}
    for power, tensors in found.items():
        _set(model, tensors)
        costs[power] = cost(closed, model, data.measured)
    best = min(costs, key=costs.get)
    told = (
        f"With all gates at 1 the KL to the model as it is (without logits, the relative error) would be "
        f"{costs[best]:.2g}, with gains of 1 {costs[None]:.2g}: gains are "
        + ("1." if best is None else "fitted to change heads least.")
    )
    reasons = (*(reason for reason in plan.reasons if reason != NEUTRAL), told)
    plan = plan.model_copy(update={"reasons": reasons, "calibrated_on": plan.calibrated_on or data.described})
    if best is None:
        return plan
    held = model.state_dict()
    return plan.with_fitted({name: value.to(held[name]) for name, value in found[best].items()})


def _read(model: nn.Module, norms: list[AddNorm], data: Data) -> Iterator[tuple[AddNorm, torch.Tensor]]:
    """What each of `norms` reads on all batches, `(rows, width)`."""
    for start in range(0, len(norms), _TOGETHER):
        some = norms[start : start + _TOGETHER]
        taps = [Tap(edit.module, "input") for edit in some]
        seen = [watch(model, taps, inputs) for inputs in data.batches]
        for edit, tap in zip(some, taps, strict=True):
            if any(tap not in found for found in seen):
                raise RefusedError(f"{edit.module} is to be fitted, and nothing of the data reaches it.")
            pairs = zip(seen, data.batches, strict=True)
            yield edit, torch.cat([_heads(found.pop(tap), inputs) for found, inputs in pairs])


def _heads(read: torch.Tensor, inputs: Mapping[str, Any]) -> torch.Tensor:
    """`(.., heads, width)` as `(rows, width)`, all heads of the tokens that are no padding."""
    return rows(read.flatten(-2), inputs).unflatten(-1, read.shape[-2:]).flatten(0, -2)


def _set(model: nn.Module, tensors: Tensors) -> None:
    held = model.state_dict(keep_vars=True)
    for name, value in tensors.items():
        held[name].copy_(value)
