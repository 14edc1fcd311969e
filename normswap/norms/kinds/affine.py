"""Gain and bias, alone or behind a norm. Its classes are copied into the output: they use torch alone."""

import torch
from torch import nn

from normswap.norms.fits import gain_and_bias, neutral
from normswap.norms.formula import running_affine
from normswap.norms.kind import Direct, Fitted, Kind


class Affine(nn.Module):
    """`y = gain * n(x) + bias` over one axis; here `n(x) = x`, norms say otherwise.

    Args:
        width: size of the axis of the input, `(..., width)` or `(..., width, height, ..)`.
        eps: added under the root of a norm, in the input's units squared.
        gain: `"w"` multiplies by the weight, `"1 + w"` by one plus it, None has no weight.
        bias: whether a bias of the weight's shape is added.
        casting: how half-precision input is computed. `"float32"` rounds once, at the end (as a fused LayerNorm
            does); `"float32-before-gain"` rounds before the gain; `"input"` computes in the input's dtype.
        axis: the axis, counted from the end.
        shape: of weight and bias, `(width,)` unless each head has its own; then `(heads, width)`.
    """

    def __init__(self, width, eps=0.0, gain="w", bias=False, casting="float32", axis=-1, shape=None):
        super().__init__()
        self.width, self.eps, self.gain, self.casting, self.axis = width, eps, gain, casting, axis
        unit = torch.zeros if gain == "1 + w" else torch.ones
        shape = (width,) if shape is None else shape
        self.weight = nn.Parameter(unit(shape)) if gain else None
        self.bias = nn.Parameter(torch.zeros(shape)) if bias else None

    def normalised(self, x):
        return x

    def forward(self, x):
        # a norm's output is contiguous whatever its input's strides: callers go on with `.view`
        x = x.contiguous()
        h = x if self.casting == "input" else x.to(torch.promote_types(x.dtype, torch.float32))
        h = self.normalised(h)
        if self.casting == "float32-before-gain":
            h = h.to(x.dtype)
        if self.weight is not None:
            weight = self.placed(self.weight).to(h.dtype)
            h = h * (1 + weight if self.gain == "1 + w" else weight)
        if self.bias is not None:
            h = h + self.placed(self.bias).to(h.dtype)
        return h.to(x.dtype)

    def placed(self, parameter):
        """`parameter`, shaped to act along the axis."""
        return parameter.reshape(*parameter.shape, *[1] * (-1 - self.axis))

    def extra_repr(self):
        return f"{self.width}, eps={self.eps:g}, gain={self.gain}, bias={self.bias is not None}, axis={self.axis}"


def _frozen(spec, tensors):
    scale, shift = running_affine(tensors, spec.eps)
    return {"weight": scale, "bias": shift}


def _fit(samples):
    gain, bias, _ = gain_and_bias(samples.x, samples.y)
    return {"weight": gain, "bias": bias}


KINDS = (
    Kind(
        "affine",
        Affine,
        "A gain and a bias; of a BatchNorm exactly, as its running statistics are constants; of a GroupNorm fitted.",
        {"batchnorm": Direct(_frozen), "groupnorm": Fitted(_fit, neutral)},
    ),
    Kind("identity", nn.Identity),
)
