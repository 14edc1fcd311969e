"""Where values of a trace can be taken while a live model runs: at the ends of modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from normswap.observe.recorder import tensors_in
from normswap.observe.trace import Trace
from normswap.verification.outputs import to_model


@dataclass(frozen=True)
class Tap:
    """One tensor at the end of a module.

    Attributes:
        module: its path; it runs once in a pass.
        side: `input` or `output`.
        index: which of the tensors that go in or come out.
    """

    module: str
    side: str
    index: int = 0


class _Done(Exception):
    """All that was asked for has been seen."""


def find_tap(trace: Trace, value: int, base: Callable[[int], int]) -> Tap | None:
    """Where `value`, or a copy of it in the same shape, goes into or comes out of a module; None: nowhere."""
    times = Counter(call.path for call in trace.calls)
    shape = trace.values[value].shape
    near: Tap | None = None
    for call in trace.calls:
        if times[call.path] > 1:
            continue
        for side, values in (("input", call.inputs), ("output", call.outputs)):
            for index, v in enumerate(values):
                if v == value:
                    return Tap(call.path, side, index)
                if near is None and base(v) == base(value) and trace.values[v].shape == shape:
                    near = Tap(call.path, side, index)
    return near


@torch.no_grad()
def watch(model: nn.Module, taps: Iterable[Tap], inputs: Mapping[str, Any]) -> dict[Tap, torch.Tensor]:
    """Run `model` on one batch until every tap has been seen; what was seen, by tap.

    A tap that the pass does not reach is missing in the result.
    """
    wanted = set(taps)
    seen: dict[Tap, torch.Tensor] = {}
    handles = []

    def note(tap: Tap, values: list[torch.Tensor]) -> None:
        if tap.index < len(values):
            seen[tap] = values[tap.index].detach().clone()
        if seen.keys() >= wanted:
            raise _Done

    for tap in wanted:
        module = model.get_submodule(tap.module)
        if tap.side == "input":
            hook = module.register_forward_pre_hook(
                lambda m, args, kwargs, tap=tap: note(tap, tensors_in((args, kwargs))), with_kwargs=True
            )
        else:
            hook = module.register_forward_hook(lambda m, args, output, tap=tap: note(tap, tensors_in(output)))
        handles.append(hook)
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    try:
        with suppress(_Done):
            model(**{key: to_model(value, parameter) for key, value in inputs.items()})
    finally:
        for handle in handles:
            handle.remove()
    return seen


def rows(value: torch.Tensor, inputs: Mapping[str, Any]) -> torch.Tensor:
    """The value as `(rows, width)`, those of padding left out.

    Where the masks of an encoder and of a decoder are of the value's shape, those rows count that both keep: fewer than
    there are, and no padding.
    """
    keep = torch.ones(value.shape[:-1], dtype=torch.bool, device=value.device)
    for name, mask in inputs.items():
        if name.endswith("attention_mask") and isinstance(mask, torch.Tensor) and mask.shape == keep.shape:
            keep &= mask.to(value.device, torch.bool)
    return value[keep]
