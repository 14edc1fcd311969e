"""Least squares for norms that are fitted to what another norm gave: gain and bias per channel, one slope per site."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from normswap.norms.kind import Tensors, Values
from normswap.norms.spec import NormSpec

# a slope is a matter of one number: so many rows tell it
_ROWS = 2048
_GOLDEN = (5**0.5 - 1) / 2
# clusters are apart where no token's scale lies within this factor, and the smaller has this part of the tokens at most
_APART, _FEW = 4.0, 0.1


def around(x: torch.Tensor, spec: NormSpec) -> torch.Tensor:
    """`x`, `(rows, width)`, as the norm sees it: less each row's mean, if it is a norm that no mean gets through."""
    return x - x.mean(-1, keepdim=True) if spec.kind == "layernorm" else x


def root_mean_square(x: torch.Tensor) -> torch.Tensor:
    """Of each row."""
    return x.square().mean(-1).sqrt()


def gain_and_bias(p: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """`min over g, b of sum |g p + b - y|^2`, channel by channel; p and y are `(rows, width)`.

    Returns:
        g and b in float64, and the error that remains, relative to the variance of y.
    """
    p, y = p.double(), y.double()
    middle, mean = p.mean(0), y.mean(0)
    p, y = p - middle, y - mean
    tiny = torch.finfo(torch.float64).tiny
    gain = (p * y).sum(0) / p.square().sum(0).clamp_min(tiny)
    error = float((gain * p - y).square().sum() / y.square().sum().clamp_min(tiny))
    return gain, mean - gain * middle, error


def least(f: Callable[[float], float], low: float, high: float, steps: int = 16) -> float:
    """Where `f`, which falls and then rises, is least between `low` and `high`: golden section search."""
    a, b = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_a, at_b = f(a), f(b)
    for _ in range(steps):
        if at_a < at_b:
            high, b, at_b = b, a, at_a
            a = high - _GOLDEN * (high - low)
            at_a = f(a)
        else:
            low, a, at_a = a, b, at_b
            b = low + _GOLDEN * (high - low)
            at_b = f(b)
    return a if at_a < at_b else b


def best_slope(error: Callable[[float], float], scale: float) -> float:
    """The slope a with the least `error(a)`, looked for from nearly linear to nearly a step on inputs of `scale`."""
    return math.exp(least(lambda log: error(math.exp(log)), math.log(0.03 / scale), math.log(3 / scale)))


def some_rows(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Rows at even distances, of all tensors the same."""
    return tuple(t[:: max(1, len(t) // _ROWS)] for t in tensors)


def threshold(scales: torch.Tensor) -> float | None:
    """Between two clusters of scales that are clearly apart, None: there is one cluster."""
    scales = scales.flatten()
    if len(scales) < 2:
        return None
    ordered = scales.clamp_min(torch.finfo(scales.dtype).tiny).sort().values.log()
    gaps = ordered.diff()
    at = int(gaps.argmax())
    few = min(at + 1, len(ordered) - at - 1) / len(ordered)
    apart = float(gaps[at]) > math.log(_APART) and few <= _FEW
    return float(((ordered[at] + ordered[at + 1]) / 2).exp()) if apart else None


def frozen_scale(scales: torch.Tensor) -> torch.Tensor:
    """The one number that stands for all: the harmonic mean, for which `E[s / c] = 1` of what divides by s."""
    tiny = torch.finfo(scales.dtype).tiny
    return scales.clamp_min(tiny).reciprocal().mean().reciprocal()


def constants(scales: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Gives for scales the constants that stand for them: one for all, or one for each of two clusters of `scales`."""
    between = threshold(scales)
    if between is None:
        c = frozen_scale(scales)
        return lambda s: c.expand_as(s)
    high, low = frozen_scale(scales[scales > between]), frozen_scale(scales[scales <= between])
    return lambda s: torch.where(s > between, high, low)


def neutral(spec: NormSpec, tensors: Tensors) -> Values:
    """Gain and bias as the norm had them, one and zero where it had none."""
    return {
        "weight": tensors.get("gain", torch.ones(spec.channels)),
        "bias": tensors.get("bias", torch.zeros(spec.channels)),
    }
