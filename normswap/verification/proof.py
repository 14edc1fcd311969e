"""The measurements that stand between a conversion and its publication.

1. The mathematics: original and converted model in float64, inner casts lifted, on text. An exact plan must agree to
   rounding in the output and in what reaches every norm.
2. The files: the published folder, loaded as a user's process would load it, must hold bit for bit the float64 result
   rounded once to the stored dtype.
3. The cost: the published model against the original, both as stored, which is what rounding does to a half-precision
   checkpoint. Where the dtypes differ both compute in the wider one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from normswap.apply.live import apply_plan
from normswap.apply.modelling import load_generated
from normswap.checkpoint.source import Source
from normswap.errors import ObserveError, RefusedError, SourceError, VerificationError
from normswap.observe.inputs import example_inputs
from normswap.observe.run import make_eager
from normswap.planning.edits import CentreInput, CentreOutput, SwapNorm
from normswap.planning.plans import Plan
from normswap.understand.normmap import find_sites
from normswap.verification.basis import OtherBasis
from normswap.verification.generation import Generation, generated
from normswap.verification.inputs import evaluation_inputs, redrawn
from normswap.verification.metrics import Record
from normswap.verification.models import TOLERANCES, Comparison, compare_models
from normswap.verification.outputs import check_alike, outputs_of, row_errors
from normswap.verification.placement import check_moved
from normswap.verification.run import Report, coarsest_dtype, open_model, report_on, tokenizer_of
from normswap.verification.sites import SiteSpec
from normswap.verification.text import MEASURED, WHOLE

Progress = Callable[[str, int, int], None]
# float32 casts inside float64 models, over many layers
_PLAIN_TOLERANCE = 1e-3
VerifyMode = Literal["full", "fast", "none"]
TOKENS = {"full": 4096, "fast": 512}


class Proof(Record):
    """What was measured of a conversion.

    Attributes:
        mode: how much was asked for; with `none` everything else is empty.
        claim: what the plan promises.
        mathematics: original and plan in float64 (float32 if the model cannot run in float64).
        stored: original and published folder as stored; with `full` only.
        tensors_checked: tensors of the folder that are the plan's results bit for bit.
        generation: what original and published folder write after the same beginnings; with `full` only.
    """

    mode: Literal["full", "fast", "none"]
    claim: str
    mathematics: Report | None = None
    stored: Report | None = None
    tensors_checked: int = 0
    generation: Generation | None = None

    def without_text(self) -> dict[str, Any]:
        """All numbers as plain data, without the fragments of text that models were measured on and wrote."""
        return _without(self.model_dump(mode="json"), _TEXTS)


#: keys of a report that hold text
_TEXTS = {"before", "token", "after", "chosen_a", "chosen_b", "prompt", "same", "text_a", "text_b"}


def _without(tree: Any, keys: set[str]) -> Any:
    if isinstance(tree, dict):
        return {key: _without(value, keys) for key, value in tree.items() if key not in keys}
    return [_without(value, keys) for value in tree] if isinstance(tree, list) else tree


def prove(
    source: Source,
    plan: Plan,
    folder: Path,
    mode: Literal["full", "fast", "none"],
    text: str | Path | None,
    progress: Progress,
) -> Proof:
    """Measure the unpublished `folder` against its source.

    Raises:
        VerificationError: an exact claim that is not met, or files that are not what the plan makes.
    """
    if mode == "none":
        return Proof(mode="none", claim=plan.claim)
    original, result = open_model(source), open_published(folder, plan, source.model_class)
    tokenizer = tokenizer_of(source)
    # what a plan was calibrated on is nothing to measure it on
    part = MEASURED if plan.calibrated_on and (text is not None or tokenizer is None) else WHOLE
    batches, shape, described = evaluation_inputs(original, tokenizer, text, TOKENS[mode], part)
    if text is not None and tokenizer is not None:
        described = Path(text).name  # of the user's folders nothing is published
    names = source.title, "the converted folder"

    sites = find_sites(original), _sites_now(result)
    _check_kinds(sites[1], plan)
    check_moved(original, result, plan)

    def measure(what: str, a: nn.Module, b: nn.Module, dtypes: Sequence[torch.dtype]) -> Report:
        return report_on(
            names,
            (a, b),
            sites,
            batches,
            shape=shape,
            text=described,
            stored=dtypes,
            moved=plan.moved_norms(),
            basis=OtherBasis.of(plan),
            decode=None if tokenizer is None else tokenizer.decode,
            progress=lambda done, total: progress(what, done, total),
        )

    dtypes = [coarsest_dtype(model) for model in (original, result)]
    stored = writing = None
    if mode == "full":
        run = torch.promote_types(*dtypes)
        wide = [m if d == run else copy.deepcopy(m).to(run) for m, d in zip((original, result), dtypes, strict=True)]
        stored = measure("comparing as stored", *wide, dtypes)
        writing = generated(*wide, tokenizer, batches)
        del wide
    mathematics, converted = _mathematics(original, plan, measure)
    checked = check_files(converted, result)
    if plan.claim == "exact":
        _check_exact(mathematics)
        # the published class on the unrounded weights: what it decides from its configuration counts too
        result.to(coarsest_dtype(original)).load_state_dict(converted.state_dict())
        _check_plain(original, result, batches[0], plan)
    return Proof(
        mode=mode,
        claim=plan.claim,
        mathematics=mathematics,
        stored=stored,
        tensors_checked=checked,
        generation=writing,
    )


def _mathematics(original: PreTrainedModel, plan: Plan, measure) -> tuple[Report, PreTrainedModel]:
    """Original and plan in float64, or in float32 where the model's code does not run in float64."""
    for dtype in (torch.float64, torch.float32):
        original = original.to(dtype)
        converted = apply_plan(copy.deepcopy(original), plan)
        try:
            return measure("proving", original, converted, (dtype, dtype)), converted
        except ObserveError:
            if dtype == torch.float32:
                raise
    raise AssertionError("unreachable")


