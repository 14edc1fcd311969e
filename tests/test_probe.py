"""Norms are recognised by what they do: kind, axes, gain form, bias, eps and casting; others are called none."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.convnext.modeling_convnext import ConvNextLayerNorm
from transformers.models.detr.modeling_detr import DetrFrozenBatchNorm2d
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearRMSNormGated
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated
from transformers.models.mobilebert.modeling_mobilebert import NoNorm
from transformers.models.nemotron.modeling_nemotron import NemotronLayerNorm1P
from transformers.models.olmo.modeling_olmo import OlmoLayerNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated
from transformers.models.t5.modeling_t5 import T5LayerNorm

from normswap.norms.centred import centre_output
from normswap.norms.kinds.rms_norm import RMSNorm
from normswap.norms.probe import formula, probe

WIDTH = 24
TOKENS = (3, 5, WIDTH)
IMAGES = (3, WIDTH, 4, 5)

# module -> (kind, gain form, has bias, eps, casting)
ON_TOKENS = {
    "layernorm": (lambda: nn.LayerNorm(WIDTH), ("layernorm", "w", True, 1e-5, "float32")),
    "layernorm, no bias": (lambda: nn.LayerNorm(WIDTH, bias=False), ("layernorm", "w", False, 1e-5, "float32")),
    "layernorm, weightless": (
        lambda: nn.LayerNorm(WIDTH, elementwise_affine=False),
        ("layernorm", None, False, 1e-5, "float32"),
    ),
    "rmsnorm": (lambda: nn.RMSNorm(WIDTH, eps=1e-6), ("rmsnorm", "w", False, 1e-6, "float32")),
    "ours": (lambda: RMSNorm(WIDTH, 1e-6, "w", bias=True), ("rmsnorm", "w", True, 1e-6, "float32")),
    "ours, 1 + w": (
        lambda: RMSNorm(WIDTH, 1e-6, "1 + w", casting="float32-before-gain"),
        ("rmsnorm", "1 + w", False, 1e-6, "float32-before-gain"),
    ),
    "ours, weightless": (lambda: RMSNorm(WIDTH, 1e-5, None), ("rmsnorm", None, False, 1e-5, "float32")),
    "ours, no cast": (lambda: RMSNorm(WIDTH, 1e-5, "w", casting="input"), ("rmsnorm", "w", False, 1e-5, "input")),
    "llama": (lambda: LlamaRMSNorm(WIDTH, eps=1e-6), ("rmsnorm", "w", False, 1e-6, "float32-before-gain")),
    "olmo2": (lambda: Olmo2RMSNorm(WIDTH, eps=1e-5), ("rmsnorm", "w", False, 1e-5, "float32")),
    "t5 (called LayerNorm)": (lambda: T5LayerNorm(WIDTH), ("rmsnorm", "w", False, 1e-6, "float32-before-gain")),
    "gemma2": (lambda: Gemma2RMSNorm(WIDTH, eps=1e-6), ("rmsnorm", "1 + w", False, 1e-6, "float32")),
    "nemotron": (lambda: NemotronLayerNorm1P(WIDTH, eps=1e-5), ("layernorm", "1 + w", True, 1e-5, "float32")),
    "olmo": (lambda: OlmoLayerNorm(WIDTH), ("layernorm", None, False, 1e-5, "float32")),
    "cohere": (lambda: CohereLayerNorm(WIDTH, eps=1e-5), ("layernorm", "w", False, 1e-5, "float32")),
    "convnext, channels last": (lambda: ConvNextLayerNorm(WIDTH, eps=1e-6), ("layernorm", "w", True, 1e-6, "float32")),
}


def told(spec):
    return spec.kind, spec.gain, spec.bias is not None, spec.eps, spec.casting


@pytest.mark.parametrize("name", ON_TOKENS)
def test_norms_of_tokens(name):
    make, expected = ON_TOKENS[name]
    spec = probe(make(), TOKENS)
    assert spec is not None
    assert told(spec) == expected
    assert (spec.axes, spec.width) == ((-1,), WIDTH)


@pytest.mark.parametrize("name", ["layernorm", "llama", "gemma2", "nemotron", "cohere"])
@pytest.mark.parametrize("shape", [(7, WIDTH), (1, 1, WIDTH), (2, 3, 4, WIDTH), (WIDTH, WIDTH, WIDTH)])
def test_other_shapes_tell_the_same(name, shape):
    make, expected = ON_TOKENS[name]
    spec = probe(make(), shape)
    assert told(spec) == expected and (spec.axes, spec.width) == ((-1,), WIDTH)


@pytest.mark.parametrize("name", ON_TOKENS)
def test_a_module_on_the_meta_device_tells_the_same(name):
    make, expected = ON_TOKENS[name]
    with torch.device("meta"):
        module = make()
    assert told(probe(module, TOKENS)) == expected
    assert all(p.is_meta for p in module.parameters())


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-8, 1e-6, 1e-5, 1e-3, 0.5])
@pytest.mark.parametrize("make", [nn.LayerNorm, nn.RMSNorm, T5LayerNorm, Gemma2RMSNorm])
def test_eps_is_the_modules_own(make, eps):
    spec = probe(make(WIDTH, eps=eps), TOKENS)
    assert spec.eps == eps


class OwnEps(nn.Module):
    """eps is written in the code: no attribute holds it."""

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 3.2e-4)


def test_eps_that_no_attribute_holds_is_measured():
    spec = probe(OwnEps(), TOKENS)
    assert spec.kind == "rmsnorm" and spec.eps == pytest.approx(3.2e-4, rel=1e-3)


@pytest.mark.parametrize("name", ON_TOKENS)
def test_the_formula_is_the_module(name):
    """What the probe says is enough to compute the norm: its formula, on values where eps matters."""
    module = ON_TOKENS[name][0]().double()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        spec = probe(module, TOKENS)
        for scale in (1e-3, 1.0):
            x = scale * (2 + torch.randn(TOKENS, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
            # measured: 0 to 2e-7 (those that cast to float32 inside)
            assert float((formula(x, spec, dict(module.named_parameters())) - module(x)).abs().max()) < 2e-6


# -- other axes, other norms -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [IMAGES, (1, WIDTH, 4, 5), (3, WIDTH, WIDTH, 5), (3, WIDTH, 1, 1)])
def test_channels_first_layernorm(shape):
    spec = probe(ConvNextLayerNorm(WIDTH, eps=1e-6, data_format="channels_first"), shape)
    assert (spec.kind, spec.axes, spec.width, spec.gain, spec.eps) == ("layernorm", (-3,), WIDTH, "w", 1e-6)


def test_layernorm_over_two_axes():
    spec = probe(nn.LayerNorm((4, 5)), (3, 7, 4, 5))
    assert (spec.kind, spec.axes, spec.width) == ("layernorm", (-2, -1), 20)


@pytest.mark.parametrize("shape", [IMAGES, (3, WIDTH, 5)])
@pytest.mark.parametrize("groups", [1, 4, WIDTH])
def test_groupnorm_is_no_layernorm(groups, shape):
    spec = probe(nn.GroupNorm(groups, WIDTH), shape)
    assert spec is None or spec.kind == "groupnorm"
    assert groups == 1 or spec.kind == "groupnorm"


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(
    "make", [lambda a: nn.InstanceNorm2d(WIDTH, affine=a), lambda a: nn.GroupNorm(4, WIDTH, affine=a)]
)
def test_group_norms_of_one_pixel_are_no_layernorm(make, affine):
    """On a 1 x 1 map an instance has nothing to be normalised over, and a group looks like a token's channels."""
    spec = probe(make(affine), (3, WIDTH, 1, 1))
    assert spec is None or spec.kind == "groupnorm"


