"""One model type examined: what inspect finds in it, and each conversion measured against the original."""

from __future__ import annotations

import copy
import re
import time
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import normswap
from normswap.errors import NormswapError, ObserveError, RefusedError, VerificationError
from normswap.norms.kinds import OFFERED
from normswap.planning.planner import make_plan
from normswap.planning.plans import Plan
from normswap.planning.request import Request
from normswap.understand.normmap import NormMap
from normswap.verification.inputs import redrawn
from normswap.verification.live import measure_live
from normswap.verification.models import compare_models
from normswap.verification.outputs import outputs_of
from normswap.verification.untying import why_tied
from sweep import zoo
from sweep.disk import prepare

#: every conversion, in the words of the command line; each is asked for with `--partial`
CONVERSIONS = {
    "--norm rmsnorm": dict(norm="rmsnorm"),
    "--fold": dict(fold=True),
    "--norm rmsnorm --fold": dict(norm="rmsnorm", fold=True),
    "--norm rmsnorm --explicit always": dict(norm="rmsnorm", explicit="always"),
}
#: what a record's conversion may be
RESULTS = ("exact", "refused", "WRONG", "unstable", "crashed", "nothing")
# a conversion rounds each weight it edits a few times, each rounding of the size that the noise is made of
_UNSTABLE = 30


def examine(model_type: str, disk: str | None = None) -> dict[str, Any]:
    """A record of the type's small model, as plain data for JSON; never raises.

    With `disk`, a folder, the model is saved and converted there as well, and the record's `disk` says what came of it:
    `prepared` (to be loaded by `disk.load_all`), `refused` or `crashed`.

    Its `status` is `missing` (transformers has no model that could be built and run here), `refused` or `crashed` (by
    inspect), or `inspected`, and then it has `sites`, `streams`, `audit` and `conversions`, each with a `result`:

    - `exact`: measured equal at every site and output; `error` is the worst, `converted` the sites, `refused` the rest;
    - `refused`: no site can be converted; `refused` has the reasons;
    - `unstable`: the random model itself turns roundings of its weights into errors as large, so nothing is known;
    - `WRONG`, `crashed`: `why`;
    - `nothing`: the model has no norm of the kind.
    """
    quieten()
    record, model, inputs = build(model_type)
    if model is None:
        return record
    record |= examine_model(model, inputs, record["seconds"])
    if disk is not None and record["status"] == "inspected":
        record["disk"] = _on_disk(model, inputs, Path(disk) / model_type)
    return record


def build(model_type: str) -> tuple[dict[str, Any], nn.Module | None, dict[str, Any]]:
    """The beginning of a record, and the small model with its inputs; None where the record has come to an end."""
    record: dict[str, Any] = {"type": model_type, "seconds": {}}
    start = time.perf_counter()
    try:
        model = zoo.build(model_type)
        inputs = zoo.inputs_for(model)
    except zoo.CannotBuild as error:
        return record | {"status": "missing", "why": str(error)}, None, {}
    except NormswapError as error:
        return record | {"status": "refused", "why": str(error)}, None, {}
    except Exception as error:
        return record | {"status": "missing", "why": short(error)}, None, {}
    record |= {"class": type(model).__name__}
    try:
        outputs = outputs_of(model, inputs, False, "A")
    except ObserveError as error:
        return record | {"status": "missing", "why": f"it cannot be run: {error}"}, None, {}
    if not any(value.isfinite().any() for value in outputs.values()):
        return record | {"status": "missing", "why": "nothing that it gives out is finite"}, None, {}
    record["seconds"]["build"] = time.perf_counter() - start
    return record, model, inputs


