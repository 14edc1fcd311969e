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
    """`plan`, with the tensors of its fitted norms.

    On random inputs those keep what they start with that is made of running statistics: these are of real data.
    """
    edits = {edit.module: edit for edit in plan.edits if isinstance(edit, Initialise)}
    wanted = [edits[path] for path in normmap.sites if path in edits and isinstance(edits[path].route, Fitted)]
    fitted = [edit for edit in wanted if not (data.random and edit.route.alone)]
    if not wanted:
        return plan
    converted = apply_plan(copy.deepcopy(data.model), plan)
    tensors: dict[str, torch.Tensor] = {}
    for done, edit in enumerate(fitted):
        tensors |= _fit(data.model, converted, normmap.sites[edit.module], edit, data.batches)
        data.progress("fitting norms", done + 1, len(fitted))
    on = [data.described] if fitted else []
    on += [f"the running statistics of {len(wanted) - len(fitted)} norms"] if len(wanted) > len(fitted) else []
    plan = plan.model_copy(update={"claim": "calibrated", "calibrated_on": " and ".join(on)})
    return plan.with_fitted(tensors)


@torch.no_grad()
def _fit(
    original: nn.Module, converted: nn.Module, site: Site, edit: Initialise, batches: Sequence[Mapping[str, Any]]
) -> dict[str, torch.Tensor]:
    """Fit one norm of `converted`, in place; its tensors by name."""
    taps = Tap(site.path, "input"), Tap(site.path, "output")
    module = converted.get_submodule(site.path)
    x, y, normalised = [], [], []
    for inputs in batches:
        read = watch(converted, taps[:1], inputs)[taps[0]]
        x.append(_rows(read, site, inputs))
        y.append(_rows(watch(original, taps[1:], inputs)[taps[1]], site, inputs))
        if hasattr(module, "normalised"):
            normalised.append(_rows(module.normalised(read), site, inputs))
    own = edit.own(lambda name: original.state_dict()[name].double())
    samples = Samples(torch.cat(x), torch.cat(y), torch.cat(normalised or x), site.spec, own)
    values = edit.route.fit(samples)
    held = module.state_dict(keep_vars=True)
    for name, value in values.items():
        held[name].copy_(value)
    return {f"{site.path}.{name}": held[name].detach().clone() for name in values}


def _rows(value: torch.Tensor, site: Site, inputs: Mapping[str, Any]) -> torch.Tensor:
    return rows(value.movedim(site.spec.axes[0], -1), inputs)
