"""Frozen scales expressed by the norms that were there, with an eps E that outweighs every variance v they meet:

    g' z / sqrt(v + E) = (g' / sqrt(E)) z (1 - v / 2E + ..),        g' = g sqrt(E) / s.

E is a power of 4, so that sqrt(E) rounds nothing. It is the least that leaves `v / 2E` below what float32, in which
norms compute, can tell; or the most that the model's own dtype allows, whose range g' and, where a norm rounds before
its gain, `z / sqrt(E)` have to fit in.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from normswap.apply.live import apply_plan
from normswap.calibration.data import Data
from normswap.calibration.taps import Tap, rows, watch
from normswap.errors import RefusedError
from normswap.norms.fits import around
from normswap.norms.kinds import KINDS
from normswap.observe.inputs import example_inputs
from normswap.planning.edits import FITTED, AnyEdit, Initialise, ModuleEdit, Refit, Scale, SetEps, TensorEdit
from normswap.planning.plans import Plan
from normswap.understand.eps_keys import eps_keys
from normswap.understand.normmap import NormMap, Site
from normswap.verification.loaded import coarsest_dtype

#: of float32, half a unit in the last place
_UNSEEN = 2.0**-25
#: without data variances are not known; those of most streams are outweighed by this
_WITHOUT_DATA = 4.0**20
# how often the largest gain has to fit into a dtype, and the least normal number into what a norm makes; and how far
# the scale of a token may be off for lack of such room
_ROOM, _NORMAL, _OFF = 4, 64, 0.1
_WAY_OUT = "Take --norm none, which brings a class of its own"


@dataclass(frozen=True)
class ByEps:
    """What is to be expressed so.

    Attributes:
        sites: by path.
        keys: by key of the configuration the norms whose eps it is, and the attribute of each that holds it.
        dtype: of the result.
    """

    sites: Mapping[str, Site]
    keys: Mapping[str, Mapping[str, str]]
    dtype: torch.dtype


def by_eps(
    model: nn.Module, normmap: NormMap, plan: Plan, inputs: Mapping[str, Any] | None, dtype: torch.dtype | None = None
) -> ByEps | None:
    """What of `plan` is to be expressed so; None: nothing. `dtype`: of the result, None: the model's own.

    Raises:
        RefusedError: a norm without a gain; an eps that the configuration does not have, or that other norms share.
    """
    paths = {edit.module for edit in plan.edits if isinstance(edit, Initialise) and KINDS[edit.kind].by_eps}
    if not paths:
        return None
    words = plan.request.words()
    sites = {path: site for path, site in normmap.sites.items() if path in paths}
    if bare := [path for path, site in sites.items() if site.spec.weight is None]:
        raise RefusedError(f"{words}: {bare[0]} has no gain to make up for its eps. {_WAY_OUT}.")
    inputs = example_inputs(model) if inputs is None else inputs
    keys = eps_keys(model, {site.spec.eps for site in sites.values()}, inputs)
    keys = {key: follow for key, follow in keys.items() if follow.keys() & paths}
    if lacking := [path for path in sites if not any(path in follow for follow in keys.values())]:
        raise RefusedError(
            f"{words}: no number in the configuration of {normmap.architecture} is the eps of {lacking[0]} and of "
            f"norms alone, so that its class could be built with another. {_WAY_OUT}."
        )
    for key, follow in keys.items():
        if others := sorted(follow.keys() - paths):
            raise RefusedError(
                f"{words}: {key} is the eps of {others[0]} as well, which is to stay a norm. Exchange all "
                f"{len(follow)} norms that share it (no --sites, no --role). {_WAY_OUT}, at any site."
            )
    return ByEps(sites, keys, dtype or coarsest_dtype(model))


def express(plan: Plan, asked: ByEps, data: Data | None) -> Plan:
    """`plan`, in which a class of ours stands at each of these sites, with the model's own class there.

    Args:
        data: None: the plan is not fitted, and each frozen scale is 1.

    Raises:
        RefusedError: the model's dtype has no room for such an eps.
    """
    edits: list[AnyEdit] = [edit for edit in plan.edits if _module(edit) not in asked.sites]
    tensors: dict[str, torch.Tensor] = {}
    eps, off = _WITHOUT_DATA, ""
    if data is None:
        edits += [
            Scale(tensor=f"{path}.{site.spec.weight}", factor=math.sqrt(eps), form=site.spec.gain)
            for path, site in asked.sites.items()
        ]
    else:
        read = plan.reading(lambda name: data.model.state_dict()[name])
        own = {p: {n: read(f"{FITTED}{p}.{n}") for n in ("weight", "bias", "scale")} for p in asked.sites}
        largest = _largest_variance(plan, asked, data)
        eps = _outweighing(largest, asked, own)
        off = f", but for {largest / (2 * eps):.1g} of it at most on the data"
        if not largest / (2 * eps) < _OFF:
            raise RefusedError(
                f"{plan.request.words()}: {asked.dtype} has room for an eps of {eps:.3g}, and the variance of some "
                f"tokens is {largest:.3g}. {_WAY_OUT}, or convert to bfloat16 or float32 first."
            )
        for path, site in asked.sites.items():
            spec = site.spec
            gain = own[path]["weight"] * math.sqrt(eps) / own[path]["scale"]
            tensors[f"{path}.{spec.weight}"] = gain - 1 if spec.gain == "1 + w" else gain
            if spec.bias is not None:
                tensors[f"{path}.{spec.bias}"] = own[path]["bias"]
        edits += [Refit(tensor=name) for name in tensors]
    edits += [SetEps(key=key, value=eps, modules=tuple(follow.items())) for key, follow in asked.keys.items()]
    told = (
        f"The norms stay of their class, with {' and '.join(asked.keys)} = {eps:.3g}: they divide by its root, "
        f"whatever they read{off}."
    )
    return plan.restated(edits, tensors).model_copy(update={"reasons": (*plan.reasons, told)})


def _module(edit: AnyEdit) -> str | None:
    """Path of the module that an edit is of, or that its tensor is in."""
    if isinstance(edit, ModuleEdit):
        return edit.module
    return edit.tensor.rpartition(".")[0] if isinstance(edit, TensorEdit) else None


@torch.no_grad()
def _largest_variance(plan: Plan, asked: ByEps, data: Data) -> float:
    """Of what any token gives these norms to read."""
    model = apply_plan(copy.deepcopy(data.model), plan)
    taps = {Tap(path, "input"): site.spec for path, site in asked.sites.items()}
    largest = 0.0
    for inputs in data.batches:
        for tap, read in watch(model, taps, inputs).items():
            z = around(rows(read.movedim(taps[tap].axes[0], -1), inputs), taps[tap])
            largest = max(largest, float(z.double().square().mean(-1).max()))
    return largest


def _outweighing(largest: float, asked: ByEps, own: Mapping[str, Mapping[str, torch.Tensor]]) -> float:
    """E: the least power of 4 that leaves nothing of a variance to see, or the most that the dtype allows."""
    limits = torch.finfo(asked.dtype)
    root = math.sqrt(largest / (2 * _UNSEEN))
    most = math.inf
    for path, site in asked.sites.items():
        scale = float(own[path]["scale"])
        most = min(most, limits.max / _ROOM * scale / float(own[path]["weight"].abs().max().clamp_min(1e-30)))
        if site.spec.casting != "float32":
            most = min(most, scale / (_NORMAL * limits.tiny))
        if site.spec.casting == "input":
            most = min(most, math.sqrt(limits.max / _ROOM))
    return 4.0 ** min(math.ceil(math.log2(root)), math.floor(math.log2(most)))