def test_one_group_on_one_pixel_is_a_groupnorm():
    """There it computes what a LayerNorm of the channels does; on a larger map it does not."""
    spec = probe(nn.GroupNorm(1, WIDTH), (3, WIDTH, 1, 1))
    assert (spec.kind, spec.axes, spec.width, spec.groups) == ("groupnorm", (-3, -2, -1), WIDTH, 1)


@pytest.mark.parametrize("shape", [(3, WIDTH, 7), (3, WIDTH, WIDTH)])
@pytest.mark.parametrize("affine", [False, True])
def test_instancenorm_over_time_is_not_taken_for_a_norm_of_channels(shape, affine):
    spec = probe(nn.InstanceNorm1d(WIDTH, affine=affine), shape)
    if affine:
        assert spec is None or spec.kind == "groupnorm"
    else:  # without gains it is a LayerNorm over time, and says so by its axis and width
        assert spec is None or spec.kind == "groupnorm" or (spec.axes, spec.width) == ((-1,), shape[-1])


@pytest.mark.parametrize(
    ("make", "shape"), [(nn.BatchNorm2d, IMAGES), (nn.BatchNorm1d, (6, WIDTH)), (nn.BatchNorm1d, (6, WIDTH, 7))]
)
def test_batchnorm(make, shape):
    spec = probe(make(WIDTH, eps=1e-3), shape)
    assert (spec.kind, spec.gain, spec.bias, spec.eps) == ("batchnorm", "w", "bias", 1e-3)
    assert spec.axes == (1 - len(shape),)


