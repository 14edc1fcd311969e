"""The norms that go into converted models, against torch's own and the formula of their behaviour."""

import itertools
from typing import get_args

import pytest
import torch
from torch.nn import functional as F

from normswap.norms.formula import formula
from normswap.norms.kinds import MODULES
from normswap.norms.spec import Casting, NormSpec

WIDTH = 6


def made(kind, **arguments):
    norm = MODULES[kind](width=WIDTH, **{"eps": 1e-3, "gain": "w", "bias": True, "casting": "float32", **arguments})
    torch.manual_seed(0)
    for parameter in norm.parameters():
        parameter.data.normal_()
    return norm


def test_against_torch_in_float64():
    x = torch.randn(3, 5, WIDTH, dtype=torch.float64) + 2
    layer, rms, affine = (made(kind).double() for kind in ("layernorm", "rmsnorm", "affine"))
    expected = F.layer_norm(x, (WIDTH,), layer.weight, layer.bias, 1e-3)
    assert (layer(x) - expected).abs().max() < 1e-14  # measured: 1.3e-15
    expected = F.rms_norm(x, (WIDTH,), rms.weight, 1e-3) + rms.bias
    assert (rms(x) - expected).abs().max() < 1e-14  # measured: 9e-16
    assert torch.equal(affine(x), x * affine.weight + affine.bias)
    assert made("identity", gain=None, bias=False)(x) is x


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_every_form_is_that_of_its_spec(kind):
    checked = 0
    for gain, bias, casting in itertools.product(("w", "1 + w", None), (False, True), get_args(Casting)):
        norm = made(kind, gain=gain, bias=bias, casting=casting).bfloat16()
        weight, shift = "weight" if gain else None, "bias" if bias else None
        spec = NormSpec(
            kind=kind, axes=(-1,), width=WIDTH, gain=gain, weight=weight, bias=shift, eps=1e-3, casting=casting
        )
        x = torch.randn(4, WIDTH).bfloat16() + 1
        assert torch.equal(norm(x), formula(x, spec, dict(norm.named_parameters())))
        checked += 1
    assert checked == 18


def test_another_axis_and_a_shape_of_its_own():
    x = torch.randn(2, WIDTH, 4, 3, dtype=torch.float64)
    norm = made("layernorm", axis=-3).double()
    expected = F.layer_norm(x.movedim(1, -1), (WIDTH,), norm.weight, norm.bias, 1e-3).movedim(-1, 1)
    assert (norm(x) - expected).abs().max() < 1e-14  # measured: 9e-16
    heads = made("layernorm", shape=(2, WIDTH)).double()
    y = torch.randn(5, 2, WIDTH, dtype=torch.float64)
    expected = F.layer_norm(y, (WIDTH,), eps=1e-3) * heads.weight + heads.bias
    assert (heads(y) - expected).abs().max() < 1e-14  # measured: 9e-16
