"""Group norms: gains and biases folded into what reads them, and other norms in their place, fitted on data."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import normswap
from nets import ready, relative
from normswap.apply.live import apply_plan
from normswap.errors import RefusedError
from normswap.understand.normmap import find_sites
from normswap.verification.precision import LiftFloat32
from test_batchnorm import Seq, built, outputs, picture, pictures

IMAGE = (2, 6, 9, 8)


def normed(*behind, groups=3, affine=True):
    """A convolution, a group norm over its channels, and what follows."""
    return ready(Seq(nn.Conv2d(6, 12, 3), nn.GroupNorm(groups, 12, affine=affine), *behind)).double().eval()


@pytest.mark.parametrize("groups", [1, 3, 12])
@pytest.mark.parametrize("reader", [nn.Conv2d(12, 5, 3), nn.Conv2d(12, 5, 1, bias=False), nn.ConvTranspose2d(12, 5, 1)])
def test_gain_and_bias_move_into_the_convolution_that_reads_them(groups, reader):
    model = normed(copy.deepcopy(reader), groups=groups)
    x = dict(x=picture(*IMAGE))
    plan = normswap.plan(model, inputs=x, fold=True)
    assert plan.claim == "exact" and plan.converted == ("parts.1",)
    converted = apply_plan(copy.deepcopy(model), plan)
    norm = converted.parts[1]
    assert torch.equal(norm.weight, torch.ones(12).double()) and torch.equal(norm.bias, torch.zeros(12).double())
    assert not torch.allclose(model.parts[1].weight, norm.weight) and not torch.allclose(model.parts[1].bias, norm.bias)
    with torch.no_grad():
        for inputs in (x, dict(x=picture(*IMAGE, seed=1))):
            assert relative(converted(**inputs), model(**inputs)) < 1e-12  # 3e-15 at most
    live = copy.deepcopy(model)
    assert normswap.convert_model(live, inputs=x, fold=True).claim == "exact"  # and proved, site by site


def test_padding_hides_a_bias_and_no_gain():
    """At the border a padded convolution reads zeros where the norm gave its bias."""
    x = dict(x=picture(*IMAGE))
    with pytest.raises(RefusedError, match="has no bias to take the norm's and cannot grow one|bias does not reach"):
        normswap.plan(normed(nn.Conv2d(12, 5, 3, padding=1)), inputs=x, fold=True)

    class Scaled(nn.GroupNorm):
        """Without a bias."""

        def __init__(self):
            super().__init__(3, 12)
            self.register_parameter("bias", None)

    model = ready(Seq(nn.Conv2d(6, 12, 3), Scaled(), nn.Conv2d(12, 5, 3, padding=1))).double().eval()
    converted = apply_plan(copy.deepcopy(model), normswap.plan(model, inputs=x, fold=True))
    with torch.no_grad():
        assert relative(converted(**x), model(**x)) < 1e-12  # 1.3e-15


@pytest.mark.parametrize("between", [nn.ReLU(), nn.SiLU()])
def test_what_is_not_linear_is_refused_and_named(between):
    with pytest.raises(RefusedError, match="in parts.2 reads it, and no weight there can take a gain"):
        normswap.plan(normed(between, nn.Conv2d(12, 5, 3)), inputs=dict(x=picture(*IMAGE)), fold=True)


@pytest.mark.parametrize("kind", ["affine", "none", "dyt", "derf"])
def test_other_norms_are_fitted_in_its_place(kind):
    model = normed(nn.ReLU(), nn.Conv2d(12, 12, 3), nn.GroupNorm(1, 12), nn.ReLU(), nn.Conv2d(12, 5, 3))
    data = [dict(x=pictures(seed)) for seed in range(6)]
    start = normswap.plan(model, inputs=data[0], norm=kind)
    plan = normswap.plan(model, inputs=data[0], norm=kind, calibrate=data)
    assert (start.claim, plan.claim, len(plan.converted), len(plan.fitted_norms)) == ("untrained", "calibrated", 2, 2)
    held_out = pictures(100, 16)
    with torch.no_grad():
        errors = [relative(apply_plan(copy.deepcopy(model), p)(held_out), model(held_out)) for p in (plan, start)]
    assert errors[0] < 0.8 * errors[1]
    after = apply_plan(copy.deepcopy(model), plan)
    assert not find_sites(after, data[0])
    assert {site.spec.kind for site in normswap.inspect(after, inputs=data[0]).sites.values()} == {kind}


@pytest.mark.parametrize("model_type, maps, left", [("mobilevitv2", 18, 3), ("poolformer", 9, 8)])
def test_families_fold_theirs_where_convolutions_read_them(model_type, maps, left):
    """MobileViTv2's stand before attention by 1x1 convolutions; half of PoolFormer's before pooling."""
    model, inputs = built(model_type)
    plan = normswap.plan(model, inputs=inputs, fold=True, partial=True)
    kinds = {path: spec.kind for path, spec in find_sites(model, inputs)}
    assert sum(kinds[path] == "groupnorm" for path in plan.converted) == maps
    assert sum(kinds.get(refusal.site) == "groupnorm" for refusal in plan.refused) == left
    converted = apply_plan(copy.deepcopy(model), plan)
    with torch.no_grad(), LiftFloat32():
        ours, theirs = (outputs(m(**inputs)) for m in (converted, model))
    assert ours and max(relative(ours[name], theirs[name]) for name in ours) < 1e-10  # 7e-16 and 1.5e-14


def test_kinds_that_are_not_made_of_a_group_norm_say_so():
    model = normed(nn.Conv2d(12, 5, 3))
    for kind in ("rmsnorm", "layernorm", "repbn", "none-eps"):
        with pytest.raises(RefusedError, match="its 1 norms are groupnorm"):
            normswap.plan(model, inputs=dict(x=picture(*IMAGE)), norm=kind)
