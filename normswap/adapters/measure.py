"""An adapter on its base against the converted one on the converted base, before either is published.

1. The mathematics: both in float64 (float32 where the model's code does not run so), the plan and the adapter as they
   are computed, not yet rounded. A plan that claims to be exact must agree to rounding.
2. As stored: the unpublished folder and the adapter's file, as PEFT loads them, computed in the same precision.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from normswap.adapters.carry import Carried
from normswap.adapters.slots import NAME, put_on
from normswap.apply.live import apply_plan
from normswap.calibration.data import Progress
from normswap.checkpoint.source import Source
from normswap.errors import ObserveError, RefusedError, VerificationError
from normswap.planning.plans import Plan
from normswap.verification.basis import OtherBasis
from normswap.verification.inputs import evaluation_inputs
from normswap.verification.loaded import open_model, tokenizer_of
from normswap.verification.metrics import Record
from normswap.verification.models import TOLERANCES
from normswap.verification.opened import open_published
from normswap.verification.outputs import Inputs, Outputs, check_alike, outputs_of, row_errors
from normswap.verification.proof import VerifyMode
from normswap.verification.text import MEASURED, WHOLE

#: how many tokens are run; each output is kept until its counterpart comes
_TOKENS = {"full": 512, "fast": 256}


class AdapterProof(Record):
    """What was measured of one adapter. Errors are of the worst row of any output, relative (`row_errors`).

    Attributes:
        effect: how far the adapter takes the base's outputs: what an error of it would look like.
        error: base and adapter against converted base and converted adapter.
        stored: the same of the files; with `full` only.
        dtype: what was computed in.
        rows: how many rows of outputs were compared.
    """

    effect: float
    error: float
    stored: float | None = None
    dtype: str
    rows: int


def measure(
    source: Source,
    plan: Plan,
    folder: Path,
    carried: Sequence[Carried],
    places: Mapping[str, Path],
    mode: VerifyMode,
    text: str | Path | None,
    progress: Progress,
) -> dict[str, AdapterProof]:
    """Measure every adapter, by name; nothing with `none`.

    Args:
        folder: the unpublished result.
        places: where in it the adapters are, by name.

    Raises:
        VerificationError: an exact plan, and an adapter that does something else on it.
        RefusedError: an adapter that does not run on the source either.
    """
    if mode == "none" or not carried:
        return {}
    model = open_model(source)
    tokenizer = tokenizer_of(source)
    part = MEASURED if plan.calibrated_on and (text is not None or tokenizer is None) else WHOLE
    batches, _, _ = evaluation_inputs(model, tokenizer, text, _TOKENS[mode], part)
    turned = OtherBasis.of(plan).outputs
    steps = [0, len(carried) * (2 + (mode == "full"))]

    def ran(on: nn.Module) -> list[Outputs]:
        progress("measuring adapters", steps[0], steps[1])
        steps[0] += 1
        return [outputs_of(on, batch, dtype == torch.float64, "with an adapter") for batch in batches]

    dtype, plain = _plain(model, batches)
    found, wanted = {}, {}
    for one in carried:
        with adapted(model, one.adapter.config, one.before, one) as with_it:
            try:
                wanted[one.adapter.name] = ran(with_it)
            except ObserveError as error:
                raise RefusedError(f"the adapter {one.adapter.name} does not run on its own base: {error}") from error
    apply_plan(model, plan)
    for one in carried:
        name = one.adapter.name
        with adapted(model, one.config, one.tensors, one) as with_it:
            error, rows = _apart(wanted[name], ran(with_it), turned)
        if plan.claim == "exact" and not error <= TOLERANCES[dtype]:
            raise VerificationError(
                f"the adapter {name} does something else on the converted model: a relative error of {error:.1e} "
                f"(tolerance {TOLERANCES[dtype]:.0e} in {dtype}), and the plan claims to be exact. Nothing was "
                f"published. Please report the model and the adapter: this is a fault of normswap."
            )
        effect, _ = _apart(plain, wanted[name], turned)
        found[name] = AdapterProof(effect=effect, error=error, dtype=str(dtype).removeprefix("torch."), rows=rows)
    del model
    if mode == "full":
        for name, proof in found.items():
            error, _ = _apart(wanted[name], ran(_as_stored(source, plan, folder, places[name], dtype)), turned)
            found[name] = proof.model_copy(update={"stored": error})
    progress("measuring adapters", steps[1], steps[1])
    return found


def _plain(model: nn.Module, batches: Sequence[Inputs]) -> tuple[torch.dtype, list[Outputs]]:
    """The base's own outputs, and the precision in which its code runs; the model is left in that."""
    for dtype in (torch.float64, torch.float32):
        model.to(dtype)
        try:
            return dtype, [outputs_of(model, batch, dtype == torch.float64, "A") for batch in batches]
        except ObserveError:
            if dtype == torch.float32:
                raise
    raise AssertionError("unreachable")


@contextmanager
def adapted(model: nn.Module, config: Mapping, tensors: Mapping[str, torch.Tensor], one: Carried):
    """`model` with an adapter while the block runs, and as it was after that."""
    from peft import set_peft_model_state_dict

    held = model.state_dict()
    overwritten = {name: held[name].clone() for name in one.replaced if name in held}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model = put_on(model, config, one.adapter.name)
        # PEFT makes adapters in the base's precision; a copy, for it takes keys out
        loaded = set_peft_model_state_dict(peft_model, dict(tensors), adapter_name=NAME)
    _check_loaded(loaded.missing_keys, loaded.unexpected_keys, one.adapter.name)
    try:
        yield peft_model.get_base_model()
    finally:
        peft_model.unload()
        held = model.state_dict()
        for name, tensor in overwritten.items():
            held[name].copy_(tensor)


def _as_stored(source: Source, plan: Plan, folder: Path, place: Path, dtype: torch.dtype) -> nn.Module:
    from peft import PeftModel

    result = open_published(folder, plan, source.model_class).to(dtype)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loaded = PeftModel.from_pretrained(result, str(place), autocast_adapter_dtype=False)
    if lacking := [str(warning.message) for warning in said if "missing adapter keys" in str(warning.message)]:
        raise VerificationError(f"the adapter in {place.name} does not load: {lacking[0]:.300}. Nothing was published.")
    return loaded.get_base_model().eval()


def _check_loaded(missing: Sequence[str], unexpected: Sequence[str], name: str) -> None:
    lacking = [key for key in missing if f".{NAME}." in f".{key}."]
    if odd := [*lacking, *unexpected]:
        raise VerificationError(f"the adapter {name} does not load as it was made: {odd[0]}. Nothing was published.")


def _apart(a: Sequence[Outputs], b: Sequence[Outputs], without: frozenset[str]) -> tuple[float, int]:
    """The largest error of a row over all outputs and batches, and how many rows there were."""
    worst, rows = 0.0, 0
    for one, other in zip(a, b, strict=True):
        check_alike(one, other)
        for name in one.keys() - without:
            mismatched, errors = row_errors(one[name].double(), other[name].double())
            rows += len(errors)
            worst = max(worst, errors.max().item() if len(errors) else 0.0, float("inf") if mismatched.any() else 0.0)
    if not rows:
        raise VerificationError("the model gives nothing out by which its adapters could be measured.")
    return worst, rows