def _on_disk(model: nn.Module, inputs: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    try:
        why = prepare(model, dict(inputs), folder)
    except Exception as error:
        return {"result": "crashed", "why": short(error)}
    return {"result": "prepared"} if why is None else {"result": "refused", "why": why}


def examine_model(model: nn.Module, inputs: Mapping[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
    """The record of a live model, without its type; times are put into `seconds`."""
    start = time.perf_counter()
    try:
        normmap = NormMap.of(model, inputs)
    except NormswapError as error:
        return {"status": "refused", "why": str(error)}
    except Exception as error:
        return {"status": "crashed", "why": short(error)}
    seconds["inspect"] = time.perf_counter() - start
    names = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    batches = batches_of(model, inputs)
    conversions: dict[str, Any] = {}
    has_layernorm = any(site.spec.kind == "layernorm" for site in normmap.sites.values())
    for words, request in CONVERSIONS.items():
        if len(request) > 1 and not has_layernorm:
            continue  # the same as folding alone
        tied: tuple[str, ...] = ("keep", "untie") if normmap.aliases else ("keep",)
        before = None
        for way in tied:
            start = time.perf_counter()
            asked = words if way == "keep" else f"{words} --tied untie"
            found, plan = convert(model, normmap, batches, Request.of(**request, tied=way, partial=True))
            if before is not None and plan is not None and plan.edits == before.edits:
                continue  # nothing is tied that matters: the same plan, measured already
            found["refused"] = {site: [why, pattern(why, names)] for site, why in found.get("refused", {}).items()}
            conversions[asked], before = found, plan
            seconds[asked] = time.perf_counter() - start
    return {
        "status": "inspected",
        "sites": [_site(normmap, path) for path in normmap.sites],
        "streams": [_stream(stream) for stream in normmap.streams],
        "loose": normmap.loose,
        "audit": _audit(model, inputs, normmap),
        "conversions": conversions,
    }


def convert(model, normmap: NormMap, batches, request: Request) -> tuple[dict[str, Any], Plan | None]:
    """The result of one conversion, and its plan; a plan that was measured before is not measured again."""
    try:
        plan = make_plan(normmap, request, model.config.model_type)
        if stays_tied := why_tied(model, plan, batches[0]):
            plan = make_plan(normmap, request, model.config.model_type, stays_tied=stays_tied)
    except RefusedError as error:
        sites = {site: why for site, why in error.refusals if site in normmap.sites}
        asked = [path for path, site in normmap.sites.items() if _is_asked(site, request)]
        if not asked:
            return {"result": "nothing"}, None
        whole = str(error).split("\n")[0]
        return {"result": "refused", "refused": {site: sites.get(site, whole) for site in asked}}, None
    except Exception as error:
        return {"result": "crashed", "why": short(error)}, None
    found: dict[str, Any] = {"converted": list(plan.converted), "refused": {r.site: r.reason for r in plan.refused}}
    sites = [(site.path, site.spec) for site in normmap.sites.values()]
    try:
        comparison = measure_live(model, plan, batches, sites)
    except RefusedError as error:
        whole = str(error).split("\n")[0]
        return {"result": "refused", "refused": {site: whole for site in found["converted"]} | found["refused"]}, plan
    except VerificationError as error:
        return found | {"result": "WRONG", "why": str(error)}, plan
    except Exception as error:
        return found | {"result": "crashed", "why": short(error)}, plan
    found |= {"error": comparison.worst_error, "dtype": comparison.dtype, "not_run": list(comparison.not_run)}
    if comparison.first_divergence is not None:
        noise = _own_noise(model, batches, sites)
        error = comparison.worst_error
        why = f"they part at {comparison.first_divergence} by {error:.0e}; with its weights rounded otherwise the "
        why += f"original parts from itself by {noise:.0e}"
        result = "unstable" if error < _UNSTABLE * noise else "WRONG"
        return found | {"result": result, "why": why}, plan
    if comparison.unmatched:
        return found | {"result": "WRONG", "why": f"not run alike: {', '.join(comparison.unmatched)}"}, plan
    return found | {"result": "exact"}, plan


@torch.no_grad()
def _own_noise(model: nn.Module, batches, sites) -> float:
    """How far the original is from itself in float64 when each weight is another by one part in 2^52."""
    original = copy.deepcopy(model).double().eval()
    return compare_models(original, rounded(original), batches, sites, sites).worst_error


@torch.no_grad()
def rounded(model: nn.Module) -> nn.Module:
    """A copy of a float64 model with each weight another by at most one part in 2^52."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for parameter in other.parameters():
        if parameter.is_floating_point():
            parameter *= 1 + 2**-52 * torch.randint(-1, 2, parameter.shape, generator=generator).double()
    return other


def _is_asked(site, request: Request) -> bool:
    parts = site.spec.kind in ("layernorm", "rmsnorm") and (site.spec.weight or site.spec.bias)
    folds = request.fold and (parts or site.spec.kind == "batchnorm")
    return bool(folds) or any(site.spec.kind in OFFERED[choice.kind].routes for choice in request.norms)


def batches_of(model: nn.Module, inputs: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The inputs, and the same with other values where the model takes them."""
    other = redrawn(inputs, getattr(model, "config", None), seed=1)
    try:
        outputs_of(model, other, False, "A")
    except ObserveError:
        return [inputs]
    return [inputs, other]


def _site(normmap: NormMap, path: str) -> dict[str, Any]:
    site = normmap.sites[path]
    spec = site.spec.model_dump(include={"kind", "axes", "gain", "bias", "eps", "casting", "weight"})
    linear = bool(site.readers) and not site.other_consumers
    return {"path": path, **spec, "role": site.role, "stream": site.stream, "linear": linear}


def _stream(stream) -> dict[str, Any]:
    placements = list(dict.fromkeys(block.placement for block in stream.blocks))
    closed = any(block.n_out for block in stream.blocks)
    return {"name": stream.name, "width": stream.width, "placements": placements, "pre": not closed}


def _audit(model: nn.Module, inputs: Mapping[str, Any], normmap: NormMap) -> list[str]:
    from sweep.audit import audit

    try:
        return audit(model, inputs, normmap)
    except Exception as error:
        return [f"the audit crashed: {short(error)}"]


def pattern(reason: str, names: set[str]) -> str:
    """A reason without what is particular to one model: its modules, and numbers."""
    own = {name for name in names if "." in name or "_" in name}
    reason = re.sub(r"[\w.]+\w", lambda word: "_" if word[0] in own or word[0].count(".") else word[0], reason)
    return re.sub(r"\b\d+\b", "*", reason.split("\n")[0])[:160]


def short(error: BaseException) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {str(error)[:300]} ({where.name}, line {where.lineno})"


def quieten() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)


def versions() -> dict[str, str]:
    """What a record depends on beside the code."""
    return {"torch": torch.__version__, "transformers": transformers.__version__, "normswap": normswap.__version__}
