"""RMSNorm as it goes into converted models. Its classes are copied into the output: they use torch alone."""

import torch

from normswap.norms.kind import Kind, Rewrite
from normswap.norms.kinds.affine import Affine


class RMSNorm(Affine):
    """`n(x) = x / sqrt(mean(x^2) + eps)` over one axis (Zhang and Sennrich, 2019)."""

    def normalised(self, x):
        return x * torch.rsqrt(x.square().mean(self.axis, keepdim=True) + self.eps)


KINDS = (
    Kind(
        "rmsnorm",
        RMSNorm,
        "Root mean square norm; of a LayerNorm exactly, everything that writes to its stream being centred.",
        {"layernorm": Rewrite("centre")},
    ),
)
