"""Arguments that no other file knows: what they may be is told by their annotation and the last word of their name."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from normswap.observe.inputs.needs import Needs, widths

Inputs = dict[str, Any]
_IDS = ("ids", "code", "codes", "marks", "options")
#: words for how far something is: numbers within 0 .. 1
_FRACTIONS = ("step", "timestep")
#: words for what another part of a model computes
_STATES = ("states", "state", "embeds", "embeddings", "embedding", "features", "feats", "latents", "hidden", "vector")
#: words for heights and widths, as many places as a guessed state has
_SIZES = ("shapes", "sizes")


def guesses(needs: Needs, name: str) -> list[Inputs]:
    """Ways to make the argument `name`, likeliest first; none where nothing tells what it is."""
    return [{name: value} for value in _values(needs, name, name.split("_")[-1])]


def _values(needs: Needs, name: str, word: str) -> Iterator[Any]:
    annotation = needs.annotations.get(name, "")
    if annotation in ("int", "float", "bool"):
        return
    batch, length = needs.batch, needs.length
    if word == "mask":
        yield torch.ones(batch, length, dtype=torch.bool if "Bool" in annotation else torch.long)
    elif word in _IDS or "Long" in annotation and word not in ("state", "states", *_SIZES):
        yield from (needs.ids(batch, length), needs.ids(batch))
    elif word in _FRACTIONS:
        yield from (torch.full((batch,), 0.5), torch.full((batch, length), 0.5))
    elif word in _SIZES:
        yield torch.tensor([[1, length]] * batch)
        yield torch.tensor([[1, length]])
    elif annotation.startswith("list["):
        yield from ([value] for value in _maps(needs))
    elif word in _STATES or name in needs.required:
        yield from _states(needs)
        yield from _maps(needs)


def _states(needs: Needs) -> Iterator[torch.Tensor]:
    """One vector for each place or for each row, of every width that the configuration states."""
    for width in widths(needs.config):
        yield needs.randn(needs.batch, needs.length, width)
    for width in widths(needs.config):
        yield needs.randn(needs.batch, width)
        yield needs.randn(needs.batch, width, needs.length)


def _maps(needs: Needs) -> Iterator[torch.Tensor]:
    """Features in the plane, channels first."""
    for width, side in itertools.product(widths(needs.config)[:4], (8, 16)):
        yield needs.randn(needs.batch, width, side, side)
