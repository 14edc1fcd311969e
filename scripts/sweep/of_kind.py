"""The norms of one kind in one model type: each way to convert them, measured against the original."""

from __future__ import annotations

import time
from typing import Any

from normswap.errors import NormswapError
from normswap.planning.request import Request
from normswap.understand.normmap import NormMap, find_sites
from sweep.examine import batches_of, build, convert, pattern, quieten, short

#: by kind of norm, the exact conversions that are for it, in the words of the command line
CONVERSIONS = {
    "batchnorm": {"--fold": dict(fold=True), "--norm affine": dict(norm="affine")},
    "rmsnorm": {"--rotate hadamard": dict(rotate="hadamard")},
}


def examine_kind(model_type: str, kind: str) -> dict[str, Any]:
    """A record of the norms of `kind` in the type's small model, as plain data for JSON; never raises.

    As `examine.examine` has it, with the sites of that kind alone among `sites`, `converted` and `refused`. Its status
    is `none` where the model has no such norm.
    """
    quieten()
    record, model, inputs = build(model_type)
    if model is None:
        return record
    start = time.perf_counter()
    try:
        if all(spec.kind != kind for _, spec in find_sites(model, inputs)):
            return record | {"status": "none"}
        normmap = NormMap.of(model, inputs)
    except NormswapError as error:
        return record | {"status": "refused", "why": str(error)}
    except Exception as error:
        return record | {"status": "crashed", "why": short(error)}
    record["seconds"]["inspect"] = time.perf_counter() - start
    sites = [path for path, site in normmap.sites.items() if site.spec.kind == kind]
    names = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    batches = batches_of(model, inputs)
    conversions = {}
    for words, request in CONVERSIONS[kind].items():
        start = time.perf_counter()
        found, _ = convert(model, normmap, batches, Request.of(**request, partial=True))
        refused = {site: why for site, why in found.get("refused", {}).items() if site in sites}
        found["refused"] = {site: [why, pattern(why, names)] for site, why in refused.items()}
        found["converted"] = [site for site in found.get("converted", []) if site in sites and site not in refused]
        conversions[words] = found
        record["seconds"][words] = time.perf_counter() - start
    return record | {"status": "inspected", "kind": kind, "sites": sites, "conversions": conversions}
