"""Refit what writes a moved block, in closed form, so that the stream behind it is the original's again.

With y = skip + F the sum of the moved block, F = H W the end of its branch (H the features that its last linear maps
read, side by side where there are several; a bias is a feature of ones), n' the original's normalised stream behind
the block and c_t = <n'_t, y_t> / <n'_t, n'_t> the length of y along it at token t, minimise over W the error behind
the norm,

    sum_t || (skip_t + H_t W - c_t n'_t) / c_t ||^2  +  r tr(H'H)/k || W - W_0 ||^2,

which is linear in W once c_t is held; c_t is updated and the problem solved once more (further rounds change nothing
that can be measured). The norm takes the length away, so any c_t serves: one c for all tokens leaves twice the
divergence. r is chosen on tokens that take no part in the fit, and where none helps there, the writers stay. Blocks
are refitted one after another on the stream as moved so far, so that each also corrects what the blocks before it
left. Where the stream is carried divided by D per channel, all this is said of D y, and W is divided by D at the end.

A normalised stream that becomes raw keeps the length of its sums, and branches of one scale are added to tokens of all
lengths. There c_t is drawn towards its median where the writers can do that without a loss of direction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from normswap.calibration.ridge import Ridge
from normswap.calibration.scales import normalised
from normswap.calibration.taps import Tap, rows, watch
from normswap.calibration.writers import Writing, factor_of, features_of, write_change
from normswap.norms.spec import NormSpec

#: r, how strongly the weights may be held to what they were
_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
#: one in so many tokens, the last ones, takes no part in the fit that r is chosen by
_HELD = 8
#: lengths that are carried on become `median(c)^e c_t^(1 - e)`; on a BERT, 0 and 1 are both worse
_EVENING = 0.5
#: a token of less than this part of the usual length weighs no more than one of this length
_SHORTEST = 0.1
#: an error of so many roundings is none
_ROUNDINGS = 10


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
        carried: the stream was normalised and now keeps the length of this sum for the steps that follow.
    """

    name: str
    writers: tuple[Writing, ...]
    out: Tap
    frame: str | None
    original: Tap
    norm: NormSpec
    carried: bool = False


@dataclass(frozen=True)
class Fit:
    """Relative error of the normalised stream behind a step, `rms(n(y) - n')`, before and after it was refitted.

    Measured on the tokens that are kept apart, with what was fitted to the others.
    """

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
    frame = _frame(target, parameters)
    taps = [target.out, *(Tap(writer.module, "input") for writer in target.writers)]
    seen = watch(moved, taps, batches[0])
    factor = factor_of(moved, target.writers, target.out, frame, batches[0], seen)
    writers = () if factor is None else target.writers
    frame = (factor or 1.0) * frame
    y, features, wanted = _gather(original, moved, target, writers, batches)
    if y is None:
        return None
    data = _Data(y, features, wanted)
    fit, change = _fitted(data, target, bias=any(writer.bias is not None for writer in writers))
    if change is None:
        return fit, {}
    return fit, write_change(parameters, writers, *(part / frame for part in change))


@dataclass
class _Data:
    """Of all tokens: the sum, what its writers read (None: there are none), and the normalised stream wanted."""

    y: torch.Tensor
    features: torch.Tensor | None
    wanted: torch.Tensor

    def part(self, start: int, end: int) -> _Data:
        features = None if self.features is None else self.features[start:end]
        return _Data(self.y[start:end], features, self.wanted[start:end])

    def changed(self, change: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return self.y + self.features @ change.to(self.features.dtype) + shift.to(self.y.dtype)

    def lengths(self, y: torch.Tensor) -> torch.Tensor:
        """c_t, none of them shorter than counts."""
        tiny = torch.finfo(y.dtype).tiny
        c = (y * self.wanted).sum(-1) / self.wanted.square().sum(-1).clamp_min(tiny)
        return c.clamp_min(_SHORTEST * c.abs().median().clamp_min(tiny))

    def change_wanted(self, c: torch.Tensor, evening: float) -> torch.Tensor:
        if evening:
            c = c.median() ** evening * c ** (1 - evening)
        return c[:, None] * self.wanted - self.y


def _fitted(data: _Data, target: Target, bias: bool) -> tuple[Fit, tuple[torch.Tensor, torch.Tensor] | None]:
    """How well the step does, and the change of its weights and bias in units of the sum, None: they stay."""
    cut = len(data.y) - max(1, len(data.y) // _HELD)
    train, held = data.part(0, cut), data.part(cut, len(data.y))
    before = _error(held.y, held.wanted, target.norm)
    stays = Fit(before, before), None
    if data.features is None or not cut or before <= _ROUNDINGS * torch.finfo(data.y.dtype).eps:
        return stays
    c = train.lengths(train.y)
    ridge = Ridge(train.features, c.square().reciprocal(), bias)
    for evening in (_EVENING, 0.0) if target.carried else (0.0,):
        found = ridge.solve(train.change_wanted(c, evening), *_RIDGES)
        errors = [_error(held.changed(*change), held.wanted, target.norm) for change in found]
        after, r, change = min(zip(errors, _RIDGES, found, strict=True), key=lambda tried: tried[:2])
        if after < before:
            break
    else:
        return stays
    c = data.lengths(data.changed(*change))
    change = Ridge(data.features, c.square().reciprocal(), bias).solve(data.change_wanted(c, evening), r)[0]
    return Fit(before, after), change


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
        features.append(features_of(ours, writers, inputs) if writers else None)
    return torch.cat(sums), (torch.cat(features) if writers else None), torch.cat(wanted)


def _frame(target: Target, parameters) -> torch.Tensor | float:
    return 1.0 if target.frame is None else parameters[target.frame].detach().double()
