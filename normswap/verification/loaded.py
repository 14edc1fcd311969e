"""A checkpoint's model and tokenizer as transformers loads them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from normswap.checkpoint.documents import brief
from normswap.checkpoint.source import Source
from normswap.errors import SourceError
from normswap.observe.run import make_eager


def open_model(source: Source, **options: Any) -> PreTrainedModel:
    """The model with its weights as stored, in eager attention and eval mode.

    Args:
        options: for transformers' `from_pretrained`; with `device_map="meta"` all is checked and nothing read.

    Raises:
        SourceError: weights are missing or do not fit, so that the model would be partly random.
    """
    source.build_stock()  # what a file or a number in it would break, it breaks here, within bounds
    if source.record is not None:
        from normswap.loading import load

        model = load(source.folder, dtype="auto", attn_implementation="eager", **options)
    else:
        model, info = _from_pretrained(source, options)
        missing = sorted(info["missing_keys"])
        missing += [f"{key} {tuple(a)}, expected {tuple(b)}" for key, a, b in sorted(info["mismatched_keys"])]
        if missing:
            raise SourceError(
                f"{source.name} does not hold all weights of {source.model_class.__name__}: {len(missing)} are missing "
                f"or of another shape ({'; '.join(missing[:3])}), which would be random. Get the complete checkpoint."
            )
    make_eager(model)
    return model.eval()


def _from_pretrained(source: Source, options: dict[str, Any]) -> tuple[PreTrainedModel, dict]:
    try:
        return source.model_class.from_pretrained(
            source.folder,
            dtype="auto",
            attn_implementation="eager",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are listed then, and refused with the missing ones
            **options,
        )
    except Exception as error:  # of transformers and torch, which raise what they like for a damaged file
        raise SourceError(
            f"the weights of {source.name} cannot be loaded into {source.model_class.__name__}: {brief(error)}. "
            f"Expected *.safetensors that fit its config.json."
        ) from error


def coarsest_dtype(model: nn.Module) -> torch.dtype:
    """The coarsest floating dtype among the parameters."""
    found = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return min(found, key=lambda dtype: torch.finfo(dtype).bits)


def tokenizer_of(source: Source):
    """The checkpoint's tokenizer, None if it has none."""
    try:
        # with the configuration given, and a plain no: transformers would ask on the terminal whether to run code
        tokenizer = AutoTokenizer.from_pretrained(source.folder, config=source.config, trust_remote_code=False)
    except Exception:  # where its files are not there, each class raises what it likes
        return None
    # without tokenizer files some classes come up all the same, with special tokens alone
    return tokenizer if len(tokenizer) > len(tokenizer.all_special_ids) else None
