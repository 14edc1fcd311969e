"""The linear maps that end the branches of a stream: which they are, and how much each counts in the sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from normswap.calibration.taps import Tap, rows, watch
from normswap.understand.centring import Writer
from normswap.understand.normmap import NormMap, StreamInfo

# the sum must follow its writers to this relative error, or they are not all that writes it
_LINEAR = 1e-3


@dataclass(frozen=True)
class Writing:
    """A linear map that ends a branch.

    Attributes:
        module: its path.
        weight, bias: names of its parameters in the model, None: no bias.
        axis: of the weight, along the stream.
    """

    module: str
    weight: str
    bias: str | None
    axis: int


def writings(normmap: NormMap, stream: StreamInfo, branches: Sequence[int]) -> tuple[Writing, ...]:
    """The linear maps that end `branches`, values of the trace; none where something else has a part in them."""
    centring = normmap.centrings[stream.width]
    found: dict[str, dict[int, Writer]] = {}
    for value in branches:
        dim = len(normmap.trace.values[value].shape) - 1
        for term in centring.leaves(centring.terms.get((value, dim))) or {None}:
            if not isinstance(term, Writer) or term.kind != "parameter" or term.groups != 1 or term.scales:
                return ()
            alone = len(normmap.names(term.name)) == 1 and normmap.users(term.name) == {term.module}
            ndim = len(normmap.parameters[term.name])
            if not alone or ndim > 2 or ndim in found.get(term.module, {}):
                return ()
            found.setdefault(term.module, {})[ndim] = term
    order = {call.path: call.start for call in normmap.trace.calls}
    if any(2 not in parts for parts in found.values()):
        return ()
    return tuple(
        Writing(path, parts[2].name, parts[1].name if 1 in parts else None, parts[2].axis)
        for path, parts in sorted(found.items(), key=lambda item: order.get(item[0], 0))
    )


def write_change(
    parameters: Mapping[str, nn.Parameter], writers: Sequence[Writing], change: torch.Tensor, shift: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Add the change of all weights, `(features, width)`, and of the bias, which goes to the first writer with one."""
    tensors: dict[str, torch.Tensor] = {}
    place = 0
    for writer in writers:
        weight = parameters[writer.weight]
        size = weight.shape[1 - writer.axis]
        rows_of = change[place : place + size]
        _add(tensors, writer.weight, weight, rows_of if writer.axis == 1 else rows_of.T)
        place += size
    biased = next((writer for writer in writers if writer.bias is not None), None)
    if biased is not None:
        _add(tensors, biased.bias, parameters[biased.bias], shift)
    return tensors


@torch.no_grad()
def _add(tensors: dict[str, torch.Tensor], name: str, parameter: torch.Tensor, change: torch.Tensor) -> None:
    parameter.copy_(parameter.double() + change)
    tensors[name] = parameter.detach().clone()


def factor_of(
    model: nn.Module,
    writers: Sequence[Writing],
    out: Tap,
    frame: torch.Tensor | float,
    inputs: Mapping[str, Any],
    seen: Mapping[Tap, torch.Tensor],
) -> float | None:
    """The factor with which `writers` enter the sum at `out`, if it is the skip and what they give, and nothing else.

    With their parameters set to 0 the sum is the skip alone, and the difference must be a multiple of H W, times
    `frame` per channel. `seen` is what `out` and the writers' inputs are on `inputs`.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if not writers or any(parameters[w.weight].ndim != 2 for w in writers):
        return None
    taps = [out, *(Tap(writer.module, "input") for writer in writers)]
    own = [parameters[name] for w in writers for name in (w.weight, w.bias) if name is not None]
    kept = [p.detach().clone() for p in own]
    with torch.no_grad():
        for p in own:
            p.zero_()
        bare = watch(model, [out], inputs)
        for p, value in zip(own, kept, strict=True):
            p.copy_(value)
    if not set(taps) <= seen.keys() or out not in bare:
        return None
    y, skip = rows(seen[out], inputs).double(), rows(bare[out], inputs).double()
    given = torch.zeros_like(y)
    for writer, tap in zip(writers, taps[1:], strict=True):
        h = rows(seen[tap], inputs).double()
        matrix = parameters[writer.weight].detach().double()
        matrix = matrix if writer.axis == 1 else matrix.T
        if h.shape[0] != len(y) or h.shape[1] != matrix.shape[0]:
            return None
        given += h @ matrix + (0 if writer.bias is None else parameters[writer.bias].detach().double())
    given = given * frame
    factor = float(((y - skip) * given).sum() / given.square().sum().clamp_min(1e-30))
    follows = (y - skip - factor * given).norm() <= _LINEAR * (factor * given).norm()
    return factor if follows and factor else None


def features_of(seen: Mapping[Tap, torch.Tensor], writers: Sequence[Writing], inputs: Mapping[str, Any]):
    """What the writers read, side by side, `(rows, features)`."""
    return torch.cat([rows(seen[Tap(writer.module, "input")], inputs) for writer in writers], dim=1)
