"""The scale of every token along the streams of a model, and the constants that stand for it.

A moved block adds its branch to `c n(x)` in the place of `x = s n(x)`. The error before the next norm is one of the
ratio of skip and branch, `c / s` against 1, so that c is the harmonic mean of s over tokens: `E[c / s] = 1`. On a raw
stream, where a norm is put in or taken out, the constants are those of least squares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from normswap.calibration.taps import Tap, rows, watch
from normswap.norms.spec import NormSpec


@dataclass
class Scale:
    """Sums over tokens of one value's scale.

    Attributes:
        count, inverse, total, square: number of tokens; sums of 1/s, s and s^2.
    """

    count: int = 0
    inverse: float = 0.0
    total: float = 0.0
    square: float = 0.0

    def add(self, s: torch.Tensor) -> None:
        s = s.double().flatten()
        self.count += len(s)
        self.inverse += float((1 / s).sum())
        self.total += float(s.sum())
        self.square += float(s.square().sum())

    @property
    def harmonic(self) -> float:
        return self.count / self.inverse

    @property
    def mean(self) -> float:
        """The t for which `t n(x)` is nearest to x: `E[s]`."""
        return self.total / self.count

    @property
    def least_squares(self) -> float:
        """The c for which `x / c` is nearest to n(x): `E[s^2] / E[s]`."""
        return self.square / self.total

    @property
    def spread(self) -> float:
        """The coefficient of variation."""
        return max(self.square / self.count - self.mean**2, 0.0) ** 0.5 / self.mean


def scale_of(x: torch.Tensor, spec: NormSpec) -> torch.Tensor:
    """s(x), the denominator of the norm, of the shape of `x` with 1 along the normalised axis."""
    axis = spec.axes[0]
    if spec.kind == "layernorm":
        x = x - x.mean(axis, keepdim=True)
    return (x.square().mean(axis, keepdim=True) + spec.eps).sqrt()


def normalised(x: torch.Tensor, spec: NormSpec) -> torch.Tensor:
    """n(x): the norm without gain and bias."""
    s = scale_of(x, spec)
    return (x - x.mean(spec.axes[0], keepdim=True) if spec.kind == "layernorm" else x) / s


def measure_scales(
    model: nn.Module,
    taps: Mapping[str, tuple[Tap, NormSpec]],
    batches: Sequence[Mapping[str, Any]],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Scale]:
    """The scales of values of `model`, by the names of `taps`, over all tokens of `batches` that are no padding."""
    found = {name: Scale() for name in taps}
    for done, inputs in enumerate(batches):
        seen = watch(model, [tap for tap, _ in taps.values()], inputs)
        for name, (tap, spec) in taps.items():
            if tap in seen:
                last = spec.axes[0] == -1
                value = rows(seen[tap], inputs) if last else seen[tap]
                found[name].add(scale_of(value.double(), spec))
        if progress is not None:
            progress(done + 1, len(batches))
    return {name: scale for name, scale in found.items() if scale.count}
