"""LayerNorm as it goes into converted models. This file is copied into the output, so it imports torch alone."""

import torch

from normswap.norms.affine import Affine


class LayerNorm(Affine):
    """`n(x) = (x - mean(x)) / sqrt(var(x) + eps)` over one axis (Ba, Kiros and Hinton, 2016)."""

    def normalised(self, x):
        x = x - x.mean(self.axis, keepdim=True)
        return x * torch.rsqrt(x.square().mean(self.axis, keepdim=True) + self.eps)
