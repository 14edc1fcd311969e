"""A norm behind a gate that starts as the identity. Its classes are copied into the output: torch alone."""

import torch
from torch import nn

from normswap.norms.kind import Kind
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


KINDS = (
    Kind("gated-rmsnorm", GatedRMSNorm, opened="rmsnorm"),
    Kind("gated-layernorm", GatedLayerNorm, opened="layernorm"),
)
