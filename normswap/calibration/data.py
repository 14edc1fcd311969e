"""What a plan is calibrated on: text for a checkpoint, batches of the user's for a live model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from normswap.checkpoint.source import Source
from normswap.errors import RefusedError
from normswap.observe.run import make_eager
from normswap.verification.inputs import RANDOM, evaluation_inputs
from normswap.verification.loaded import open_model, tokenizer_of
from normswap.verification.text import CALIBRATED, MEASURED, WHOLE, calibration_text
from normswap.verification.text import read as read_text

Batches = Sequence[Mapping[str, Any]]
#: called with (what is being done, how much of it is done, how much there is)
Progress = Callable[[str, int, int], None]

#: tokens to calibrate on, and to measure the cost of a move on, where nobody says how many
TOKENS, COST_TOKENS = 8192, 2048
#: of how many tokens a window of text to calibrate on is, at most
WINDOW = 256


@dataclass(frozen=True)
class Data:
    """What a plan is calibrated on.

    Attributes:
        model: the original, with its weights, in eval mode; it is not changed.
        batches: keyword arguments of `forward` to fit on.
        measured: others, to measure the cost of moves on.
        described: what the batches are, in words.
        random: whether they are no data, but inputs drawn at random.
        progress: called with (what, done, total).
        refit: whether what writes to a stream may be fitted as well. Not where the original norms stay beside the new
            ones, and are to read what they read.
    """

    model: nn.Module
    batches: Batches
    measured: Batches
    described: str
    progress: Progress
    random: bool = False
    refit: bool = True

    def counts(self, what: str) -> Callable[[int, int], None]:
        """Reports the progress of one thing."""
        return lambda done, total: self.progress(what, done, total)


def text_data(
    source: Source, text: str | Path | None, tokens: int, window: int, progress: Progress | None
) -> Callable[[], Data]:
    """Reads what to calibrate on: the weights, and a part of the text that nothing is measured on."""
    if text is not None:
        read_text(text)  # a wrong path is found out now

    def read() -> Data:
        model, tokenizer = open_model(source), tokenizer_of(source)
        # the texts that come with normswap are two, one's own is divided
        shipped = text is None and tokenizer is not None
        fitted_on, part = (calibration_text(), WHOLE) if shipped else (text, CALIBRATED)
        batches, _, described = evaluation_inputs(model, tokenizer, fitted_on, tokens, part, window)
        measured, _, _ = evaluation_inputs(model, tokenizer, text, COST_TOKENS, WHOLE if shipped else MEASURED)
        described = "shipped Shakespeare" if shipped else described
        if text is not None and tokenizer is not None:
            described = Path(text).name  # of the user's folders nothing is published
        count = sum(batch["input_ids"].numel() for batch in batches if "input_ids" in batch)
        described = f"{count} tokens of {described}" if count else described
        return Data(model, batches, measured, described, progress or silent, described.startswith(RANDOM))

    return read


def given_data(model: nn.Module, batches: Sequence[Mapping[str, Any]], progress: Progress | None) -> Callable[[], Data]:
    """A live model and batches to calibrate on."""
    if len(batches) < 2:
        raise RefusedError(f"expected two batches or more, the last of them to measure on; found {len(batches)}.")

    def read() -> Data:
        twin = copy.deepcopy(model).eval()
        make_eager(twin)
        return Data(twin, batches[:-1], batches[-1:], f"{len(batches) - 1} batches", progress or silent)

    return read


def silent(what: str, done: int, total: int) -> None:
    """Reports to nobody."""
