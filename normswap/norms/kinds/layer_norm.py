"""LayerNorm as it goes into converted models. Its classes are copied into the output: they use torch alone."""

import torch

from normswap.norms.fits import neutral
from normswap.norms.kind import Direct, Fitted, Kind, Rewrite
from normswap.norms.kinds.affine import Affine
from normswap.norms.moments import as_on_average, moments


class LayerNorm(Affine):
    """`n(x) = (x - mean(x)) / sqrt(var(x) + eps)` over one axis (Ba, Kiros and Hinton, 2016)."""

    def normalised(self, x):
        x = x - x.mean(self.axis, keepdim=True)
        return x * torch.rsqrt(x.square().mean(self.axis, keepdim=True) + self.eps)


class MirroredLayerNorm(Affine):
    """RMSNorm by a LayerNorm over twice the channels, for engines that have no other: `n(x) = LN([x, -x])[:width]`.

    `[x, -x]` has no mean, and its variance is `mean(x^2)`, so that eps stays.
    """

    def normalised(self, x):
        x = x.movedim(self.axis, -1)
        both = torch.cat([x, -x], -1)
        first = torch.nn.functional.layer_norm(both, both.shape[-1:], eps=self.eps)[..., : self.width]
        return first.movedim(-1, self.axis)


KINDS = (
    Kind(
        "layernorm",
        LayerNorm,
        "Statistics of each token by itself; of an RMSNorm, its stream is rotated so that the mean is what is missed "
        "least; of a BatchNorm, with gains matched on data.",
        {"rmsnorm": Rewrite("rotate"), "batchnorm": Fitted(moments, as_on_average, alone=True)},
        exact="mirrored-layernorm",
    ),
    Kind(
        "mirrored-layernorm",
        MirroredLayerNorm,
        "An RMSNorm computed as half of a LayerNorm of [x, -x], for engines that have LayerNorm alone.",
        {"rmsnorm": Direct(neutral)},
    ),
)
