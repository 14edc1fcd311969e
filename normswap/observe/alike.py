"""Calls on the meta device that are alike give tensors alike: layers repeat, and so does what is watched of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

_PLAIN = (torch.Tensor, torch.nn.Parameter)


class _Form(NamedTuple):
    """What there is to a tensor without values."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


_known: dict[tuple, _Form] = {}
_MOST = 20_000


def alike(function: Callable, args: tuple, kwargs: dict) -> object:
    """`function` on tensors of the meta device: shape, dtype and strides of a result come from a call like this one.

    Of calls that give one new tensor alone: none that is a view of an argument, and nothing is written to. The meta
    device works them out in Python, which takes far longer than to look them up.
    """
    tensors: list[torch.Tensor] = []
    try:
        key = function, torch.get_default_dtype(), _key(args, tensors), _key(kwargs, tensors)
        form = _known.get(key)
    except TypeError:  # an argument that is no key
        return function(*args, **kwargs)
    if form is not None:
        return torch.empty_strided(form.shape, form.stride, dtype=form.dtype, device="meta")
    versions = [t._version for t in tensors]
    result = function(*args, **kwargs)
    if _is_new(result, tensors) and versions == [t._version for t in tensors] and len(_known) < _MOST:
        _known[key] = _Form(result.shape, result.stride(), result.dtype)
    return result


def _key(value: object, tensors: list[torch.Tensor]) -> object:
    """Equal for values that a call cannot tell apart; `tensors` gathers those within. TypeError: there is none."""
    if isinstance(value, torch.Tensor):
        if type(value) not in _PLAIN or not value.is_meta or value.is_complex() or value.requires_grad:
            raise TypeError
        tensors.append(value)
        return _Form(value.shape, value.stride(), value.dtype)
    if isinstance(value, list | tuple):
        return type(value), tuple(_key(part, tensors) for part in value)
    if isinstance(value, dict):
        return type(value), tuple((name, _key(part, tensors)) for name, part in value.items())
    return type(value), value  # 1 is not True, nor 1.0


def _is_new(result: object, arguments: list[torch.Tensor]) -> bool:
    if type(result) is not torch.Tensor or not result.is_meta or result.is_complex() or result.requires_grad:
        return False
    memory = {t.untyped_storage()._cdata for t in arguments}
    return result.storage_offset() == 0 and result.untyped_storage()._cdata not in memory
