"""What a model is measured on: text where it reads text alone, and otherwise what it was observed on, drawn again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from normswap.errors import ObserveError, VerificationError
from normswap.observe.inputs import example_inputs, takes_one_row
from normswap.verification.outputs import Inputs, outputs_of
from normswap.verification.text import WHOLE, most_tokens
from normswap.verification.text import batches as batches_of_text

# Long enough to reach every row of most position tables, short enough for eager attention in float64.
_LENGTH = 1024
# Some configurations count positions that no token gets: those before the first.
_SPARE = 8
#: how the description of inputs begins that are of no data
RANDOM = "random inputs"
# How many batches are made where there is no text to take them from.
_DRAWS = 4
# What a window of text becomes under each name; a model that takes any other tensor is not measured on text.
_OF_TEXT = {
    "input_ids": lambda ids: ids,
    "decoder_input_ids": lambda ids: ids,
    "attention_mask": torch.ones_like,
    "decoder_attention_mask": torch.ones_like,
    "token_type_ids": torch.zeros_like,
}


def evaluation_inputs(
    model: PreTrainedModel,
    tokenizer,
    text: str | Path | None,
    tokens: int,
    part: tuple[float, float] = WHOLE,
    window: int | None = None,
    runs: bool = True,
) -> tuple[list[Inputs], tuple[int, ...], str]:
    """Batches of keyword arguments, the shape of their main input together, and where they are from.

    Args:
        model: whose `forward` takes them, with its weights.
        tokenizer: of the model, None: random ids.
        text: a UTF-8 file, None: the text that comes with normswap.
        tokens: how many in all, about; of text alone.
        part: of the text, from where to where.
        window: windows of so many tokens at most, at even distances; None: as long as may be, from the beginning.
        runs: whether the model may be run to find out how long a text it takes; else its configuration is believed.
    """
    example = example_inputs(model)
    vocabulary = of_text(model.config, "vocab_size")
    tensors = {name for name, value in example.items() if isinstance(value, torch.Tensor)}
    if vocabulary is None or "input_ids" not in tensors or not tensors <= _OF_TEXT.keys():
        first = int(100 * part[0])
        batches = [redrawn(example, model.config, seed) for seed in range(first, first + _DRAWS)]
        main = batches[0].get(model.main_input_name, batches[0][min(tensors)])
        return (
            batches,
            (_DRAWS * main.shape[0], *main.shape[1:]),
            f"{RANDOM}, seeds {first} to {first + _DRAWS - 1}",
        )
    if tokens < 2:
        raise VerificationError(f"tokens must be at least 2, found {tokens}: a token is needed to predict the next.")
    positions = _positions(model.config) - (0 if runs else _SPARE)
    length = min(positions, tokens, window or tokens, most_tokens(vocabulary))
    length = _longest(model, example, length) if runs else max(2, length)
    count = max(1, tokens // length)
    found = batches_of_text(tokenizer, text, vocabulary, length, count, part, spread=window is not None)
    parts = [part for ids in found.ids for part in (ids.split(1) if takes_one_row(model) else [ids])]
    return [_on(ids, example) for ids in parts], (sum(len(ids) for ids in found.ids), length), found.source


def redrawn(example: Inputs, config: PretrainedConfig | None, seed: int) -> dict[str, object]:
    """`example` with other values: floats in another order, and other tokens where none has a meaning of its own.

    Shapes, masks, sizes and the tokens that a configuration names (which stand for an image's patches, say) stay.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = dict(example)
    for name, value in example.items():
        if not isinstance(value, torch.Tensor) or not value.numel():
            continue
        if value.is_floating_point():
            order = torch.randperm(value.numel(), generator=generator)
            drawn[name] = value.flatten()[order].reshape(value.shape)
        elif name in ("input_ids", "decoder_input_ids") and config is not None:
            drawn[name] = _other_tokens(value, config, generator)
    return drawn


def of_text(config: PretrainedConfig, key: str) -> int | None:
    """What the part that reads text states under `key`; of several such parts the smallest number."""
    try:
        return getattr(config.get_text_config(), key, None)
    except ValueError:  # transformers does not choose between an encoder of text and a decoder
        parts = [part for part in vars(config).values() if isinstance(part, PretrainedConfig)]
        return min((n for part in parts if isinstance(n := getattr(part, key, None), int)), default=None)


def _other_tokens(ids: torch.Tensor, config: PretrainedConfig, generator: torch.Generator) -> torch.Tensor:
    named = torch.tensor(sorted(_named_tokens(config.to_dict())), dtype=torch.long)
    vocabulary = of_text(config, "vocab_size")
    free = torch.arange(vocabulary) if isinstance(vocabulary, int) else ids.unique()
    free = free[~torch.isin(free, named)]
    if not len(free):
        return ids
    others = free[torch.randint(len(free), ids.shape, generator=generator)]
    return torch.where(torch.isin(ids, named), ids, others.to(ids.dtype))


def _named_tokens(config: Mapping[str, object]) -> set[int]:
    """Every id that a key of the configuration, or of one within it, gives to a token."""
    found: set[int] = set()
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= _named_tokens(value)
        elif str(key).endswith(("token_id", "token_index", "token_ids")):
            values = value if isinstance(value, list | tuple) else [value]
            found |= {v for v in values if isinstance(v, int) and 0 <= v < 2**31}  # -1 and the like name none
    return found


def _positions(config: PretrainedConfig) -> int:
    found = of_text(config, "max_position_embeddings")
    return min(_LENGTH, found) if isinstance(found, int) and found > 0 else _LENGTH


def _longest(model: PreTrainedModel, example: Inputs, length: int) -> int:
    """`length`, or less until the model takes it: configurations say how many positions there are, or more, or not."""
    generator = torch.Generator().manual_seed(0)
    for tried in (length, length - 8, *(length >> k for k in range(1, 8))):
        if tried < 2:
            break
        # no padding among them: some do not count its positions
        ids = _other_tokens(torch.full((1, tried), -1), model.config, generator)
        try:
            outputs_of(model, _on(ids, example), False, "A")
            return tried
        except ObserveError:
            continue
    return example["input_ids"].shape[1]


def _on(ids: torch.Tensor, example: Inputs) -> dict[str, object]:
    """The example's arguments on a batch of text, `(batch, length)`."""
    return {name: _OF_TEXT[name](ids) if isinstance(value, torch.Tensor) else value for name, value in example.items()}
