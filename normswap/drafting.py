"""From a model and a request to its plan, calibrated where the request takes data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from normswap.calibration.by_eps import by_eps, express
from normswap.calibration.data import Data
from normswap.calibration.inserted import inserted
from normswap.calibration.moves import Make
from normswap.calibration.run import calibrated
from normswap.errors import RefusedError
from normswap.planning.planner import make_plan, plan_moves
from normswap.planning.plans import Plan
from normswap.planning.request import Request
from normswap.planning.rewrites.moved import MovedStep, Scales
from normswap.understand.normmap import NormMap, inspect
from normswap.verification.untying import why_tied


def draft(
    model: nn.Module,
    request: Request,
    inputs: Mapping[str, Any] | None,
    data: Callable[[], Data] | None = None,
    dtype: torch.dtype | None = None,
) -> Plan:
    """The plan for a model; calibrated on what `data` gives, where there is something to fit.

    `dtype`: in which the result is stored, None: in the model's own.
    """
    normmap, made, make = _planner(model, request, inputs)
    if request.chooses_layers and (data is None or made.claim == "exact"):
        raise RefusedError(
            f"{request.words()}: layers are chosen by what moving them costs on text, "
            + ("which is nothing: the move is exact." if made.claim == "exact" else "so it takes a calibration.")
            + " Name the layers, or leave --layers out."
        )
    if request.exact and made.claim != "exact":
        raise RefusedError(
            f"{normmap.architecture}: no form of {request.words()} computes the same function. Leave out --exact to "
            f"have it calibrated."
        )
    asked = by_eps(model, normmap, made, inputs, dtype)
    if asked is not None and data is None:
        return express(made, asked, None)
    if data is None or (made.claim == "exact" and not made.lacks() and not inserted(made)):
        return made
    data = data()
    made = calibrated(normmap, request, make, data, moves=bool(request.placements) and made.claim != "exact")
    return made if asked is None else express(made, asked, data)


def with_scales(model: nn.Module, request: Request, scales: Scales) -> Plan:
    """The plan of a move whose constants are known, with nothing else fitted."""
    _, _, make = _planner(model, request, None)
    return make(request, scales)[0]


def _planner(model: nn.Module, request: Request, inputs: Mapping[str, Any] | None) -> tuple[NormMap, Plan, Make]:
    """What the norms of a model are, the plan of a request with nothing fitted, and what makes such plans."""
    prefix = getattr(model, "base_model_prefix", "")
    prefix = prefix if prefix and hasattr(model, prefix) else ""
    model_type = getattr(getattr(model, "config", None), "model_type", "")
    normmap, everywhere = inspect(model, inputs=inputs), request.everywhere()
    made = make_plan(normmap, everywhere, model_type, prefix)
    stays_tied = why_tied(model, made, inputs)
    if stays_tied:
        made = make_plan(normmap, everywhere, model_type, prefix, stays_tied)

    def make(asked: Request, scales: Scales | None) -> tuple[Plan, tuple[MovedStep, ...]]:
        return plan_moves(normmap, asked, model_type, prefix, stays_tied, scales)

    return normmap, made, make
