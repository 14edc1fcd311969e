"""Verify: open two checkpoints, run them side by side on text, and report how far they are apart."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from normswap.checkpoint.source import Source
from normswap.errors import VerificationError
from normswap.understand.normmap import find_sites
from normswap.verification.basis import OtherBasis
from normswap.verification.generation import Generation, generated
from normswap.verification.inputs import evaluation_inputs, of_text
from normswap.verification.loaded import coarsest_dtype, tokenizer_of
from normswap.verification.metrics import Record
from normswap.verification.models import TOLERANCES, Comparison, Progress, compare_models
from normswap.verification.on_disk import open_either
from normswap.verification.outputs import Inputs
from normswap.verification.sites import SiteSpec

_SAME = OtherBasis()


class Report(Record):
    """What `verify` measured, and under which conditions.

    Attributes:
        a, b: the checkpoints, as given.
        text: where the inputs are from.
        inputs: shape of all main inputs together, `(sequences, length)` of token ids or `(images, channels, ..)`.
        stored: dtype of the weights of a and of b as stored; their rounding is part of what is measured.
        device: where both ran.
        versions: of torch and transformers.
        comparison: the measurements.
        generation: what both write after the same beginnings; of `verify` alone.
    """

    a: str
    b: str
    text: str
    inputs: tuple[int, ...]
    stored: tuple[str, str]
    device: str
    versions: dict[str, str]
    comparison: Comparison
    generation: Generation | None = None


def verify(
    a: str | Path,
    b: str | Path,
    *,
    text: str | Path | None = None,
    tokens: int = 4096,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Compare checkpoint `b` with checkpoint `a`.

    Args:
        a, b: folders or Hub ids, of one vocabulary; folders that normswap wrote, or stock ones.
        text: a UTF-8 file to compare on; by default the text that comes with normswap.
        tokens: how many to run, in windows of up to 1024, or as many as the model has positions.
        dtype: what both compute in. Default: float64, or float32 when weights are stored in half precision (whose
            rounding is then the larger by far).
        device: default: a GPU if there is one.
        trust_remote_code: whether code that comes with the checkpoints may run.
        progress: called with (batches done, batches).

    Raises:
        SourceError: a checkpoint or the text cannot be read, or the vocabularies differ.
        ObserveError: a model cannot be run.
        VerificationError: the models cannot be compared.
    """
    sources = [Source.open(name, trust_remote_code=trust_remote_code) for name in (a, b)]
    _check_vocabularies(*sources)
    place = str(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    tokenizer = tokenizer_of(sources[0])
    plans = [source.record.plan for source in sources if source.record is not None]
    turned, basis = (OtherBasis.of(source.record and source.record.plan) for source in sources)
    with ExitStack() as opened:
        found = [open_either(source, opened, in_memory=place != "cpu") for source in sources]
        stored = [coarsest_dtype(each.like) for each in found]
        halves = any(torch.finfo(dtype).bits < 32 for dtype in stored)
        run = _parse_dtype(dtype) or (torch.float32 if halves else torch.float64)
        models = [each.model(run) for each in found]
        _place([model for model, each in zip(models, found, strict=True) if not each.on_disk], place, run)
        batches, shape, described = evaluation_inputs(
            models[0] if not found[0].on_disk else found[0].like, tokenizer, text, tokens, runs=not found[0].on_disk
        )
        report = report_on(
            (str(a), str(b)),
            models,
            [find_sites(each.like) for each in found],
            batches,
            shape=shape,
            text=described,
            stored=stored,
            moved=set().union(*(plan.moved_norms() for plan in plans), turned.sites, turned.hidden, basis.hidden),
            basis=basis,
            decode=None if tokenizer is None else tokenizer.decode,
            progress=progress,
        )
        on_disk = any(each.on_disk for each in found)
        return report.model_copy(update={"generation": generated(*models, tokenizer, batches, on_disk=on_disk)})


def report_on(
    names: tuple[str, str],
    models: Sequence[nn.Module],
    sites: Sequence[Sequence[SiteSpec]],
    batches: Sequence[Inputs],
    *,
    shape: tuple[int, ...],
    text: str,
    stored: Sequence[torch.dtype],
    moved: Collection[str] = (),
    basis: OtherBasis = _SAME,
    decode: Callable[[list[int]], str] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Compare two models, each in eval mode, as `compare_models` does, and note the conditions beside the result.

    Args:
        names, models, sites: of A and of B.
        batches, shape, text: as `evaluation_inputs` gives them.
        stored: the coarsest dtype among the stored weights of each; what counts as rounding follows from it and from
            the dtype the models compute in.
        moved, basis, decode, progress: as for `compare_models`.
    """
    run = coarsest_dtype(models[0])
    comparison = compare_models(
        *models,
        batches,
        *sites,
        moved=moved,
        basis=basis,
        tolerance=max(TOLERANCES[found] for found in (*stored, run)),
        decode=decode,
        progress=progress,
    )
    return Report(
        a=names[0],
        b=names[1],
        text=text,
        inputs=shape,
        stored=tuple(str(found).removeprefix("torch.") for found in stored),
        device=str(next(models[0].parameters()).device),
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
        comparison=comparison,
    )


def _place(models: list[PreTrainedModel], device: str | torch.device, dtype: torch.dtype) -> None:
    """Move the models, in place."""
    try:
        device = torch.device(device)
        for model in models:
            model.to(device, dtype)
    except (RuntimeError, AssertionError, TypeError) as error:  # no such device, no memory left, no float64 there
        raise VerificationError(
            f"the models cannot be put on {device} in {dtype}: {error}. Name another device, or a smaller dtype."
        ) from error


def _check_vocabularies(a: Source, b: Source) -> None:
    sizes = [_vocabulary(source) for source in (a, b)]
    if sizes[0] != sizes[1]:
        raise VerificationError(
            f"expected two checkpoints of one vocabulary, found {sizes[0]} tokens in {a.name} and {sizes[1]} in "
            f"{b.name}. Compare a checkpoint with one that was made from it."
        )


def _vocabulary(source: Source) -> int | None:
    return of_text(source.config, "vocab_size")


def _parse_dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    found = getattr(torch, name, None) if isinstance(name, str) else name
    if name is not None and found not in TOLERANCES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in TOLERANCES)
        raise VerificationError(f"dtype must be one of {known}, found {name!r}.")
    return found
