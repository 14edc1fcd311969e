"""The measurements that stand between a conversion and its publication.

1. The mathematics: original and converted model in float64, inner casts lifted, on text. An exact plan must agree to
   rounding in the output and in what reaches every norm.
2. The files: the published folder, loaded as a user's process would load it, must hold bit for bit the float64 result
   rounded once to the stored dtype.
3. The cost: the published model against the original, both as stored, which is what rounding does to a half-precision
   checkpoint. Where the dtypes differ both compute in the wider one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from normswap.checkpoint.source import Source
from normswap.errors import ObserveError
from normswap.planning.plans import Plan
from normswap.understand.normmap import find_sites
from normswap.verification.basis import OtherBasis
from normswap.verification.checks import check_exact, check_kinds, check_plain, sites_now
from normswap.verification.generation import Generation, generated
from normswap.verification.inputs import evaluation_inputs
from normswap.verification.loaded import coarsest_dtype, tokenizer_of
from normswap.verification.metrics import Record
from normswap.verification.opened import Opened, open_both
from normswap.verification.placement import check_moved
from normswap.verification.run import Report, report_on
from normswap.verification.text import MEASURED, WHOLE

Progress = Callable[[str, int, int], None]
VerifyMode = Literal["full", "fast", "none"]
TOKENS = {"full": 4096, "fast": 512}
#: of a model that is read from disk as it runs, every part of which takes longer
TOKENS_ON_DISK = {"full": 4096, "fast": 128}


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
    with ExitStack() as opened:
        return _prove(source, plan, open_both(source, plan, folder, opened), mode, text, progress)


def _prove(
    source: Source, plan: Plan, models: Opened, mode: VerifyMode, text: str | Path | None, progress: Progress
) -> Proof:
    tokenizer = tokenizer_of(source)
    # what a plan was calibrated on is nothing to measure it on
    part = MEASURED if plan.calibrated_on and (text is not None or tokenizer is None) else WHOLE
    tokens = (TOKENS_ON_DISK if models.on_disk else TOKENS)[mode]
    batches, shape, described = evaluation_inputs(
        models.structures[0], tokenizer, text, tokens, part, runs=not models.on_disk
    )
    if text is not None and tokenizer is not None:
        described = Path(text).name  # of the user's folders nothing is published
    sites = find_sites(models.structures[0]), sites_now(models.structures[1])
    check_kinds(sites[1], plan)
    check_moved(*models.structures, plan)

    def measure(what: str, pair: tuple[nn.Module, nn.Module], dtypes: Sequence[torch.dtype]) -> Report:
        return report_on(
            (source.title, "the converted folder"),
            pair,
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

    dtypes = [coarsest_dtype(model) for model in models.structures]
    stored = writing = None
    if mode == "full":
        pair = models.as_stored(torch.promote_types(*dtypes))
        stored = measure("comparing as stored", pair, dtypes)
        writing = generated(*pair, tokenizer, batches, on_disk=models.on_disk)
        del pair
    mathematics, run = _mathematics(models, measure)
    checked = models.check_files()
    if plan.claim == "exact":
        check_exact(mathematics)
        # the published class on the unrounded weights: what it decides from its configuration counts too
        check_plain(*models.left_alone(run), batches[0], plan)
    return Proof(
        mode=mode,
        claim=plan.claim,
        mathematics=mathematics,
        stored=stored,
        tensors_checked=checked,
        generation=writing,
    )


def _mathematics(models: Opened, measure) -> tuple[Report, torch.dtype]:
    """Original and plan in float64, or in float32 where the model's code does not run in float64."""
    for dtype in (torch.float64, torch.float32):
        try:
            return measure("proving", models.mathematics(dtype), (dtype, dtype)), dtype
        except ObserveError:
            if dtype == torch.float32:
                raise
    raise AssertionError("unreachable")
