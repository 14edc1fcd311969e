"""RMSNorm as it goes into converted models. This file is copied into the output, so it imports torch alone."""

import torch

from normswap.norms.affine import Affine


class RMSNorm(Affine):
    """`n(x) = x / sqrt(mean(x^2) + eps)` over one axis (Zhang and Sennrich, 2019)."""

    def normalised(self, x):
        return x * torch.rsqrt(x.square().mean(self.axis, keepdim=True) + self.eps)
