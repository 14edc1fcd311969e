"""Dynamic erf in the place of a norm. Its class is copied into the output: it uses torch alone.

Fitted as DyT is, with a shift besides the slope: each is searched for in turn.
"""

import torch
from torch import nn

from normswap.norms.fits import best_slope, gain_and_bias, least, neutral, root_mean_square, some_rows
from normswap.norms.kind import Fitted, Kind, Samples, Tensors, Values
from normswap.norms.kinds.affine import Affine
from normswap.norms.kinds.dyt import START
from normswap.norms.spec import NormSpec

# erf' is below a tenth of what it is at 0 from here on: sqrt(log(10))
_FLAT = 1.5174


class Derf(Affine):
    """`n(x) = erf(alpha x + shift)`, element by element (Chen et al., 2025)."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.alpha = nn.Parameter(torch.full((1,), 0.5))
        self.shift = nn.Parameter(torch.zeros(1))

    def normalised(self, x):
        return torch.erf(self.alpha.to(x.dtype) * x + self.shift.to(x.dtype))


def fit(samples: Samples) -> Values:
    x, y = some_rows(samples.x, samples.y)
    scale = float(root_mean_square(x).mean())

    def error(alpha: float, shift: float) -> float:
        return gain_and_bias(torch.erf(alpha * x + shift), y)[2]

    shift = 0.0
    for _ in range(2):
        alpha = best_slope(lambda a, s=shift: error(a, s), scale)
        shift = least(lambda s, a=alpha: error(a, s), -1.0, 1.0)
    gain, bias, _ = gain_and_bias(torch.erf(alpha * samples.x + shift), samples.y)
    return {"weight": gain, "bias": bias, "alpha": torch.tensor([alpha]), "shift": torch.tensor([shift])}


def start(spec: NormSpec, tensors: Tensors) -> Values:
    return neutral(spec, tensors) | {"alpha": torch.full((1,), START), "shift": torch.zeros(1)}


def flat(values: Values, x: torch.Tensor) -> torch.Tensor:
    return (values["alpha"].to(x.dtype) * x + values["shift"].to(x.dtype)).abs() > _FLAT


_ROUTE = Fitted(fit, start, flat=flat)
KINDS = (
    Kind(
        "derf",
        Derf,
        "Dynamic erf, g erf(a x + s) + b: no statistics. Fitted to what each norm gave.",
        {"layernorm": _ROUTE, "rmsnorm": _ROUTE, "batchnorm": _ROUTE, "groupnorm": _ROUTE},
    ),
)
