"""Norms of another kind, fitted one after another to what the norms that they replace give.

Each is fitted on what reaches it in the model as converted so far, so that it also corrects what those before it left;
and what writes to the stream is refitted before, so that what reaches it is normalised (`calibration.normalise`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from normswap.apply.live import apply_plan
from normswap.calibration.data import Data
from normswap.calibration.normalise import normalise, origins
from normswap.calibration.taps import Tap, rows, watch
from normswap.errors import RefusedError
from normswap.norms.kind import Fitted, Samples
from normswap.planning.edits import Initialise, SwapNorm
from normswap.planning.plans import FittedNorm, Plan
from normswap.understand.normmap import NormMap, Site

#: what so many norms read and give is held at once, for all tokens
_TOGETHER = 8
#: where more of a norm's inputs lie where it is flat, it is said as a warning
_SATURATED = 0.1


def fit_norms(normmap: NormMap, plan: Plan, data: Data) -> Plan:
    """`plan`, with the tensors of its fitted norms and of what writes to their streams.

    On random inputs those keep what they start with that is made of running statistics: these are of real data.

    Raises:
        RefusedError: a norm that nothing of the data reaches.
    """
    edits = {edit.module: edit for edit in plan.edits if isinstance(edit, Initialise)}
    wanted = [site for path, site in normmap.sites.items() if path in edits and isinstance(edits[path].route, Fitted)]
    sites = [site for site in wanted if not (data.random and edits[site.path].route.alone)]
    if not wanted:
        return plan
    converted = apply_plan(copy.deepcopy(data.model), plan)
    left = origins(normmap) if data.refit else {}
    tensors: dict[str, torch.Tensor] = {}
    told: list[FittedNorm] = []
    for site, was_read, given in _originals(data.model, sites, data.batches):
        edit = edits[site.path]
        origin = left.pop(site.path, None)
        left = {path: other for path, other in left.items() if other != origin}  # parallel branches read one value
        if origin is None:
            x, normalised = _read(converted, site, data.batches)
        else:
            centred = edit.route.centred
            changed, x = normalise(converted, site.path, site.spec, origin, was_read, centred, data.batches)
            tensors |= changed
            normalised = x
        own = edit.own(lambda name: data.model.state_dict()[name].double())
        values = edit.route.fit(Samples(x, given, normalised, site.spec, own))
        plan = _with_form(plan, converted, edit, values)
        fitted = _set(converted.get_submodule(site.path), values)
        tensors |= {f"{site.path}.{name}": value for name, value in fitted.items()}
        made = _made(converted, site, x, data.batches)
        told.append(_judged(site, edit, values, x, made, given))
        data.progress("fitting norms", len(told), len(sites))
    on = [data.described] if sites else []
    on += [f"the running statistics of {len(wanted) - len(sites)} norms"] if len(wanted) > len(sites) else []
    reasons = (*plan.reasons, *_reasons(told, [name for name in tensors if name.rpartition(".")[0] not in edits]))
    plan = plan.model_copy(
        update={
            "claim": "calibrated",
            "calibrated_on": " and ".join(on),
            "reasons": reasons,
            "fitted_norms": tuple(told),
        }
    )
    return plan.with_fitted(tensors)


@torch.no_grad()
def _read(converted: nn.Module, site: Site, batches: Sequence[Mapping[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """What a norm of `converted` reads, and what it makes of that without gain and bias, each `(rows, width)`."""
    module, tap = converted.get_submodule(site.path), _input(site)
    x, normalised = [], []
    for inputs in batches:
        read = watch(converted, [tap], inputs)[tap]
        x.append(_rows(read, site, inputs))
        if hasattr(module, "normalised"):
            normalised.append(_rows(module.normalised(read), site, inputs))
    return torch.cat(x), torch.cat(normalised or x)


def _originals(
    model: nn.Module, sites: Sequence[Site], batches: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[Site, torch.Tensor, torch.Tensor]]:
    """Per site what the original's norm reads and gives on all batches, `(rows, width)`."""
    for start in range(0, len(sites), _TOGETHER):
        some = sites[start : start + _TOGETHER]
        taps = [(_input(site), Tap(site.path, "output")) for site in some]
        seen = [watch(model, [tap for pair in taps for tap in pair], inputs) for inputs in batches]
        for site, pair in zip(some, taps, strict=True):
            if any(tap not in found for found in seen for tap in pair):
                raise RefusedError(
                    f"{site.path} is to be fitted to what it gives, and nothing of the data to calibrate on reaches "
                    f"it. Give data that do, or leave it out with --sites."
                )
            read, given = (
                torch.cat([_rows(found.pop(tap), site, inputs) for found, inputs in zip(seen, batches, strict=True)])
                for tap in pair
            )
            yield site, read, given


