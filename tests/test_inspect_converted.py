"""`inspect` names the norms that a conversion has put in, in the model and in the folder."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import normswap
from models import WIDTH, tiny
from normswap.apply.live import apply_plan
from normswap.cli import main
from normswap.errors import RefusedError

# by kind, what its norms have besides a gain and a bias, and whether their eps does anything
MADE_OF = {
    "dyt": ({"alpha": (1,)}, False),
    "derf": ({"alpha": (1,), "shift": (1,)}, False),
    "none": ({"scale": (1,)}, False),
    "repbn": (
        {
            "bn_weight": (WIDTH,),
            "bn_bias": (WIDTH,),
            "eta": (1,),
            "bn_mean": (WIDTH,),
            "bn_var": (WIDTH,),
            "ramp": (1,),
        },
        True,
    ),
}


@pytest.mark.parametrize("kind", MADE_OF)
@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_sites_streams_and_roles_are_those_of_the_model_that_was_converted(model_type, kind):
    model = tiny(model_type)
    before = normswap.inspect(model)
    eps = next(iter(before.sites.values())).spec.eps
    normswap.convert_model(model, norm=kind, verify=False)
    after = normswap.inspect(model)
    more, sees_eps = MADE_OF[kind]
    assert [*after.sites] == [*before.sites] and after.own == {*before.sites}
    for path, site in after.sites.items():
        old = before.sites[path]
        assert (site.spec.kind, site.role, site.stream, site.readers) == (kind, old.role, old.stream, old.readers)
        assert site.tensors == {"weight": (WIDTH,), "bias": (WIDTH,), **more}
        assert site.spec.eps == (eps if sees_eps else 0)
    assert [b.placement for b in after.streams[0].blocks] == [b.placement for b in before.streams[0].blocks]


def test_a_norm_with_two_scales_is_of_the_kind_that_was_asked_for():
    model = tiny("llama")
    plan = normswap.plan(model, norm="none")
    first = next(edit.module for edit in plan.module_edits())
    edits = [
        edit.model_copy(update={"kind": "none-apart"})
        if getattr(edit, "kind", "") == "none" and edit.module == first
        else edit
        for edit in plan.module_edits()
    ]
    apply_plan(
        model, plan.model_copy(update={"edits": (*edits, *(e for es in plan.tensor_edits().values() for e in es))})
    )
    site = normswap.inspect(model).sites[first]
    assert site.spec.kind == "none" and [*site.tensors][2:] == ["scale", "far", "threshold"]


def test_a_scale_per_channel_of_the_model_s_own_is_no_norm():
    """It is the same map as a frozen scale: behaviour cannot tell them apart, so only the class does."""

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.rand(WIDTH)), nn.Parameter(torch.rand(WIDTH))

        def forward(self, x):
            return self.weight * x + self.bias

    model = tiny("gpt2")
    model.transformer.h[0].ln_1 = Scale()
    sites = normswap.inspect(model).sites
    assert len(sites) == 4 and "transformer.h.0.ln_1" not in sites


def test_norms_of_batch_norms_and_of_heads_are_named():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 3)).eval()
    inputs = {"input": torch.randn(2, 3, 9, 8)}
    normswap.convert_model(net, norm="affine", inputs=inputs)
    (site,) = normswap.inspect(net, inputs=inputs).sites.values()
    assert (site.spec.kind, site.spec.axes, site.tensors) == ("affine", (-3,), {"weight": (8,), "bias": (8,)})

    model = tiny("llama")
    normswap.convert_model(model, qk_norm="rmsnorm")
    kinds = Counter((site.spec.kind, site.role) for site in normswap.inspect(model).sites.values())
    assert kinds == {("rmsnorm", "stream"): 4, ("rmsnorm", "final"): 1, ("gated-rmsnorm", "qk"): 4}


def test_what_was_put_in_neither_moves_nor_is_exchanged_again():
    model = tiny("llama")
    normswap.convert_model(model, norm="dyt", role="stream", verify=False)
    with pytest.raises(RefusedError, match="is a dyt; only LayerNorm and RMSNorm can move"):
        normswap.plan(model, placement="post")
    with pytest.raises(RefusedError, match="it is a dyt; a none is made of"):
        normswap.plan(model, norm="none", role="stream")


def test_the_command_names_them_in_words_and_as_json(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    tiny("gpt2").save_pretrained(source)
    normswap.convert(source, out, norm=["dyt", "none"], role=["stream", "final"], verify="none")
    shown = CliRunner().invoke(main, ["inspect", str(out)], env={"COLUMNS": "160"})
    assert shown.exit_code == 0 and "4 dyt, 1 none; 1 stream" in shown.output and "dyt (alpha)" in shown.output
    told, before = (
        json.loads(CliRunner().invoke(main, ["inspect", str(path), "--json"]).output) for path in (out, source)
    )
    kinds = Counter((site["kind"], site["role"], *site["tensors"]) for site in told["sites"])
    assert kinds == {("dyt", "stream", "weight", "bias", "alpha"): 4, ("none", "final", "weight", "bias", "scale"): 1}
    assert [site["path"] for site in before["sites"]] == [site["path"] for site in told["sites"]]
    assert [b["placement"] for b in told["streams"][0]["blocks"]] == ["pre"] * 4
