"""A plan measured on a copy of a live model, before the model is changed."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from normswap.apply.live import apply_plan
from normswap.errors import ObserveError, VerificationError
from normswap.observe.inputs import example_inputs
from normswap.observe.run import make_eager
from normswap.planning.plans import Plan
from normswap.understand.normmap import find_sites
from normswap.verification.basis import OtherBasis
from normswap.verification.checks import check_kinds, check_plain, sites_now
from normswap.verification.inputs import redrawn
from normswap.verification.models import TOLERANCES, Comparison, compare_models
from normswap.verification.outputs import outputs_of
from normswap.verification.placement import check_moved
from normswap.verification.sites import SiteSpec


def prove_live(model: nn.Module, plan: Plan, inputs: Mapping[str, Any] | None) -> None:
    """Measure the plan on a float64 copy of a live model, on one small batch of random inputs.

    Raises:
        VerificationError: an exact claim that is not met. The model is unchanged in any case.
    """
    if inputs is None:
        inputs = redrawn(example_inputs(model), model.config, seed=0)
    comparison = measure_live(model, plan, [inputs])
    if plan.claim == "exact" and comparison.first_divergence is not None:
        raise VerificationError(
            f"the plan claims to be exact and is not: original and converted part at {comparison.first_divergence}. "
            f"The model is unchanged. Please report it: this is a fault of normswap."
        )


def measure_live(
    model: nn.Module, plan: Plan, batches: Sequence[Mapping[str, Any]], sites: Sequence[SiteSpec] | None = None
) -> Comparison:
    """A live model against a converted copy, both in float64, or in float32 where the model's code does not run so.

    Args:
        batches: keyword arguments of `forward`; sites are looked for on the first.
        sites: the norms of `model`, if they are known.

    Raises:
        VerificationError: a norm does not behave as the plan says it does now, or the two part when left alone.
        ObserveError: the original or the converted model cannot be run.
    """
    original = copy.deepcopy(model).eval()
    make_eager(original)
    for dtype in (torch.float64, torch.float32):
        original = original.to(dtype)
        try:
            outputs_of(original, batches[0], dtype == torch.float64, "A")
            break
        except ObserveError:
            if dtype == torch.float32:
                raise
    converted = apply_plan(copy.deepcopy(original), plan)
    sites = find_sites(original, batches[0]) if sites is None else sites
    now = sites_now(converted, batches[0])
    check_kinds(now, plan)
    check_moved(original, converted, plan, batches[0])
    comparison = compare_models(
        original,
        converted,
        batches,
        sites,
        now,
        moved=plan.moved_norms(),
        basis=OtherBasis.of(plan),
        tolerance=TOLERANCES[dtype],
    )
    if plan.claim == "exact" and comparison.first_divergence is None:
        check_plain(original, converted, batches[0], plan)
    return comparison