def _input(site: Site) -> Tap:
    return Tap(site.path, "input")


def _rows(value: torch.Tensor, site: Site, inputs: Mapping[str, Any]) -> torch.Tensor:
    return rows(value.movedim(site.spec.axes[0], -1), inputs)


def _with_form(plan: Plan, converted: nn.Module, edit: Initialise, values: Mapping[str, torch.Tensor]) -> Plan:
    """`plan` and `converted` with the form of the norm that has all of `values`."""
    module = converted.get_submodule(edit.module)
    more = sorted(values.keys() - module.state_dict().keys())
    if not more:
        return plan
    swap = next(e for e in plan.edits if isinstance(e, SwapNorm) and e.module == edit.module)
    other = swap.model_copy(update={"kind": edit.route.into_apart})
    converted.set_submodule(edit.module, other.build().to(module.weight).eval())
    edits = [other if e is swap else e for e in plan.edits]
    edits += [edit.model_copy(update={"tensor": f"{edit.module}.{name}"}) for name in more]
    return plan.model_copy(update={"edits": tuple(edits)})


@torch.no_grad()
def _set(module: nn.Module, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    held = module.state_dict(keep_vars=True)
    for name, value in values.items():
        held[name].copy_(value)
    return {name: held[name].detach().clone() for name in values}


@torch.no_grad()
def _made(converted: nn.Module, site: Site, x: torch.Tensor, batches: Sequence[Mapping[str, Any]]) -> torch.Tensor:
    """What the fitted norm gives, `(rows, width)`; of maps in the model, where its statistics may be of many rows."""
    if site.spec.axes == (-1,):
        return converted.get_submodule(site.path)(x)
    tap = Tap(site.path, "output")
    return torch.cat([_rows(watch(converted, [tap], inputs)[tap], site, inputs) for inputs in batches])


def _judged(
    site: Site,
    edit: Initialise,
    values: Mapping[str, torch.Tensor],
    x: torch.Tensor,
    made: torch.Tensor,
    given: torch.Tensor,
) -> FittedNorm:
    """How well the norm does, on rows of all that it was fitted to."""
    error = (made - given).double()
    spread = (given.double() - given.double().mean(0)).square().mean().sqrt()
    flat = None if edit.route.flat is None else float(edit.route.flat(values, x).double().mean())
    return FittedNorm(
        site=site.path,
        kind=edit.kind,
        error=float(error.square().mean().sqrt() / spread.clamp_min(1e-30)),
        flat=flat,
        apart="far" in values,
    )


def _reasons(told: Sequence[FittedNorm], written: Sequence[str]) -> list[str]:
    """What was fitted, a sentence each."""
    if not told:
        return []
    worst = max(told, key=lambda norm: norm.error)
    found = [f"Each new norm follows the old one with an error of at most {worst.error:.1%} ({worst.site})."]
    if written:
        found.append(f"{len(written)} tensors that write to the stream are refitted, so that it comes normalised.")
    if apart := [norm.site for norm in told if norm.apart]:
        found.append(f"Some tokens have a scale far from all others', and one of their own at {', '.join(apart)}.")
    bent = [norm for norm in told if norm.flat is not None]
    if bent:
        most = max(bent, key=lambda norm: norm.flat)
        warning = "Warning, saturated: " if most.flat > _SATURATED else ""
        mean = sum(norm.flat for norm in bent) / len(bent)
        found.append(
            f"{warning}{mean:.1%} of the inputs lie where the new norms are flat (a slope below a tenth of the "
            f"largest), at most {most.flat:.1%} ({most.site})."
        )
    return found
