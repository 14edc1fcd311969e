"""GroupNorm as it goes into converted models. Its classes are copied into the output: they use torch alone."""

import math

import torch

from normswap.norms.kind import Fitted, Kind
from normswap.norms.kinds.affine import Affine
from normswap.norms.moments import as_on_average, moments


class GroupNorm(Affine):
    """`n(x) = (x - mean(x)) / sqrt(var(x) + eps)` over some neighbouring channels and all positions of one input.

    `gcd(32, width)` groups (Wu and He, 2018, use 32; Opacus chooses so for any width). Positions are the axes behind
    the channels: `(batch, width, height, ..)`; of `(batch, width)` there is one.
    """

    def normalised(self, x):
        channels = x.ndim + self.axis
        groups = next(n for n in (32, 16, 8, 4, 2, 1) if self.width % n == 0)
        h = x.unflatten(channels, (groups, -1))
        together = tuple(range(channels + 1, h.ndim))
        h = h - h.mean(together, keepdim=True)
        h = h * torch.rsqrt(h.square().mean(together, keepdim=True) + self.eps)
        return h.flatten(channels, channels + 1)


def _as_on_average(spec, tensors):
    return as_on_average(spec, tensors, math.gcd(32, spec.channels))


KINDS = (
    Kind(
        "groupnorm",
        GroupNorm,
        "Statistics of each input by itself, over groups of channels; of a BatchNorm, with gains matched on data.",
        {"batchnorm": Fitted(moments, _as_on_average, alone=True)},
    ),
)
