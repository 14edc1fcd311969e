"""The tensors that a model gives out, by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from transformers.generation.utils import ALL_CACHE_NAMES


def named_tensors(tree: object, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a model's output by where it stands: keys and places in tuples, joined by dots. What is kept for
    generation (caches) is left out.
    """
    if isinstance(tree, torch.Tensor):
        yield name or "output", tree
        return
    if isinstance(tree, Mapping):
        parts = [(key, value) for key, value in tree.items() if key not in ALL_CACHE_NAMES]
    elif isinstance(tree, list | tuple):
        parts = list(enumerate(tree))
    else:
        return
    for key, value in parts:
        yield from named_tensors(value, f"{name}.{key}" if name else str(key))
