"""A normalised stream that carries its scale in one more lane. Its classes are copied into the output: torch alone."""

import torch
from torch import nn

from normswap.norms.kind import Kind
from normswap.norms.kinds.affine import Affine
from normswap.norms.kinds.layer_norm import LayerNorm
from normswap.norms.kinds.rms_norm import RMSNorm


class Carried:
    """Mixin: `[n(x), s]`, of shape `(..., width + 1)`, with n the norm beside it, without a gain, and `x = s n(x)`.

    (Of a LayerNorm x has lost its mean, which no LayerNorm sees.)
    """

    def forward(self, x):
        h = self.around(x.to(torch.promote_types(x.dtype, torch.float32)))
        s = torch.sqrt(h.square().mean(-1, keepdim=True) + self.eps)
        return torch.cat([h / s, s], dim=-1).to(x.dtype)


class CarriedRMSNorm(Carried, RMSNorm):
    """RMSNorm that carries its scale."""

    def around(self, x):
        return x


class CarriedLayerNorm(Carried, LayerNorm):
    """LayerNorm that carries its scale."""

    def around(self, x):
        return x - x.mean(-1, keepdim=True)


class CarriedAffine(Affine):
    """Gain and bias on `n` of `[n, s]`."""

    def forward(self, x):
        return super().forward(x[..., :-1])


class Recovered(nn.Module):
    """`s n` from `[n, s]`: the stream as it was. Takes the arguments of all norms and has no parameters."""

    def __init__(self, **arguments):
        super().__init__()

    def forward(self, x):
        return x[..., :-1] * x[..., -1:]


KINDS = (
    Kind("carried-rmsnorm", CarriedRMSNorm),
    Kind("carried-layernorm", CarriedLayerNorm),
    Kind("carried-affine", CarriedAffine),
    Kind("recovered", Recovered),
)
