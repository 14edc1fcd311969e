"""Norms of another kind, fitted one after another to what the norms that they replace give.

Each is fitted on what reaches it in the model as converted so far, so that it also corrects what those before it left.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from normswap.apply.live import apply_plan
from normswap.calibration.data import Data
from normswap.calibration.taps import Tap, rows, watch
from normswap.norms.kind import Fitted, Samples
from normswap.planning.edits import Initialise
from normswap.planning.plans import Plan
from normswap.understand.normmap import NormMap, Site


def fit_norms(normmap: NormMap, plan: Plan, data: Data) -> Plan:
    """`plan`, with the tensors of its fitted norms."""
    edits = {edit.module: edit for edit in plan.edits if isinstance(edit, Initialise)}
    fitted = [edits[path] for path in normmap.sites if path in edits and isinstance(edits[path].route, Fitted)]
    if not fitted:
        return plan
    converted = apply_plan(copy.deepcopy(data.model), plan)
    tensors: dict[str, torch.Tensor] = {}
    for done, edit in enumerate(fitted):
        tensors |= _fit(data.model, converted, normmap.sites[edit.module], edit, data.batches)
        data.progress("fitting norms", done + 1, len(fitted))
    plan = plan.model_copy(update={"claim": "calibrated", "calibrated_on": data.described})
    return plan.with_fitted(tensors)


@torch.no_grad()
def _fit(
    original: nn.Module, converted: nn.Module, site: Site, edit: Initialise, batches: Sequence[Mapping[str, Any]]
) -> dict[str, torch.Tensor]:
    """Fit one norm of `converted`, in place; its tensors by name."""
    taps = Tap(site.path, "input"), Tap(site.path, "output")
    x, y = [], []
    for inputs in batches:
        x.append(_rows(watch(converted, taps[:1], inputs)[taps[0]], site, inputs))
        y.append(_rows(watch(original, taps[1:], inputs)[taps[1]], site, inputs))
    own = edit.own(lambda name: original.state_dict()[name].double())
    values = edit.route.fit(Samples(torch.cat(x), torch.cat(y), site.spec, own))
    module = converted.get_submodule(site.path)
    held = module.state_dict(keep_vars=True)
    for name, value in values.items():
        held[name].copy_(value)
    return {f"{site.path}.{name}": held[name].detach().clone() for name in values}


def _rows(value: torch.Tensor, site: Site, inputs: Mapping[str, Any]) -> torch.Tensor:
    return rows(value.movedim(site.spec.axes[0], -1), inputs)
