"""Gain and bias of a norm that takes the place of a batch norm."""

from __future__ import annotations

import torch

from normswap.norms.formula import running_affine
from normswap.norms.kind import Samples, Tensors, Values
from normswap.norms.spec import NormSpec


def moments(samples: Samples) -> Values:
    """The gain and bias with which each channel has the mean and the variance that the batch norm gave it.

    With n what the new norm makes of x, `g = sign(cov(n, y)) std(y) / std(n)`, `b = mean(y) - g mean(n)`. Least squares
    would shrink g by the correlation of n and y, site after site: that costs more than it gains. A channel whose n does
    not vary has gain 0, and gives the mean of y.
    """
    n, y = samples.normalised.double(), samples.y.double()
    centred, wanted = n - n.mean(0), y - y.mean(0)
    spread = centred.square().mean(0).sqrt()
    gain = (centred * wanted).mean(0).sign() * wanted.square().mean(0).sqrt() / spread.clamp_min(1e-150)
    gain = torch.where(spread > 0, gain, 0)
    return {"weight": gain, "bias": y.mean(0) - gain * n.mean(0)}


def as_on_average(spec: NormSpec, tensors: Tensors, groups: int = 1) -> Values:
    """Gain and bias with which a norm over groups of channels is the batch norm, on inputs like those of its training.

    The running statistics m, v of the channels give those of a group, M = mean(m) and V = mean(v + m^2) - M^2. Where an
    input has just these, `n = (x - M) / sqrt(V + eps)`, so that the batch norm's `a x + c` is

        a sqrt(V + eps) n + (a M + c).
    """
    a, c = running_affine(tensors, spec.eps)
    mean, variance = (tensors[name].unflatten(0, (groups, -1)) for name in ("mean", "variance"))
    of_group = mean.mean(1, keepdim=True)
    spread = (variance + mean.square()).mean(1, keepdim=True) - of_group.square() + spec.eps
    of_group, root = (t.expand_as(mean).flatten() for t in (of_group, spread.sqrt()))
    return {"weight": a * root, "bias": a * of_group + c}
