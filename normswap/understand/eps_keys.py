"""Which numbers of a configuration are the eps of which norms: each that could be is changed, and the model built anew.

A number counts where changing it changes the eps of norms and no other operation.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from normswap.norms.probe import find_norms
from normswap.observe.run import observe
from normswap.observe.trace import Ref, Trace, collapse_norms

# what is tried is so many times what is there: large enough to be measured, and no number that stands there anyway
_TRIED = 1.37


def eps_keys(model: nn.Module, values: set[float], inputs: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """By key of the configuration (dots lead into nested ones) all norms that have their eps of it: by path, the
    attribute that holds it.

    Args:
        values: numbers that are an eps; keys with another are not tried.
    """
    if not isinstance(model, PreTrainedModel):
        return {}
    epses, rest = _seen(model, inputs)
    found: dict[str, dict[str, str]] = {}
    for key in _numbers(model.config, values):
        config = copy.deepcopy(model.config)
        owner, name = owner_of(config, key)
        tried = getattr(owner, name) * _TRIED
        setattr(owner, name, tried)
        try:
            with torch.device("meta"):
                other = type(model)._from_config(config).eval()
            changed, unchanged = _seen(other, inputs)
        except Exception:
            # a configuration may check its numbers, and a class what it is built with: then this one cannot be changed
            continue
        follow = {path: held for path in changed if (held := _attribute(other.get_submodule(path), tried)) is not None}
        stay = all(changed.get(path) == eps for path, eps in epses.items() if path not in follow)
        if follow and stay and changed.keys() == epses.keys() and unchanged == rest:
            found[key] = follow
    return found


def _attribute(module: nn.Module, value: float) -> str | None:
    return next((name for name, held in vars(module).items() if isinstance(held, float) and held == value), None)


def owner_of(config: Any, key: str) -> tuple[Any, str]:
    """The configuration that holds `key`, and the key's name in it."""
    *parents, name = key.split(".")
    for parent in parents:
        config = getattr(config, parent)
    return config, name


def _numbers(config: PretrainedConfig, values: set[float], prefix: str = "") -> Iterator[str]:
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            yield from _numbers(value, values, f"{prefix}{name}.")
        elif isinstance(value, float) and any(abs(value - eps) <= 1e-3 * eps for eps in values):
            yield prefix + name


def _seen(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[dict[str, float], list]:
    """The eps of every norm, and everything else that the model calls, with its numbers."""
    trace = observe(model, inputs)
    norms = find_norms(model, trace).specs
    return {path: spec.eps for path, spec in norms.items()}, _calls(collapse_norms(trace, set(norms)))


def _calls(trace: Trace) -> list:
    return [
        (op.name, op.module, tuple(repr(leaf) for leaf in op.leaves or () if not isinstance(leaf, Ref)))
        for op in trace.operations
    ]
