"""No norm: a frozen scale per site. Its classes are copied into the output: they use torch alone.

`y = g z / s + b`, z what the norm saw (of a LayerNorm, x less its mean) and s one number, the harmonic mean over tokens
of the scale that the norm divided each by: `1 / s = E[1 / s_t]`. Gain and
bias are least squares per channel against what the norm gave.

Some models give a few tokens a scale far from all others', the first one above all (Heimersheim, 2024, keeps position 0
apart). A module that runs with a cache or behind padding does not know which token is the first, but it can see the
scale: where the data have two clusters of scales clearly apart, and nowhere else, the site gets a second s, for tokens
whose root mean square is beyond a threshold between them.

`none-eps` is the same map by a norm of the model's own class: with an eps of E, large against every variance v,

    g' z / sqrt(v + E) = g z / s (1 - v / 2E + ..),        g' = g sqrt(E) / s,

so that the folder needs no class of ours. It has one scale, and a bias only where the norm has one.
"""

import torch

from normswap.norms.fits import around, frozen_scale, gain_and_bias, neutral, root_mean_square, threshold
from normswap.norms.kind import Fitted, Kind, Samples, Tensors, Values
from normswap.norms.kinds.affine import Affine
from normswap.norms.spec import NormSpec


class Frozen(Affine):
    """`n(x) = x / scale` with one number for all tokens."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("scale", torch.ones(1))

    def normalised(self, x):
        return x / self.scale.to(x.dtype)


class FrozenCentred(Frozen):
    """`n(x) = (x - mean(x)) / scale`, for a norm that takes the mean out."""

    def normalised(self, x):
        return super().normalised(x - x.mean(self.axis, keepdim=True))


class Apart(Frozen):
    """A frozen scale, and `far` for tokens whose root mean square is beyond `threshold` (below it, if `far` is)."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("far", torch.ones(1))
        self.register_buffer("threshold", torch.ones(1))

    def normalised(self, x):
        rms = x.square().mean(self.axis, keepdim=True).sqrt()
        beyond = (rms > self.threshold.to(x.dtype)) == (self.far > self.scale)
        return x / torch.where(beyond, self.far, self.scale).to(x.dtype)


class ApartCentred(Apart):
    """Two frozen scales, for a norm that takes the mean out."""

    def normalised(self, x):
        return super().normalised(x - x.mean(self.axis, keepdim=True))


def fit(samples: Samples) -> Values:
    z, y = around(samples.x, samples.spec), samples.y
    scales = root_mean_square(z).double()
    between = threshold(scales)
    if between is None:
        s = frozen_scale(scales)
        gain, bias, _ = gain_and_bias(z / s.to(z.dtype), y)
        return {"weight": gain, "bias": bias, "scale": s.reshape(1)}
    large = scales > between
    far = large if large.sum() * 2 < len(large) else ~large
    s = frozen_scale(scales[~far])
    gain, bias, _ = gain_and_bias(z[~far] / s.to(z.dtype), y[~far])
    # g z / far + b is to be y: least squares for 1 / far
    p, wanted = gain * z[far].double(), y[far].double() - bias
    other = p.square().sum() / (p * wanted).sum()
    other = other if other > 0 else frozen_scale(scales[far])
    return {
        "weight": gain,
        "bias": bias,
        "scale": s.reshape(1),
        "far": other.reshape(1),
        "threshold": torch.tensor([between]),
    }


def fit_one(samples: Samples) -> Values:
    """One scale for all tokens."""
    z, y = around(samples.x, samples.spec).double(), samples.y.double()
    s = frozen_scale(root_mean_square(z))
    gain, bias, _ = gain_and_bias(z / s, y)
    return {"weight": gain, "bias": bias, "scale": s.reshape(1)}


def fit_as_built(samples: Samples) -> Values:
    """One scale for all tokens, and a bias only where the norm had one."""
    if samples.spec.bias is not None:
        return fit_one(samples)
    z, y = around(samples.x, samples.spec).double(), samples.y.double()
    s = frozen_scale(root_mean_square(z))
    gain = s * (z * y).sum(0) / z.square().sum(0).clamp_min(torch.finfo(torch.float64).tiny)
    return {"weight": gain, "bias": torch.zeros_like(gain), "scale": s.reshape(1)}


def start(spec: NormSpec, tensors: Tensors) -> Values:
    return neutral(spec, tensors) | {name: torch.ones(1) for name in ("scale", "far", "threshold")}


_CENTRED = Fitted(fit, start, into="none-centred", into_apart="none-centred-apart", centred=True)
KINDS = (
    Kind(
        "none",
        Frozen,
        "No norm: one frozen scale per site (two where some tokens are far apart), gain and bias fitted.",
        {
            "rmsnorm": Fitted(fit, start, into_apart="none-apart"),
            "layernorm": _CENTRED,
            # of a map no token has a scale: statistics are of all its positions
            "groupnorm": Fitted(fit_one, start),
        },
    ),
    Kind(
        "none-eps",
        Frozen,
        "As none, by norms of the model's own class with an eps that outweighs every variance: no class of ours.",
        {
            "rmsnorm": Fitted(fit_as_built, start, into="none"),
            "layernorm": Fitted(fit_as_built, start, "none-centred", centred=True),
        },
        by_eps=True,
    ),
    Kind("none-centred", FrozenCentred),
    Kind("none-apart", Apart),
    Kind("none-centred-apart", ApartCentred),
)
