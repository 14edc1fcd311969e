"""Batch norms as they run: a fixed affine map of each channel, by running statistics."""

from __future__ import annotations

import torch
from torch import nn

from normswap.norms.formula import placed, running_affine
from normswap.norms.spec import NormSpec

_TOLERANCE = 1e-8  # float64 throughout


class Running:
    """Tells what each vector of a module does to its output: mean, variance, gain or bias.

    Args:
        module: in float64, on the CPU, in eval mode.
        original: the same module as the model holds it.
        x: an input, batch first.
    """

    def __init__(self, module: nn.Module, original: nn.Module, x: torch.Tensor):
        self.module, self.original, self.x = module, original, x
        self.y = module(x)
        named = (*module.named_parameters(), *module.named_buffers())
        self.vectors = {name: t for name, t in named if t.is_floating_point() and t.numel() > 1}

    def spec(self) -> NormSpec | None:
        axis = self._axis()
        if axis is None:
            return None
        does: dict[str, str] = {}
        for name in self.vectors:
            what = self._what(name)
            if what is None or what in does:
                return None
            does[what] = name
        if not {"mean", "variance"} <= does.keys():
            return None
        gain = None
        if "gain" in does:
            gain = "w" if _close(*self._at_zero(does)) else "1 + w"
        spec = NormSpec(
            kind="batchnorm",
            axes=(axis - self.x.ndim,),
            width=1,
            groups=self.x.shape[axis],
            gain=gain,
            weight=does.get("gain"),
            bias=does.get("bias"),
            mean=does["mean"],
            variance=does["variance"],
            eps=self._eps(does),
        )
        own = {does: self.vectors[name].flatten() for does, name in spec.tensors.items()}
        own |= {"gain": 1 + own["gain"]} if gain == "1 + w" else {}
        a, c = (placed(t, self.x.ndim, spec) for t in running_affine(own, spec.eps))
        expected = a * self.x + c
        return spec if _close(expected, self.y) else None

    def _axis(self) -> int | None:
        """The axis that all vectors lie along."""
        axes = set()
        for v in self.vectors.values():
            moved = self._with(v, lambda v: v.view(-1)[0].add_(1)) != self.y
            along = [i for i, at in enumerate(moved.nonzero().T.tolist()) if len(set(at)) == 1 < self.x.shape[i]]
            axes.add(along[0] if len(along) == 1 and self.x.shape[along[0]] == v.numel() else None)
        return axes.pop() if len(axes) == 1 else None

    def _with(self, vector: torch.Tensor, change, x: torch.Tensor | None = None) -> torch.Tensor:
        before = vector.clone()
        change(vector)
        y = self.module(self.x if x is None else x)
        vector.copy_(before)
        return y

    def _what(self, name: str) -> str | None:
        """Statistics and biases move the output alike at every input or not; gains do so in proportion."""
        v = self.vectors[name]
        moved = self._with(v, lambda v: v.add_(1)) - self.y
        elsewhere = self._with(v, lambda v: v.add_(1), self.x.roll(1, 0)) - self.module(self.x.roll(1, 0))
        if (moved - elsewhere).abs().max() <= 1e-6 * moved.abs().max():
            return "bias" if (moved - 1).abs().max() <= 1e-6 else "mean"
        twice = self._with(v, lambda v: v.add_(2)) - self.y
        return "gain" if _close(twice, 2 * moved) else "variance"

    def _at_zero(self, does: dict[str, str]) -> tuple[torch.Tensor, torch.Tensor]:
        """The output with a gain of zero on two inputs: the same, unless the gain is one plus it."""
        gain = self.vectors[does["gain"]]
        return self._with(gain, lambda v: v.zero_()), self._with(gain, lambda v: v.zero_(), 2 * self.x)

    def _eps(self, does: dict[str, str]) -> float:
        """From the slope of the affine, `gain / sqrt(variance + eps)`, at two variances near zero."""
        variance = self.vectors[does["variance"]]

        def slope(at: float) -> torch.Tensor:
            above, below = (self._with(variance, lambda v: v.fill_(at), x) for x in (self.x + 1, self.x))
            return above - below

        slopes = [slope(0.0), slope(1.0)]
        # (slope at 0 / slope at 1)^2 = (1 + eps) / eps
        ratio = float((slopes[0].abs().max() / slopes[1].abs().max()) ** 2)
        return 0.0 if not ratio < 1e24 else exact_eps(self.original, 1 / (ratio - 1))


def exact_eps(module: nn.Module, measured: float) -> float:
    """The number the module itself holds, where one agrees with the measurement; else the measurement, rounded."""
    held = [v for v in vars(module).values() if isinstance(v, float) and v and abs(v / (measured or 1) - 1) < 1e-3]
    return held[0] if held else float(f"{measured:.8g}")


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= _TOLERANCE * b.abs().max())
