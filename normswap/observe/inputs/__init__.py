"""Small inputs for one forward pass, made from what the model itself says it takes.

What a model takes stands in the signature of its forward and in its configuration. Where these leave a choice (the
layout of pixels, frames before channels or after), the choices are tried on the meta device, and the first that runs
is taken. How many placeholder tokens a picture or a sound needs is counted on the features that the model makes of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from normswap.errors import ObserveError
from normswap.observe.inputs.guesses import guesses
from normswap.observe.inputs.media import Medium, media_of
from normswap.observe.inputs.needs import Needs, takes_one_row
from normswap.observe.inputs.series import series_parts
from normswap.observe.inputs.text import has_places, text_parts, with_placeholders
from normswap.observe.inputs.trial import Attempt, Trial

__all__ = ["example_inputs", "takes_one_row"]

Inputs = dict[str, Any]
# what was made for models that are still there, and what they were like then
_made: WeakKeyDictionary[PreTrainedModel, tuple[tuple, Inputs]] = WeakKeyDictionary()


def example_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor | bool]:
    """Keyword arguments of `model.forward`: token ids, pixels, frames, sound, series, decoder ids, as it takes them.

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
    known, inputs = _made.get(model, (None, None))
    if known != (likeness := _likeness(model)):
        inputs = _make(model)
        _made[model] = likeness, inputs
    return _copied(inputs)


def _likeness(model: PreTrainedModel) -> tuple:
    """What inputs are made for: while it stays, those of an earlier call fit."""
    modules = tuple((path, type(module)) for path, module in model.named_modules())
    tensors = tuple((name, t.shape) for name, t in (*model.named_parameters(), *model.named_buffers()))
    own = id(vars(model).get("forward"))  # where the class's is replaced
    return modules, tensors, repr(model.config.to_dict()), torch.get_default_dtype(), own


def _copied(inputs: Inputs) -> Inputs:
    return tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, inputs)


def _make(model: PreTrainedModel) -> Inputs:
    needs = Needs.of(model)
    trial = Trial(model)
    media = [_Choices.of(medium, needs, trial) for medium in media_of(needs)]
    parts = _parts(needs, media)
    made = _names(parts)
    missing = sorted(needs.required - made)
    if missing:
        raise ObserveError(
            f"{type(model).__name__} needs {', '.join(missing)}, and neither its signature nor its configuration tells "
            f"what that is. Pass `inputs`, keyword arguments of its forward for one small batch, to the library call."
        )
    if not made:
        raise ObserveError(
            f"{type(model).__name__} takes {', '.join(sorted(needs.taken)) or 'nothing'}, none of which this can make. "
            f"Pass `inputs` with a batch of your own to the library call."
        )
    extras = [choices for name in needs.optional(made) if (choices := guesses(needs, name))]
    if all(len(choices) == 1 for choices in parts) and not extras:  # nothing to choose
        return needs.drawn({k: v for choices in parts for k, v in choices[0].items()}) | needs.switches()
    best = trial.fit(parts)
    if not best.ran and media:
        best = max([best, *_one_at_a_time(needs, media, trial)], key=lambda a: (a.ran, len(a.reached), a.distance))
    if not best.ran and extras:  # an argument may be needed although it has a default
        both = trial.fit([*([{}, *choices] for choices in extras), *parts])
        best = max(best, both, key=lambda attempt: attempt.distance)
    if best.ran:
        best = trial.extend(best, [choices for choices in extras if not choices[0].keys() & best.inputs.keys()])
    return needs.drawn(best.inputs) | needs.switches()


@dataclass(frozen=True)
class _Choices:
    """Ways to make one kind of input, and how many features the model makes of them, where it says."""

    kind: str
    choices: list[Inputs]
    features: int | None

    @classmethod
    def of(cls, medium: Medium, needs: Needs, trial: Trial) -> _Choices:
        if not medium.methods and not has_places(needs, medium.kind):
            return cls(medium.kind, medium.choices, None)
        found = trial.features(medium.methods, medium.choices, text_parts(needs)[0][0])
        if found is None:
            return cls(medium.kind, medium.choices, None)
        others = [choice for choice in medium.choices if choice is not found[0]]
        return cls(medium.kind, [found[0], *others[:6]], found[1])


def _one_at_a_time(needs: Needs, media: list[_Choices], trial: Trial) -> Iterator[Attempt]:
    """Attempts for models that take one kind of input at a time: without one of the media, or without the text."""
    for left_out in media if len(media) > 1 else []:
        yield trial.fit(_parts(needs, [medium for medium in media if medium is not left_out]))
    if "input_ids" in needs.taken - needs.required:
        parts = _parts(needs, media)
        yield trial.fit([choices for choices in parts if "input_ids" not in choices[0]])


def _parts(needs: Needs, media: list[_Choices]) -> list[list[Inputs]]:
    """For each independent part of the inputs the ways to make it, likeliest first."""
    texts = text_parts(needs)
    if "input_ids" in needs.taken:
        counted = {m.kind: m.features for m in media if m.features}
        if counted:
            texts[0] = [with_placeholders(needs, choice, counted) for choice in texts[0]]
        elif media:  # models that count for themselves have one token for each picture or sound
            texts[0] += [with_placeholders(needs, texts[0][0], {m.kind: needs.batch for m in media})]
    parts = [*texts, *(m.choices for m in media), *series_parts(needs)]
    missing = sorted(needs.required - _names(parts))
    return [*parts, *(choices for name in missing if (choices := guesses(needs, name)))]


def _names(parts: list[list[Inputs]]) -> set[str]:
    return {name for choices in parts for choice in choices for name in choice}
