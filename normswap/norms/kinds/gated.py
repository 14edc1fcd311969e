"""A norm behind a gate that starts as the identity. Its classes are copied into the output: torch alone.

With a gain of 1 an opened gate would give all heads one scale, whatever they had; `calibration.inserted` fits gain and
bias to change less.
"""

import torch
from torch import nn

from normswap.norms.kind import Kind, Values
from normswap.norms.kinds.layer_norm import LayerNorm
from normswap.norms.kinds.rms_norm import RMSNorm


class Gated:
    """Mixin: `x + gate (N(x) - x)` with N the norm beside it; at first `gate` is 0, trained to 1 it is the norm."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x + self.gate.to(x.dtype) * (super().forward(x) - x)


class GatedRMSNorm(Gated, RMSNorm):
    """RMSNorm behind a gate."""


class GatedLayerNorm(Gated, LayerNorm):
    """LayerNorm behind a gate."""


def least_gain(n: torch.Tensor, x: torch.Tensor, weights: torch.Tensor) -> Values:
    """`min over g of sum w |g n - x|^2`, channel by channel."""
    n, x, w = n.double(), x.double(), weights.double()[:, None]
    return {"weight": (w * n * x).sum(0) / (w * n.square()).sum(0).clamp_min(torch.finfo(torch.float64).tiny)}


def least_gain_and_bias(n: torch.Tensor, x: torch.Tensor, weights: torch.Tensor) -> Values:
    """`min over g, b of sum w |g n + b - x|^2`, channel by channel."""
    n, x, w = n.double(), x.double(), (weights / weights.mean()).double()[:, None]
    at_n, at_x = (w * n).mean(0), (w * x).mean(0)
    gain = least_gain(n - at_n, x - at_x, weights)["weight"]
    return {"weight": gain, "bias": at_x - gain * at_n}


KINDS = (
    Kind("gated-rmsnorm", GatedRMSNorm, opened="rmsnorm", inserted=least_gain),
    Kind("gated-layernorm", GatedLayerNorm, opened="layernorm", inserted=least_gain_and_bias),
)
