"""Small inputs for one forward pass, made from what the model itself says it takes."""

from __future__ import annotations

import inspect
from itertools import count

import torch
from transformers import PreTrainedModel

from normswap.errors import ObserveError


def example_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor | bool]:
    """Keyword arguments for `model.forward`: token ids, and pixels or decoder ids where the model takes them.

    Batch and sequence sizes differ from every size among the model's parameters, so that no axis can be mistaken for
    another. Ids are small: valid in any vocabulary. One row only where a head could not tell padding from text.

    Raises:
        ObserveError: the model is none of transformers, or its main input is of a kind this cannot make.
    """
    if not isinstance(model, PreTrainedModel):
        raise ObserveError(
            f"{type(model).__name__} is no model of transformers, so what it takes is not known. "
            f"Pass `inputs`, keyword arguments of its forward for one small batch, to the library call."
        )
    taken = set(inspect.signature(model.forward).parameters)
    sizes = {size for p in model.parameters() for size in p.shape}
    free = (n for n in count(3) if n not in sizes and all(n % k for k in range(2, n)))
    batch, length, target = next(free), next(free), next(free)
    batch = 1 if takes_one_row(model) else batch
    main = model.main_input_name
    inputs: dict[str, torch.Tensor | bool] = {}
    if main == "input_ids":
        inputs["input_ids"] = torch.arange(batch * length).reshape(batch, length) % 2 + 1
        inputs["attention_mask"] = torch.ones(batch, length, dtype=torch.long)
    elif main == "pixel_values":
        inputs["pixel_values"] = torch.randn(batch, *_image_shape(model))
    else:
        raise ObserveError(
            f"{type(model).__name__} takes '{main}' as its main input; example inputs are made for 'input_ids' and "
            f"'pixel_values'. Pass `inputs` with a batch of your own to the library call."
        )
    if model.config.is_encoder_decoder and "decoder_input_ids" in taken:
        inputs["decoder_input_ids"] = torch.ones(batch, target, dtype=torch.long)
    if "use_cache" in taken:
        inputs["use_cache"] = False
    return {name: value for name, value in inputs.items() if name in taken}


def takes_one_row(model: PreTrainedModel) -> bool:
    """Heads that pool the last token need to know what padding is, or batches of one."""
    return getattr(model.config, "pad_token_id", None) is None and not model.can_generate()


def _image_shape(model: PreTrainedModel) -> tuple[int, int, int]:
    config = getattr(model.config, "vision_config", model.config)
    size = getattr(config, "image_size", None)
    if size is None:
        raise ObserveError(
            f"{type(config).__name__} states no image_size; pass `inputs` with pixel_values of your own."
        )
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return getattr(config, "num_channels", 3), height, width
