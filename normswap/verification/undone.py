"""The measurements that stand between an undone conversion and its publication."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from normswap.checkpoint.source import Source
from normswap.errors import VerificationError
from normswap.observe.run import make_eager
from normswap.planning.plans import Plan
from normswap.understand.normmap import find_sites
from normswap.verification.basis import OtherBasis
from normswap.verification.checks import check_files
from normswap.verification.inputs import evaluation_inputs
from normswap.verification.proof import TOKENS, Progress, Proof, VerifyMode
from normswap.verification.run import Report, coarsest_dtype, open_model, report_on, tokenizer_of
from normswap.verification.text import WHOLE


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