@pytest.mark.parametrize("shape", [IMAGES, (3, WIDTH, 1, 1), (3, WIDTH, 7)])
@pytest.mark.parametrize("groups", [1, 4, WIDTH])
def test_groups_of_channels(groups, shape):
    spec = probe(nn.GroupNorm(groups, WIDTH, eps=1e-3), shape)
    assert (spec.kind, spec.groups, spec.width) == ("groupnorm", groups, WIDTH // groups)
    assert (spec.axes, spec.gain, spec.bias, spec.eps) == (tuple(range(1 - len(shape), 0)), "w", "bias", 1e-3)


@pytest.mark.parametrize("make", [DetrFrozenBatchNorm2d, lambda n: nn.BatchNorm2d(n, affine=False)])
def test_frozen_and_weightless_batchnorms(make):
    spec = probe(make(WIDTH), IMAGES)
    gain = "w" if make is DetrFrozenBatchNorm2d else None
    assert (spec.kind, spec.gain, spec.weight, spec.eps) == ("batchnorm", gain, gain and "weight", 1e-5)


def test_batchnorm_of_one_pixel():
    assert probe(nn.BatchNorm2d(WIDTH), (1, WIDTH, 1, 1)).kind == "batchnorm"


# module -> (place and function of its gate, number of groups)
GATED = {
    "after": (lambda: Qwen3NextRMSNormGated(WIDTH, eps=1e-5), ("after", "silu"), 1),
    "sigmoid": (lambda: KimiLinearRMSNormGated(WIDTH, eps=1e-5), ("after", "sigmoid"), 1),
    "before, in groups": (lambda: MambaRMSNormGated(WIDTH, group_size=8, eps=1e-5), ("before", "silu"), 3),
}


@pytest.mark.parametrize("name", GATED)
def test_gated_norms(name):
    make, gate, groups = GATED[name]
    spec = probe(make(), TOKENS, gated=True)
    assert (spec.kind, spec.gain, spec.eps) == ("rmsnorm", "w", 1e-5)
    assert (spec.gate.place, spec.gate.activation) == gate
    assert (spec.axes, spec.width, spec.groups) == ((-1,), WIDTH // groups, groups)


class Times(nn.Module):
    def forward(self, x, z):
        return x * z.sigmoid()


def test_a_product_is_no_gated_norm():
    assert probe(Times(), TOKENS, gated=True) is None


# -- what is no norm ---------------------------------------------------------------------------------------------------


class L2(nn.Module):
    def forward(self, x):
        return F.normalize(x, dim=-1)


class EpsOutside(nn.Module):
    """`x / (std + eps)`: the eps stands outside the root, which no spec can say."""

    def __init__(self, eps):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        return self.weight * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True, correction=0) + self.eps)


class Unbiased(nn.Module):
    """Divides by the standard deviation with n - 1."""

    def forward(self, x):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-5).sqrt()


class L1(nn.Module):
    def forward(self, x):
        return x / (x.abs().mean(-1, keepdim=True) + 1e-6)


class SignOf(nn.Module):
    def forward(self, x):
        return x.sign()


class Squashed(nn.Module):
    def forward(self, x):
        return torch.tanh(F.layer_norm(x, (WIDTH,)))


class Sandwich(nn.Module):
    """A norm and a fixed scale after it, per token: not the formula."""

    def forward(self, x):
        return F.layer_norm(x, (WIDTH,)).cumsum(-1)


def centred_norm():
    norm = RMSNorm(WIDTH, 1e-5)
    centre_output(norm)
    return norm


class ScaledFirst(nn.Module):
    """The gain stands before the norm, which no spec can say."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        x = x * self.weight
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


NO_NORMS = {
    "gain first": ScaledFirst,
    "l2": L2,
    "no norm": lambda: NoNorm(WIDTH),
    "softmax": lambda: nn.Softmax(-1),
    "tanh": nn.Tanh,
    "dropout": nn.Dropout,
    "identity": nn.Identity,
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "linear without bias": lambda: nn.Linear(WIDTH, WIDTH, bias=False),
    "prelu": nn.PReLU,
    "l1": L1,
    "sign": SignOf,
    "squashed": Squashed,
    "cumulated": Sandwich,
    "unbiased variance": Unbiased,
    "eps outside": lambda: EpsOutside(1e-2),
    "norm whose output is centred": centred_norm,
    "attention": lambda: nn.MultiheadAttention(WIDTH, 2),
}


@pytest.mark.parametrize("name", NO_NORMS)
def test_what_is_no_norm_is_not_called_one(name):
    spec = probe(NO_NORMS[name](), TOKENS)
    assert spec is None


def test_at_full_width_a_small_difference_still_tells():
    """With 8192 values, n and n - 1 differ by 6e-5."""
    assert probe(Unbiased(), (1, 2, 8192)) is None
    assert probe(nn.LayerNorm(8192), (1, 2, 8192)).kind == "layernorm"


@pytest.mark.parametrize("eps", [1e-2, 1e-5, 1e-8])
def test_an_eps_outside_the_root_is_not_mis_specified(eps):
    """Either no spec, or one that holds wherever the module's output is not all eps."""
    module = EpsOutside(eps).double()
    spec = probe(module, TOKENS)
    if spec is not None:
        x = torch.randn(TOKENS, dtype=torch.float64) * 10 * eps
        off = (formula(x, spec, dict(module.named_parameters())) - module(x)).abs().max()
        assert float(off) < 1e-3


def test_the_module_and_the_random_state_are_left_alone():
    module = nn.LayerNorm(WIDTH).train()
    nn.init.normal_(module.weight)
    before, state = module.weight.clone(), torch.get_rng_state()
    assert probe(module, TOKENS).kind == "layernorm"
    assert torch.equal(module.weight, before) and module.training
    assert torch.equal(torch.get_rng_state(), state)
    assert module.weight.grad is None and not module._forward_hooks
