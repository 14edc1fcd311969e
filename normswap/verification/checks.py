"""What has to hold of a converted model besides its numbers."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from normswap.checkpoint.files import Checkpoint
from normswap.errors import ObserveError, RefusedError, VerificationError
from normswap.planning.edits import CentreInput, CentreOutput, SwapNorm
from normswap.planning.plans import Plan
from normswap.understand.normmap import find_sites
from normswap.verification.basis import OtherBasis
from normswap.verification.outputs import check_alike, outputs_of, row_errors
from normswap.verification.sites import SiteSpec

if TYPE_CHECKING:
    from normswap.verification.run import Report

# float32 casts inside float64 models, over many layers
_PLAIN_TOLERANCE = 1e-3
#: how many tensors of a folder are wrong, and the first
WRONG_FILES = (
    "{} tensors of the folder are not what the plan makes of the source, {} among them. Nothing was published. Please "
    "report the checkpoint: this is a fault of normswap."
)


def sites_now(converted: nn.Module, inputs: Mapping[str, Any] | None = None) -> list[SiteSpec]:
    """The norms of a converted model, which has to run for that. Raises RefusedError where it does not."""
    try:
        return find_sites(converted, inputs)
    except ObserveError as error:
        raise RefusedError(
            f"the converted {type(converted).__name__} does not run, while the original does: {error} The model's own "
            f"code wants something of its norms that the new ones do not have (a weight, for its dtype): leave out "
            f"--fold, or ask for --fold alone, which keeps neutral parameters. Nothing was changed."
        ) from error


def check_exact(report: Report) -> None:
    found = report.comparison
    if found.first_divergence is not None:
        error = found.output.error
        raise VerificationError(
            f"the plan claims to be exact and is not: original and converted part at {found.first_divergence} "
            f"(tolerance {found.tolerance:.0e} in {found.dtype}; worst relative error of the output "
            f"{error.max if error else float('nan'):.1e}). Nothing was published. Please report the model: this is a "
            f"fault of normswap."
        )


def check_kinds(sites: Sequence[SiteSpec], plan: Plan) -> None:
    """Every norm that the plan converts or adds is among `sites`, those of the result, as the kind it is to be."""
    kept = {refusal.site for refusal in plan.refused}
    everywhere = [choice.kind for choice in plan.request.norms if choice.everywhere and len(plan.request.norms) == 1]
    asked = [path for path in plan.converted if path not in kept] if everywhere else []
    swaps = [edit for edit in plan.edits if isinstance(edit, SwapNorm)]
    wanted = dict.fromkeys(asked, *everywhere) | {edit.module: edit.kind for edit in swaps}
    # a norm whose output or input is centred as well behaves as another kind or none; its edit has to do
    centred = {edit.module for edit in plan.edits if isinstance(edit, CentreOutput | CentreInput)}
    found = {path: spec.kind for path, spec in sites} | {e.module: e.kind for e in swaps if e.module in centred}
    for path, kind in wanted.items():
        if kind in ("layernorm", "rmsnorm") and found.get(path) != kind:
            raise VerificationError(
                f"{path} should be a {kind} now and behaves as {found.get(path, 'no norm')}: the plan "
                f"names it as converted and has no edit that does it. Nothing was published."
            )


@torch.no_grad()
def check_plain(original: nn.Module, converted: nn.Module, inputs: Mapping[str, Any], plan: Plan) -> None:
    """Both models once more, with nothing watching: torch has fused paths that it takes only then.

    Casts to float32 stay as the model has them here, so that agreement is to float32 at best.
    """
    try:
        a = outputs_of(original, inputs, False, "A")
    except ObserveError:  # in float64 its own code does not run unlifted
        original, converted = (copy.deepcopy(model).float() for model in (original, converted))
        a = outputs_of(original, inputs, False, "A")
    try:
        b = outputs_of(converted, inputs, False, "B")
    except ObserveError as error:
        raise VerificationError(
            f"original and converted run while they are watched, and the latter fails when left alone ({error}): a "
            f"fused path of the model does not work with its new norms. Nothing was changed."
        ) from error
    check_alike(a, b)
    for name in a.keys() - OtherBasis.of(plan).outputs:
        mismatched, _ = row_errors(a[name].double(), b[name].double())
        finite = a[name].isfinite() & b[name].isfinite()
        difference = (b[name] - a[name])[finite].double().norm()
        error = float(difference / a[name][finite].double().norm().clamp_min(1e-30))
        if not error <= _PLAIN_TOLERANCE or mismatched.any():
            raise VerificationError(
                f"original and converted agree while they are watched, and differ by {error:.1e} ({name}) when left "
                f"alone: a fused path of the model passes its new norms by. Nothing was changed. Replace such layers "
                f"(torch.nn.TransformerEncoderLayer is one) first."
            )


def check_files(expected: nn.Module, result: nn.Module, folder: Path) -> int:
    """The loaded folder holds the plan's results, rounded once. Returns how many tensors were compared.

    Where its files have several dtypes, loading brings them all into one.
    """
    with Checkpoint.open(folder) as checkpoint:
        stored = {info.dtype for info in checkpoint.tensors.values() if info.dtype.is_floating_point}
    want, have = expected.state_dict(), result.state_dict()
    if want.keys() != have.keys():
        odd = sorted(want.keys() ^ have.keys())
        raise VerificationError(f"the folder holds other tensors than the plan makes: {', '.join(odd[:5])}.")
    wrong = [
        name
        for name, value in have.items()
        if not any(
            torch.equal((want[name].to(dtype) if value.is_floating_point() else want[name]).to(value.dtype), value)
            for dtype in stored | {value.dtype}
        )
    ]
    if wrong:
        raise VerificationError(WRONG_FILES.format(len(wrong), wrong[0]))
    return len(want)
