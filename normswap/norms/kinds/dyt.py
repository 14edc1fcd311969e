"""Dynamic tanh in the place of a norm. Its class is copied into the output: it uses torch alone.

Fitted: for a given slope, gain and bias are least squares per channel against what the norm gave; the slope is the one
that leaves the least error.
"""

import torch
from torch import nn

from normswap.norms.fits import best_slope, gain_and_bias, neutral, root_mean_square, some_rows
from normswap.norms.kind import Fitted, Kind, Samples, Tensors, Values
from normswap.norms.kinds.affine import Affine
from normswap.norms.spec import NormSpec

#: of the paper, where nothing is known
START = 0.5
# tanh' is below a tenth of what it is at 0 from here on: artanh(sqrt(0.9))
_FLAT = 1.8184


class DyT(Affine):
    """`n(x) = tanh(alpha x)`, element by element (Zhu et al., 2025)."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.alpha = nn.Parameter(torch.full((1,), 0.5))

    def normalised(self, x):
        return torch.tanh(self.alpha.to(x.dtype) * x)


def fit(samples: Samples) -> Values:
    x, y = some_rows(samples.x, samples.y)
    scale = float(root_mean_square(x).mean())
    alpha = best_slope(lambda a: gain_and_bias(torch.tanh(a * x), y)[2], scale)
    gain, bias, _ = gain_and_bias(torch.tanh(alpha * samples.x), samples.y)
    return {"weight": gain, "bias": bias, "alpha": torch.tensor([alpha])}


def start(spec: NormSpec, tensors: Tensors) -> Values:
    return neutral(spec, tensors) | {"alpha": torch.full((1,), START)}


def flat(values: Values, x: torch.Tensor) -> torch.Tensor:
    return (values["alpha"].to(x.dtype) * x).abs() > _FLAT


_ROUTE = Fitted(fit, start, flat=flat)
KINDS = (
    Kind(
        "dyt",
        DyT,
        "Dynamic tanh, g tanh(a x) + b: no statistics. Fitted to what each norm gave.",
        {"layernorm": _ROUTE, "rmsnorm": _ROUTE, "batchnorm": _ROUTE, "groupnorm": _ROUTE},
    ),
)
