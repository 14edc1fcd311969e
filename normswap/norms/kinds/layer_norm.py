"""LayerNorm as it goes into converted models. Its classes are copied into the output: they use torch alone."""

import torch

from normswap.norms.kind import Kind
from normswap.norms.kinds.affine import Affine


class LayerNorm(Affine):
    """`n(x) = (x - mean(x)) / sqrt(var(x) + eps)` over one axis (Ba, Kiros and Hinton, 2016)."""

    def normalised(self, x):
        x = x - x.mean(self.axis, keepdim=True)
        return x * torch.rsqrt(x.square().mean(self.axis, keepdim=True) + self.eps)


KINDS = (Kind("layernorm", LayerNorm),)
