"""What models are compared on: batches of token ids, from text where there is a tokenizer."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import NamedTuple

import torch

from normswap.errors import SourceError

# Logits of one batch are held for two models in float64; this many values take 64 MiB each.
_MAX_LOGITS = 2**23
# A window is not cut below this: a short text says little.
_LEAST_TOKENS = 64
# Rows of a batch, or more where they are short.
_MAX_BATCH, _MAX_TOKENS = 8, 2048
_SEED = 0


class Batches(NamedTuple):
    """Token ids to run models on.

    Attributes:
        ids: LongTensors of shape `(batch, length)`; the last may have fewer rows.
        source: where the ids are from, in words.
    """

    ids: list[torch.Tensor]
    source: str


#: the part of a text that is kept for measuring where something is calibrated on the rest
MEASURED, CALIBRATED = (0.0, 0.25), (0.25, 1.0)
WHOLE = (0.0, 1.0)


def most_tokens(vocabulary: int) -> int:
    """How long a window may be for the logits of one to stay within what a batch may take."""
    return max(_LEAST_TOKENS, _MAX_LOGITS // vocabulary)


def batches(
    tokenizer,
    text_file: str | Path | None,
    vocab_size: int,
    length: int,
    count: int,
    part: tuple[float, float] = WHOLE,
    spread: bool = False,
) -> Batches:
    """The first `count` windows of `length` tokens of a text, without overlap; or as many at even distances.

    Special tokens that the tokenizer puts around a text are put around each window, as models meet them.
    A text with fewer than `count` windows gives those it has.

    Args:
        tokenizer: of the model, or None: ids are then drawn uniformly by a seeded generator.
        text_file: UTF-8 text; None takes the text that comes with normswap (about 32 KB of Shakespeare).
        vocab_size: ids must lie below it.
        length: tokens in a window, special ones included; at most what the model's positions allow.
        count: windows wanted.
        part: of the text, from where to where; of random ids, parts are other draws.
        spread: take windows from all over that part and not from its beginning.

    Raises:
        SourceError: the text cannot be read, is shorter than one window, or is given without a tokenizer; or the
            tokenizer is of another vocabulary.
    """
    if tokenizer is None:
        if text_file is not None:
            raise SourceError(
                f"{text_file} was given to compare on, but the checkpoint has no tokenizer to read it with. "
                f"Expected tokenizer.json or alike beside config.json; add it, or leave the text out for random ids."
            )
        seed = _SEED + int(100 * part[0])
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randint(vocab_size, (count, length), generator=generator)
        return Batches(_split(rows, vocab_size), f"random ids (no tokenizer), seed {seed}")

    text, name = read(text_file)
    text = text[int(part[0] * len(text)) : int(part[1] * len(text))]
    rows = _windows(tokenizer, text, name, length, count, spread)
    if int(rows.max()) >= vocab_size:
        raise SourceError(
            f"the tokenizer gives id {int(rows.max())} on {name}, but the model has {vocab_size} tokens: they do not "
            f"belong together. Put the model's own tokenizer files beside its config.json."
        )
    return Batches(_split(rows, vocab_size), name)


def calibration_text() -> Path:
    """The text to calibrate on that comes with normswap: other pages of Shakespeare than the text to measure on."""
    return Path(str(resources.files("normswap").joinpath("data/calibration.txt")))


def read(text_file: str | Path | None) -> tuple[str, str]:
    """A text and its name; None is the text that comes with normswap. Raises SourceError when it cannot be read."""
    if text_file is None:
        return resources.files("normswap").joinpath("data/shakespeare.txt").read_text("utf-8"), "shipped Shakespeare"
    try:
        return Path(text_file).read_text("utf-8"), str(text_file)
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{text_file} cannot be read as UTF-8 text: {error}. Give a plain text file.") from error


def _windows(tokenizer, text: str, name: str, length: int, count: int, spread: bool) -> torch.Tensor:
    """`(windows, length)` ids, with the tokenizer's special tokens around each window."""
    bare = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    before, after = special_tokens(tokenizer)
    inner = length - len(before) - len(after)
    found = min(count, len(bare) // inner) if inner > 0 else 0
    if found == 0:
        raise SourceError(
            f"{name} is too short: it gives {len(bare)} tokens, and one window takes {inner} beside "
            f"{len(before) + len(after)} special ones. Give a longer text, or ask for fewer tokens."
        )
    every = len(bare) // inner
    chosen = [i * every // found for i in range(found)] if spread else range(found)
    return torch.tensor([before + bare[i * inner : (i + 1) * inner] + after for i in chosen])


def special_tokens(tokenizer) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer adds before and after a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    start = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), None)
    return ([], []) if start is None else (full[:start], full[start + len(bare) :])


def _split(rows: torch.Tensor, vocab_size: int) -> list[torch.Tensor]:
    batch = max(_MAX_BATCH, _MAX_TOKENS // rows.shape[1])
    batch = min(batch, max(1, _MAX_LOGITS // (rows.shape[1] * vocab_size)))
    return list(rows.split(batch))
