"""RepBN in the place of a norm: a BatchNorm that becomes a fixed affine map. Its classes are copied into the output.

Fitted: the best affine map of each channel against what the norm gave, y = a x + c, written as `eta x + BN(x)`: eta is
the best single slope for all channels, so that the batch norm, which is noise in training, carries only what is left.
"""

import torch
from torch import nn

from normswap.norms.fits import gain_and_bias, neutral
from normswap.norms.kind import Fitted, Kind, Samples, Tensors, Values
from normswap.norms.kinds.layer_norm import LayerNorm
from normswap.norms.kinds.rms_norm import RMSNorm
from normswap.norms.spec import NormSpec


class RepBN:
    """Mixin: `ramp N(x) + (1 - ramp) (eta x + BN(x))`, with N the norm beside it (SLAB, Guo et al., 2024).

    `BN(x) = bn_weight (x - mean) / sqrt(var + eps) + bn_bias` per channel: by the running statistics in evaluation; in
    training by those of the batch, over all tokens that `masks` keep and over all processes of the default group.
    `ramp` goes from 1 to 0 in training and counts in evaluation too; at 0 the whole is an affine map (`affine`).
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.bn_weight = nn.Parameter(torch.ones(self.width))
        self.bn_bias = nn.Parameter(torch.zeros(self.width))
        self.eta = nn.Parameter(torch.ones(1))
        # under these names: by `running_mean`, transformers takes a module for torch's own BatchNorm
        self.register_buffer("bn_mean", torch.zeros(self.width))
        self.register_buffer("bn_var", torch.ones(self.width))
        self.register_buffer("ramp", torch.zeros(1))
        self.momentum = 0.1
        # what the model was called with, `(batch, tokens)`; kept until the next call, for checkpointed gradients
        self.masks = ()

    def forward(self, x):
        h = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.training:
            mean, var, count = self.statistics(h)
            self.update(mean, var, count)
        else:
            mean, var = self.bn_mean.to(h.dtype), self.bn_var.to(h.dtype)
        slope = self.bn_weight.to(h.dtype) * torch.rsqrt(var + self.eps)
        shift = self.bn_bias.to(h.dtype) - slope * mean
        y = (self.placed(slope + self.eta.to(h.dtype)) * h + self.placed(shift)).to(x.dtype)
        return torch.lerp(y, super().forward(x), self.ramp.to(x.dtype)).contiguous()

    def statistics(self, h):
        """Mean and variance of each channel, and over how many tokens, with gradients, over all processes."""
        rows = h.movedim(self.axis, -1)
        keep = torch.ones(rows.shape[:-1], dtype=torch.bool, device=rows.device)
        for mask in self.masks:
            if mask.shape == keep.shape:
                keep = keep & mask.to(keep)
        weights = keep.unsqueeze(-1).to(rows.dtype)
        over = tuple(range(rows.ndim - 1))
        count = self.everywhere(weights.sum())
        mean = self.everywhere((weights * rows).sum(over)) / count
        var = self.everywhere((weights * (rows - mean).square()).sum(over)) / count
        return mean, var, count

    @torch.no_grad()
    def update(self, mean, var, count):
        """Running statistics as those of `nn.BatchNorm1d`: of the variance, the unbiased estimate.

        Not in a backward pass, where checkpointed activations are computed a second time.
        """
        if torch._C._current_graph_task_id() != -1:
            return
        unbiased = var * count / (count - 1).clamp_min(1)
        self.bn_mean.lerp_(mean.to(self.bn_mean), self.momentum)
        self.bn_var.lerp_(unbiased.to(self.bn_var), self.momentum)

    def affine(self):
        """Slope and shift of each channel in evaluation; only while `ramp` is 0."""
        slope = self.bn_weight * torch.rsqrt(self.bn_var + self.eps)
        return slope + self.eta, self.bn_bias - slope * self.bn_mean

    @staticmethod
    def everywhere(total):
        """The sum over all processes, which gradients follow; the sum itself where there is one process."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            from torch.distributed.nn.functional import all_reduce

            return all_reduce(total)
        return total

    def watch(self, model):
        """Have `model` hand its masks to the norms in it, whenever it is called."""
        if RepBN.hand_masks not in model._forward_pre_hooks.values():
            model.register_forward_pre_hook(RepBN.hand_masks, with_kwargs=True)

    @staticmethod
    def hand_masks(model, args, kwargs):
        """Give every RepBN of `model` the masks that it is called with."""
        from inspect import signature

        given = signature(model.forward).bind_partial(*args, **kwargs).arguments
        given = {**given, **given.get("kwargs", {})}
        masks = tuple(m for name, m in given.items() if name.endswith("attention_mask") and torch.is_tensor(m))
        for module in model.modules():
            if isinstance(module, RepBN):
                module.masks = masks


class RepBNLayerNorm(RepBN, LayerNorm):
    """RepBN in the place of a LayerNorm."""


class RepBNRMSNorm(RepBN, RMSNorm):
    """RepBN in the place of an RMSNorm."""


def fit(samples: Samples) -> Values:
    x, y = samples.x.double(), samples.y
    mean, var = x.mean(0), x.var(0, correction=0)
    a, c, _ = gain_and_bias(x, y)
    # gain_and_bias has a = cov(x, y) / var(x) per channel: the best slope for all together
    eta = (a * var).sum() / var.sum()
    weight = (a - eta) * (var + samples.spec.eps).sqrt()
    return {
        "bn_weight": weight,
        "bn_bias": c + a * mean - eta * mean,
        "eta": eta.reshape(1),
        "bn_mean": mean,
        "bn_var": var,
    }


def start(spec: NormSpec, tensors: Tensors) -> Values:
    """As in the repository of SLAB: eta is 1, and statistics are yet to be measured."""
    own = neutral(spec, tensors)
    return own | {
        "bn_weight": own["weight"],
        "bn_bias": own["bias"],
        "eta": torch.ones(1),
        "bn_mean": torch.zeros(spec.channels),
        "bn_var": torch.ones(spec.channels),
        "ramp": torch.zeros(1),
    }


KINDS = (
    Kind(
        "repbn",
        RepBNLayerNorm,
        "RepBN, BN(x) + eta x over unmasked tokens, with a ramp from the old norm; an affine map in evaluation.",
        {"layernorm": Fitted(fit, start), "rmsnorm": Fitted(fit, start, into="repbn-rms")},
    ),
    Kind("repbn-rms", RepBNRMSNorm),
)
