"""LayerNorm as it goes into converted models. Its classes are copied into the output: they use torch alone."""

import torch

from normswap.norms.fitting import as_on_average, moments
from normswap.norms.kind import Fitted, Kind
from normswap.norms.kinds.affine import Affine


class LayerNorm(Affine):
    """`n(x) = (x - mean(x)) / sqrt(var(x) + eps)` over one axis (Ba, Kiros and Hinton, 2016)."""

    def normalised(self, x):
        x = x - x.mean(self.axis, keepdim=True)
        return x * torch.rsqrt(x.square().mean(self.axis, keepdim=True) + self.eps)


KINDS = (
    Kind(
        "layernorm",
        LayerNorm,
        "Statistics of each token or pixel by itself; of a BatchNorm, with gains matched on data.",
        {"batchnorm": Fitted(moments, as_on_average, alone=True)},
    ),
)