def _sites_now(converted: nn.Module, inputs: Mapping[str, Any] | None = None) -> list[SiteSpec]:
    """The norms of a converted model, which has to run for that. Raises RefusedError where it does not."""
    try:
        return find_sites(converted, inputs)
    except ObserveError as error:
        raise RefusedError(
            f"the converted {type(converted).__name__} does not run, while the original does: {error} The model's own "
            f"code wants something of its norms that the new ones do not have (a weight, for its dtype): leave out "
            f"--fold, or ask for --fold alone, which keeps neutral parameters. Nothing was changed."
        ) from error


def _check_exact(report: Report) -> None:
    found = report.comparison
    if found.first_divergence is not None:
        error = found.output.error
        raise VerificationError(
            f"the plan claims to be exact and is not: original and converted part at {found.first_divergence} "
            f"(tolerance {found.tolerance:.0e} in {found.dtype}; worst relative error of the output "
            f"{error.max if error else float('nan'):.1e}). Nothing was published. Please report the model: this is a "
            f"fault of normswap."
        )


def _check_kinds(sites: Sequence[SiteSpec], plan: Plan) -> None:
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
def _check_plain(original: nn.Module, converted: nn.Module, inputs: Mapping[str, Any], plan: Plan) -> None:
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


def check_files(expected: nn.Module, result: nn.Module) -> int:
    """The loaded folder holds the plan's results, rounded once. Returns how many tensors were compared."""
    want, have = expected.state_dict(), result.state_dict()
    if want.keys() != have.keys():
        odd = sorted(want.keys() ^ have.keys())
        raise VerificationError(f"the folder holds other tensors than the plan makes: {', '.join(odd[:5])}.")
    wrong = [name for name in want if not torch.equal(want[name].to(have[name].dtype), have[name])]
    if wrong:
        raise VerificationError(
            f"{len(wrong)} tensors of the folder are not what the plan makes of the source, {wrong[0]} among them. "
            f"Nothing was published. Please report the checkpoint: this is a fault of normswap."
        )
    return len(want)


