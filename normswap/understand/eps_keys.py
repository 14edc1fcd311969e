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
from normswap.observe.trace import Ref, collapse_norms

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
    before = _Seen(model, inputs)
    found: dict[str, dict[str, str]] = {}
    for key in _numbers(model.config, values):
        config = copy.deepcopy(model.config)
        owner, name = owner_of(config, key)
        tried = getattr(owner, name) * _TRIED
        setattr(owner, name, tried)
        try:
            with torch.device("meta"):
                other = type(model)._from_config(config).eval()
            after = _Seen(other, inputs)
        except Exception:
            # a configuration may check its numbers, and a class what it is built with: then this one cannot be changed
            continue
        held = {path: name for path, m in other.named_modules() if (name := _attribute(m, tried)) is not None}
        follow = {path: held[path] for path, eps in after.eps.items() if path in held and abs(eps / tried - 1) < 1e-3}
        stay = {path: eps for path, eps in before.eps.items() if path not in follow}
        same = (
            stay == {path: eps for path, eps in after.eps.items() if path not in follow} and before.calls == after.calls
        )
        # what did not run may be a norm too
        if follow and same and held.keys() <= after.ran:
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
        elif isinstance(value, float) and any(abs(value - eps) <= 1e-3 * eps for eps in values if eps > 0):
            yield prefix + name


class _Seen:
    """What a pass of a model shows.

    Attributes:
        eps: of every norm, by path.
        calls: everything else that the model calls, with its numbers.
        ran: paths of the modules that ran.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any]):
        trace = observe(model, inputs)
        norms = find_norms(model, trace).specs
        self.eps = {path: spec.eps for path, spec in norms.items()}
        self.ran = {call.path for call in trace.calls}
        self.calls = [
            (op.name, op.module, tuple(repr(leaf) for leaf in op.leaves or () if not isinstance(leaf, Ref)))
            for op in collapse_norms(trace, set(norms)).operations
        ]
