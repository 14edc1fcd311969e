"""Whether a recipe's objectives mean something for its model, found by running it before anything is calibrated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from normswap.errors import RecipeError
from normswap.tune.data import Corpus
from normswap.tune.objectives import Losses
from normswap.tune.recipe import Objective

#: of the logits that an objective is on, how many dimensions they have, and what gives them
_LOGITS = {
    "lm": (3, "one for each token of the vocabulary, at each token"),
    "mlm": (3, "one for each token of the vocabulary, at each token"),
    "classification": (2, "one for each class"),
}


@torch.no_grad()
def check_suited(model: nn.Module, objectives: Sequence[Objective], data: Corpus) -> None:
    """Raises RecipeError where a model does not take the data, or where an objective has no meaning for it.

    Args:
        model: the source's, in eval mode.
    """
    name = type(model).__name__
    batch = data.collate([data.held_out[0]])
    logits = getattr(_run(model, batch), "logits", None)
    for kind, (dimensions, what) in _LOGITS.items():
        if any(objective.kind == kind for objective in objectives) and logits is not None:
            if logits.ndim != dimensions:
                raise RecipeError(f"objective {kind}: expected {what}; {name} gives logits of {tuple(logits.shape)}.")
            if kind == "lm":
                _check_blind(model, batch, logits)
            if kind == "classification":
                _check_labels(name, data, logits.shape[-1])
    Losses(objectives, model).loss(model, batch)  # says what else the model does not give


def _run(model: nn.Module, batch: dict[str, torch.Tensor]):
    try:
        return model(**{name: value for name, value in batch.items() if name != "labels"})
    except Exception as error:  # whatever a model raises that reads more than a text
        reason = " ".join(str(error).split())
        raise RecipeError(
            f"{type(model).__name__} does not run on {', '.join(batch)} alone, which is what recipes train on: "
            f"{type(error).__name__}: {reason:.300}"
        ) from error


def _check_blind(model: nn.Module, batch: dict[str, torch.Tensor], logits: torch.Tensor) -> None:
    """Another last token must not change what the model says of those before it, but for rounding."""
    ids = batch["input_ids"].clone()
    ids[:, -1] = torch.where(ids[:, -1] == 0, 1, 0)
    a, b = (found[:, :-1].float() for found in (logits, _run(model, batch | {"input_ids": ids}).logits))
    seen = float((a - b).abs().max() / a.abs().max().clamp_min(1e-30))
    if seen > max(torch.finfo(logits.dtype).eps, torch.finfo(torch.float32).eps) ** 0.5:
        raise RecipeError(
            f"objective lm: {type(model).__name__} sees the tokens that it is to predict: another last one changes "
            f"what it says of those before by {seen:.1e}. Expected a causal model; for one that sees all, take mlm."
        )


def _check_labels(name: str, data: Corpus, count: int) -> None:
    found = {label for part in (data.train, data.held_out) for label in part.with_format(None)["labels"]}
    odd = sorted(repr(label) for label in found if type(label) is not int or not 0 <= label < count)
    if odd:
        raise RecipeError(
            f"data.label: {name} has {count} classes, expected whole numbers from 0 to {count - 1}; found "
            f"{', '.join(odd[:5])}."
        )
