"""Refit what writes a moved block, in closed form, so that the stream behind it is the original's again.

With y = skip + F the sum of the moved block, F = H W the end of its branch (H the features that its last linear maps
read, side by side where there are several; a bias is a feature of ones), n' the original's normalised stream behind the
block and c_t the scale of y at token t, minimise over W the error behind the norm,

    sum_t || (skip_t + H_t W - c_t n'_t) / c_t ||^2  +  r tr(H'H)/k || W - W_0 ||^2,

which is linear in W once c_t is held; c_t is updated and the problem solved once more. Blocks are refitted one after
another on the stream as moved so far, so that each also corrects what the blocks before it left. Where the stream is
carried divided by D per channel, all this is said of D y, and W is divided by D at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from normswap.calibration.scales import normalised, scale_of
from normswap.calibration.taps import Tap, rows, watch
from normswap.norms.spec import NormSpec

#: how strongly the weights are held to what they were, by the number of tokens
RIDGE = ((16384, 1e-2), (float("inf"), 1e-3))
ROUNDS = 2
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


@dataclass(frozen=True)
class Target:
    """What is to be refitted for one step.

    Attributes:
        name: of the step.
        writers: what ends its branches.
        out: in the moved model, what the next norm reads.
        frame: D, per channel, with which the stream is multiplied on the way there: name of the parameter, None: 1.
        original: in the original, the value that should be there.
        norm: by which both are read.
    """

    name: str
    writers: tuple[Writing, ...]
    out: Tap
    frame: str | None
    original: Tap
    norm: NormSpec


@dataclass(frozen=True)
class Fit:
    """Relative error of the normalised stream behind a step, `rms(n(y) - n')`, before and after it was refitted."""

    before: float
    after: float


def refit(
    original: nn.Module,
    moved: nn.Module,
    targets: Sequence[Target],
    batches: Sequence[Mapping[str, Any]],
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Fit], dict[str, torch.Tensor]]:
    """Refit the writers of `moved`, in place, step after step.

    Args:
        original, moved: in eval mode and in float32 or wider.
        targets: in the order in which they run.

    Returns:
        Per step how well the stream is met; and the tensors that were refitted, by name.
    """
    fits: dict[str, Fit] = {}
    fitted: dict[str, torch.Tensor] = {}
    for done, target in enumerate(targets):
        result = _step(original, moved, target, batches)
        if result is not None:
            fits[target.name], tensors = result
            fitted |= tensors
        if progress is not None:
            progress(done + 1, len(targets))
    return fits, fitted


def _step(original: nn.Module, moved: nn.Module, target: Target, batches) -> tuple[Fit, dict[str, torch.Tensor]] | None:
    parameters = dict(moved.named_parameters(remove_duplicate=False))
    factor = _confirmed(moved, target, parameters, batches[0])
    writers = () if factor is None else target.writers
    frame = (factor or 1.0) * _frame(target, parameters)
    y, features, wanted = _gather(original, moved, target, writers, batches)
    if y is None:
        return None
    before = _error(y, wanted, target.norm)
    if not writers:
        return Fit(before, before), {}
    start = torch.cat([_matrix(parameters, writer) for writer in writers]).double() * frame
    ridge = next(r for tokens, r in RIDGE if len(y) <= tokens)
    skip = y.double() - features.double() @ start
    found = start
    for _ in range(ROUNDS):
        found = _solve(skip, features, wanted, skip + features.double() @ found, start, ridge, target.norm)
    after = _error(skip + features.double() @ found, wanted, target.norm)
    if not after < before:
        return Fit(before, before), {}
    tensors = {}
    place = 0
    for writer in writers:
        weight = parameters[writer.weight]
        size = weight.shape[1 - writer.axis]
        rows_of = found[place : place + size] / frame
        _put(weight, rows_of if writer.axis == 1 else rows_of.T)
        tensors[writer.weight] = weight.detach().clone()
        place += size
        if writer.bias is not None:
            _put(parameters[writer.bias], (found[place : place + 1] / frame).reshape(-1))
            tensors[writer.bias] = parameters[writer.bias].detach().clone()
            place += 1
    return Fit(before, after), tensors


def _solve(skip, features, wanted, y, start, ridge: float, norm: NormSpec) -> torch.Tensor:
    """One round: W, `(features, width)`."""
    c = scale_of(y, norm)
    h = features.double() / c
    t = wanted.double() - (skip - _off_centre(skip, norm)) / c
    gram = h.T @ h
    held = ridge * gram.diagonal().mean()
    gram.diagonal().add_(held)
    return torch.linalg.solve(gram, h.T @ t + held * start)


def _off_centre(x: torch.Tensor, norm: NormSpec) -> torch.Tensor | float:
    """What the norm takes out of x before it scales."""
    return x.mean(-1, keepdim=True) if norm.kind == "layernorm" else 0.0


def _error(y: torch.Tensor, wanted: torch.Tensor, norm: NormSpec) -> float:
    return float((normalised(y.double(), norm) - wanted.double()).square().mean().sqrt())


def _gather(original, moved, target: Target, writers: Sequence[Writing], batches):
    """The sum, `(tokens, width)`, the features of its writers, and what the original has there, normalised."""
    sums, features, wanted = [], [], []
    inputs_of = [Tap(writer.module, "input") for writer in writers]
    for inputs in batches:
        theirs = watch(original, [target.original], inputs)
        ours = watch(moved, [target.out, *inputs_of], inputs)
        if target.original not in theirs or target.out not in ours:
            return None, None, None
        sums.append(rows(ours[target.out], inputs))
        wanted.append(normalised(rows(theirs[target.original], inputs).double(), target.norm).to(sums[-1].dtype))
        parts = []
        for writer, tap in zip(writers, inputs_of, strict=True):
            parts.append(rows(ours[tap], inputs))
            if writer.bias is not None:
                parts.append(torch.ones_like(parts[-1][:, :1]))
        features.append(torch.cat(parts, dim=1) if parts else None)
    return torch.cat(sums), (torch.cat(features) if writers else None), torch.cat(wanted)


def _frame(target: Target, parameters) -> torch.Tensor | float:
    return 1.0 if target.frame is None else parameters[target.frame].detach().double()


def _confirmed(moved: nn.Module, target: Target, parameters, inputs) -> float | None:
    """The factor with which the step's writers enter the sum, if it is the skip and what they give, and nothing else.

    With their parameters set to 0 the sum is the skip alone, and the difference must be a multiple of H W.
    """
    if not target.writers or any(parameters[w.weight].ndim != 2 for w in target.writers):
        return None
    taps = [target.out, *(Tap(writer.module, "input") for writer in target.writers)]
    full = watch(moved, taps, inputs)
    own = [parameters[name] for w in target.writers for name in (w.weight, w.bias) if name is not None]
    kept = [p.detach().clone() for p in own]
    with torch.no_grad():
        for p in own:
            p.zero_()
        bare = watch(moved, [target.out], inputs)
        for p, value in zip(own, kept, strict=True):
            p.copy_(value)
    if not set(taps) <= full.keys() or target.out not in bare:
        return None
    y, skip = rows(full[target.out], inputs).double(), rows(bare[target.out], inputs).double()
    given = torch.zeros_like(y)
    for writer, tap in zip(target.writers, taps[1:], strict=True):
        h = rows(full[tap], inputs).double()
        matrix = parameters[writer.weight].detach().double()
        matrix = matrix if writer.axis == 1 else matrix.T
        if h.shape[0] != len(y) or h.shape[1] != matrix.shape[0]:
            return None
        given += h @ matrix + (0 if writer.bias is None else parameters[writer.bias].detach().double())
    given = given * _frame(target, parameters)
    factor = float(((y - skip) * given).sum() / given.square().sum().clamp_min(1e-30))
    follows = (y - skip - factor * given).norm() <= _LINEAR * (factor * given).norm()
    return factor if follows and factor else None


def _matrix(parameters, writer: Writing) -> torch.Tensor:
    """Weight and bias as rows, one per feature."""
    weight = parameters[writer.weight].detach()
    weight = weight if writer.axis == 1 else weight.T
    return weight if writer.bias is None else torch.cat([weight, parameters[writer.bias].detach()[None]])


@torch.no_grad()
def _put(parameter: torch.Tensor, value: torch.Tensor) -> None:
    parameter.copy_(value)
