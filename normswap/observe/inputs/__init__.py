"""Small inputs for one forward pass, made from what the model itself says it takes.

What a model takes stands in the signature of its forward and in its configuration. Where these leave a choice (the
layout of pixels, frames before channels or after), the choices are tried on the meta device, and the first that runs
is taken. How many placeholder tokens a picture or a sound needs is counted on the features that the model makes of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from normswap.errors import ObserveError
from normswap.observe.inputs.media import media_of
from normswap.observe.inputs.others import other_parts
from normswap.observe.inputs.needs import Needs, takes_one_row
from normswap.observe.inputs.text import text_parts, with_placeholders
from normswap.observe.inputs.trial import Trial

__all__ = ["example_inputs", "takes_one_row"]

Inputs = dict[str, Any]
#: how many combinations of choices are tried before the one that got furthest is taken
_TRIALS = 40


def example_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor | bool]:
    """Keyword arguments of `model.forward`: token ids, pixels, frames, sound, series, and decoder ids where it takes them.

    Every part of a model of several kinds of input gets its own. Batch and sequence sizes differ from every size among
    the model's parameters, so that no axis can be mistaken for another, where the model leaves them free. Ids are
    small: valid in any vocabulary. One row only where a head could not tell padding from text.

    Raises:
        ObserveError: the model is none of transformers, or an input that it needs is of a kind this cannot make.
    """
    if not isinstance(model, PreTrainedModel):
        raise ObserveError(
            f"{type(model).__name__} is no model of transformers, so what it takes is not known. "
            f"Pass `inputs`, keyword arguments of its forward for one small batch, to the library call."
        )
    needs = Needs.of(model)
    trial = Trial(model)
    parts = _parts(needs, trial)
    missing = sorted(needs.required - {name for choices in parts for choice in choices for name in choice})
    if missing:
        raise ObserveError(
            f"{type(model).__name__} needs {', '.join(missing)}, and neither its signature nor its configuration tells "
            f"what that is. Pass `inputs`, keyword arguments of its forward for one small batch, to the library call."
        )
    combined = list(itertools.islice(_combinations(parts), _TRIALS))
    if not combined or not combined[0]:
        raise ObserveError(
            f"{type(model).__name__} takes {', '.join(sorted(needs.taken)) or 'nothing'}, none of which this can make. "
            f"Pass `inputs` with a batch of your own to the library call."
        )
    chosen = combined[0] if len(combined) == 1 else trial.first_that_runs(combined)
    return trial.with_what_reaches_more(chosen, needs.optional()) | needs.switches()


def _parts(needs: Needs, trial: Trial) -> list[list[Inputs]]:
    """For each independent part of the inputs the ways to make it, likeliest first."""
    parts, tokens = [], {}
    for medium in media_of(needs):
        choices = medium.choices
        if medium.method is not None:
            found = trial.features(medium.method, choices)
            if found is not None:
                choice, count = found
                choices = [choice]
                tokens[medium.kind] = count
        parts.append(choices)
    texts = text_parts(needs)
    if tokens and "input_ids" in needs.taken:
        texts[0] = [with_placeholders(needs, choice, tokens) for choice in texts[0]]
    return [*texts, *parts, *other_parts(needs)]


def _combinations(parts: list[list[Inputs]]) -> Iterator[Inputs]:
    for choice in itertools.product(*parts):
        yield {name: value for part in choice for name, value in part.items()}
