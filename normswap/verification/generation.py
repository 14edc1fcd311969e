"""What two models write, greedily, after the same beginnings: the difference that a person sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from normswap.verification.precision import LiftFloat32
from normswap.verification.record import Record

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 3, 24, 32
# Every token takes all weights once: so many values, in memory and read from disk, take a CPU up to a minute.
_READS, _READS_ON_DISK = 6.4e10, 6.4e9
# With fewer new tokens there is nothing to see.
_FEWEST = 8


class Sample(Record):
    """One beginning, and what each model made of it.

    Attributes:
        tokens: how many new tokens were compared: those of the shorter one.
        first_difference: number of the first new token that is another, from 0; None: all are the same.
        prompt, same, text_a, text_b: as text: the beginning, what both wrote alike, and how each goes on from there.
    """

    tokens: int
    first_difference: int | None
    prompt: str | None = None
    same: str | None = None
    text_a: str | None = None
    text_b: str | None = None


class Generation(Record):
    """What both models wrote; `why_not` says why there is nothing.

    Attributes:
        new_tokens: how many were asked for.
    """

    samples: tuple[Sample, ...] = ()
    new_tokens: int = NEW_TOKENS
    why_not: str | None = None


def generated(
    model_a: nn.Module,
    model_b: nn.Module,
    tokenizer: Any,
    batches: Sequence[Mapping[str, Any]],
    *,
    on_disk: bool = False,
    reads: float | None = None,
) -> Generation:
    """Let both models go on from a few beginnings of the text that they are measured on.

    Args:
        model_a, model_b: in eval mode, of one dtype and device.
        tokenizer: of both; None: there is no text.
        batches: keyword arguments of `forward`; their ids are the text.
        on_disk: weights are read from disk where they are used, again for each token.
        reads: how many values of weights may be read for it; a large model writes fewer tokens, or none.
    """
    if (why_not := _why_not(model_a, tokenizer, batches)) is not None:
        return Generation(why_not=why_not)
    size = sum(p.numel() for p in model_a.parameters())
    allowed = (_READS_ON_DISK if on_disk else _READS) if reads is None else reads
    count = min(NEW_TOKENS, int(allowed // max(size, 1)))
    if count < _FEWEST:
        return Generation(why_not=f"with {size / 1e9:.2g} billion parameters it would take too long here")
    prompts = _prompts(batches)
    try:
        written = [_greedy(model, prompts, count) for model in (model_a, model_b)]
    except Exception as error:  # a model's own code for generation raises what it likes
        reason = " ".join(str(error).split())
        return Generation(why_not=f"generation failed: {type(error).__name__}: {reason:.200}")
    samples = (_sample(tokenizer, *row) for row in zip(prompts.tolist(), *written, strict=True))
    return Generation(samples=tuple(samples), new_tokens=count)


def _why_not(model: nn.Module, tokenizer, batches) -> str | None:
    can = getattr(model, "can_generate", None)
    if tokenizer is None:
        return "the checkpoint has no tokenizer"
    if can is None or not can():
        return f"{type(model).__name__} does not generate text"
    if not batches or {n for n, v in batches[0].items() if isinstance(v, torch.Tensor)} - _OF_TEXT:
        return "it was not measured on text alone"
    return None


_OF_TEXT = {"input_ids", "attention_mask", "token_type_ids", "decoder_input_ids", "decoder_attention_mask"}


def _prompts(batches: Sequence[Mapping[str, Any]]) -> torch.Tensor:
    """`(prompts, length)`: the beginnings of rows at even distances."""
    rows = [row for batch in batches for row in batch["input_ids"]]
    length = min(PROMPT_TOKENS, max(1, len(rows[0]) // 2))
    return torch.stack([rows[i * len(rows) // PROMPTS][:length] for i in range(min(PROMPTS, len(rows)))])


@torch.no_grad()
def _greedy(model: nn.Module, prompts: torch.Tensor, count: int) -> list[list[int]]:
    """The new ids of each row."""
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    prompts = prompts.to(parameter.device)
    with LiftFloat32() if parameter.dtype == torch.float64 else nullcontext():
        found = model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=count,
            do_sample=False,
            num_beams=1,
            pad_token_id=_padding(model),
        )
    # a decoder of its own begins with a token of its own
    start = 1 if model.config.is_encoder_decoder else prompts.shape[1]
    ends = _ends(model)
    return [_until(row, ends) for row in found[:, start:].tolist()]


def _ends(model: nn.Module) -> set[int]:
    found = model.generation_config.eos_token_id
    return set(found) if isinstance(found, list) else {found} - {None}


def _padding(model: nn.Module) -> int:
    """What stands behind the end of a row that has ended before others; it is cut off again."""
    own = model.generation_config.pad_token_id
    return own if own is not None else min(_ends(model), default=0)


def _until(ids: list[int], ends: set[int]) -> list[int]:
    """`ids` up to the first end, that included."""
    stop = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return ids[: stop + 1]


def _sample(tokenizer, prompt: list[int], a: list[int], b: list[int]) -> Sample:
    tokens = min(len(a), len(b))
    first = next((i for i in range(tokens) if a[i] != b[i]), None if len(a) == len(b) else tokens)
    start = tokens if first is None else first
    # decoded in one piece, and the text of the tokens alike taken off: some tokenizers join words at its seam
    same = tokenizer.decode(a[:start])
    rest_a, rest_b = (tokenizer.decode(ids).removeprefix(same) for ids in (a, b))
    return Sample(
        tokens=tokens,
        first_difference=first,
        prompt=tokenizer.decode(prompt),
        same=same,
        text_a=rest_a if first is not None else "",
        text_b=rest_b if first is not None else "",
    )
