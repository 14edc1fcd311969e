"""Which of the recipes that ship with normswap heals a conversion: the one whose surgery is the same."""

from __future__ import annotations

from typing import Any

import yaml

from normswap.errors import NormswapError
from normswap.planning.plans import Plan
from normswap.planning.request import Request
from normswap.tune.shipped import shipped


def recipe_for(plan: Plan) -> str | None:
    """The name of the recipe that does what `plan` does and trains afterwards, None if there is none.

    Several norms or placements are healed by the recipe of any of them; the one that does most of it comes first.
    """
    wanted = _things(plan.request)
    found = {name: wanted & _things(request) for name, request in _surgeries().items() if _things(request) <= wanted}
    best = max(found, key=lambda name: len(found[name]), default=None)
    return best if best is not None and found[best] else None


def _things(request: Request) -> set[tuple[str, Any]]:
    things = {("norm", choice.kind) for choice in request.norms} | {("place", p.name) for p in request.placements}
    return things | ({("qk_norm", request.qk_norm)} if request.qk_norm else set())


def _surgeries() -> dict[str, Request]:
    """By name of a shipped recipe, what it asks for."""
    found = {}
    for name, path in shipped().items():
        surgery = yaml.safe_load(path.read_text(encoding="utf-8")).get("surgery")
        try:
            for words in surgery if isinstance(surgery, list) else [surgery or {}]:
                found[name] = Request.of(**words)
        except (NormswapError, TypeError):  # a surgery of other words than a conversion's heals no conversion
            continue
    return found