def open_published(folder: Path, plan: Plan, stock: type[PreTrainedModel]) -> PreTrainedModel:
    """The folder's model by the class that a user's process would take, weights as stored; `stock` is the source's."""
    cls = load_generated(folder) if plan.module_edits() else stock
    model, info = cls.from_pretrained(folder, dtype="auto", attn_implementation="eager", output_loading_info=True)
    missing = sorted(info["missing_keys"])
    if missing:
        raise SourceError(
            f"the converted folder lacks {len(missing)} tensors its class needs: {', '.join(missing[:3])}."
        )
    make_eager(model)
    return model.eval()


def prove_undone(
    source: Source, back: Plan, folder: Path, mode: VerifyMode, text: str | Path | None, progress: Progress
) -> Proof:
    """Measure the unpublished `folder`, of the stock class, against the converted checkpoint it is made from.

    Args:
        back: the edits that lead from one to the other.

    Raises:
        VerificationError: they do not compute the same, as after a training that the stock class cannot express; or
            the files are not what the edits make.
    """
    if mode == "none":
        return Proof(mode="none", claim="exact")
    converted = open_model(source)
    result, info = source.model_class.from_pretrained(
        folder, dtype="auto", attn_implementation="eager", output_loading_info=True
    )
    if missing := sorted(info["missing_keys"]):
        raise VerificationError(f"undoing leaves out {', '.join(missing[:3])}. Nothing was published.")
    make_eager(result.eval())
    tokenizer = tokenizer_of(source)
    batches, shape, described = evaluation_inputs(converted, tokenizer, text, TOKENS[mode], WHOLE)
    # the stock class first: of norms that see less of their input than others, what they see is compared
    sites = find_sites(result), find_sites(converted)

    turned = OtherBasis.of(source.record.plan)

    def measure(what: str, a: nn.Module, b: nn.Module, dtypes: Sequence[torch.dtype]) -> Report:
        return report_on(
            ("the folder made of it", source.title),
            (a, b),
            sites,
            batches,
            shape=shape,
            text=Path(text).name if text is not None and tokenizer is not None else described,
            stored=dtypes,
            moved=source.record.plan.moved_norms() | turned.hidden,
            basis=turned,
            progress=lambda done, total: progress(what, done, total),
        )

    dtypes = [coarsest_dtype(model) for model in (result, converted)]
    stored = measure("comparing as stored", result, converted, dtypes) if mode == "full" else None
    # the converted weights were rounded, and a mean of a rounding's size is one that RMSNorm sees
    wide = _edited(converted.double(), copy.deepcopy(result).double(), back)
    mathematics = measure("proving", wide, converted, dtypes)
    if (at := mathematics.comparison.first_divergence) is not None:
        raise VerificationError(
            f"{source.name} as it is now cannot be undone: the {source.model_class.__name__} made of it computes "
            f"something else, from {at} on. Was it trained after it was converted? Nothing was published."
        )
    return Proof(
        mode=mode, claim="exact", mathematics=mathematics, stored=stored, tensors_checked=check_files(wide, result)
    )


@torch.no_grad()
def _edited(converted: nn.Module, stock: nn.Module, back: Plan) -> nn.Module:
    """`stock`, with the tensors that the edits make of those of `converted`."""
    theirs, edits = converted.state_dict(), back.tensor_edits()
    read = back.reading(lambda name: theirs[name].double())
    for name, own in stock.state_dict().items():
        value = theirs.get(name)
        for edit in edits.get(name, ()):
            value = edit.apply(value, read)
        if value is not None:  # of a tie that was given up, the stock class has one parameter again
            own.copy_(value)
    return stock


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
    now = _sites_now(converted, batches[0])
    _check_kinds(now, plan)
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
        _check_plain(original, converted, batches[0], plan)
    return comparison
