"""The measurements that stand between an undone conversion and its publication."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from normswap.checkpoint.source import Source
from normswap.errors import VerificationError
from normswap.observe.run import make_eager
from normswap.planning.plans import Plan
from normswap.understand.normmap import find_sites
from normswap.verification.basis import OtherBasis
from normswap.verification.checks import check_files
from normswap.verification.inputs import evaluation_inputs
from normswap.verification.loaded import coarsest_dtype, open_model, tokenizer_of
from normswap.verification.on_disk import FromDisk, is_large
from normswap.verification.proof import TOKENS, TOKENS_ON_DISK, Progress, Proof, VerifyMode
from normswap.verification.run import Report, report_on
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
    with ExitStack() as opened:
        kind = _OnDisk if is_large(source) else _InMemory
        return _prove(source, kind(source, back, folder, opened), mode, text, progress)


def _prove(source: Source, models: _InMemory | _OnDisk, mode: VerifyMode, text, progress: Progress) -> Proof:
    tokenizer = tokenizer_of(source)
    # the stock class first: of norms that see less of their input than others, what they see is compared
    result, converted = models.structures
    tokens = (TOKENS_ON_DISK if models.on_disk else TOKENS)[mode]
    batches, shape, described = evaluation_inputs(converted, tokenizer, text, tokens, WHOLE, runs=not models.on_disk)
    sites = find_sites(result), find_sites(converted)
    turned = OtherBasis.of(source.record.plan)

    def measure(what: str, pair: tuple[nn.Module, nn.Module], dtypes: Sequence[torch.dtype]) -> Report:
        return report_on(
            ("the folder made of it", source.title),
            pair,
            sites,
            batches,
            shape=shape,
            text=Path(text).name if text is not None and tokenizer is not None else described,
            stored=dtypes,
            moved=source.record.plan.moved_norms() | turned.hidden,
            basis=turned,
            progress=lambda done, total: progress(what, done, total),
        )

    dtypes = [coarsest_dtype(model) for model in models.structures]
    stored = measure("comparing as stored", models.as_stored(), dtypes) if mode == "full" else None
    # the converted weights were rounded, and a mean of a rounding's size is one that RMSNorm sees
    mathematics = measure("proving", models.mathematics(), dtypes)
    if (at := mathematics.comparison.first_divergence) is not None:
        raise VerificationError(
            f"{source.name} as it is now cannot be undone: the {source.model_class.__name__} made of it computes "
            f"something else, from {at} on. Was it trained after it was converted? Nothing was published."
        )
    checked = models.check_files()
    return Proof(mode=mode, claim="exact", mathematics=mathematics, stored=stored, tensors_checked=checked)


class _InMemory:
    """The folder made of a converted one, and that one, loaded by transformers."""

    on_disk = False

    def __init__(self, source: Source, back: Plan, folder: Path, opened: ExitStack):
        self._converted, self._result, self._back = open_model(source), _stock(source, folder), back
        self._folder = folder
        self.structures = self._result, self._converted

    def as_stored(self) -> tuple[nn.Module, nn.Module]:
        return self._result, self._converted

    def mathematics(self) -> tuple[nn.Module, nn.Module]:
        self._wide = _edited(self._converted.double(), copy.deepcopy(self._result).double(), self._back)
        return self._wide, self._converted

    def check_files(self) -> int:
        return check_files(self._wide, self._result, self._folder)


class _OnDisk:
    """Both read from their files as they run."""

    on_disk = True

    def __init__(self, source: Source, back: Plan, folder: Path, opened: ExitStack):
        self._converted = FromDisk(open_model(source, device_map="meta"), source.folder, opened)
        self._result = FromDisk(_stock(source, folder, device_map="meta"), folder, opened)
        self._planned = self._converted.planned(back)
        self.structures = self._result.like, self._converted.like

    def as_stored(self) -> tuple[nn.Module, nn.Module]:
        return tuple(each.model(coarsest_dtype(each.like)) for each in (self._result, self._converted))

    def mathematics(self) -> tuple[nn.Module, nn.Module]:
        converted = self._converted
        return self._result.model(torch.float64, self._planned), converted.model(torch.float64, converted.stored)

    def check_files(self) -> int:
        return self._result.check(self._planned)


def _stock(source: Source, folder: Path, **options: Any) -> PreTrainedModel:
    """The folder's model, of the source's class. Raises VerificationError where a tensor is missing."""
    result, info = source.model_class.from_pretrained(
        folder, dtype="auto", attn_implementation="eager", output_loading_info=True, **options
    )
    if missing := sorted(info["missing_keys"]):
        raise VerificationError(f"undoing leaves out {', '.join(missing[:3])}. Nothing was published.")
    make_eager(result)
    return result.eval()


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
