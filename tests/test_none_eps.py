"""Frozen scales in the stock class: an eps that outweighs every variance, where the configuration has one for all."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import fresh
import normswap
from models import tiny
from nets import Net
from normswap.apply.live import apply_plan
from normswap.calibration.costs import cost
from normswap.errors import RefusedError
from normswap.norms.probe import probe
from normswap.observe.inputs import example_inputs
from normswap.understand.eps_keys import eps_keys
from sweep.zoo import build


def batches(count: int = 3) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, 99, (4, 30), generator=generator)} for _ in range(count)]


# plain gains, `1 + w`, biases, norms behind the branch as well
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox", "olmo2"])
def test_every_norm_is_linear_and_the_class_is_the_same(family):
    model = tiny(family).double().eval()
    plan = normswap.plan(model, norm="none-eps", calibrate=batches())
    assert plan.claim == "calibrated" and not plan.module_edits()
    (edit,) = plan.config_edits()
    assert edit.value == 4.0 ** round(torch.tensor(edit.value).log2().item() / 2)  # its root rounds nothing
    converted = apply_plan(copy.deepcopy(model), plan)
    assert type(converted) is type(model) and getattr(converted.config, edit.key) == edit.value
    checked = 0

    def linear(module, args, y, name):
        nonlocal checked
        x = args[0].double()
        spec = specs[name]
        z = x - x.mean(-1, keepdim=True) if spec.kind == "layernorm" else x
        weight = 1 + module.weight if spec.gain == "1 + w" else module.weight
        expected = weight / edit.value**0.5 * z + (0 if spec.bias is None else module.bias)
        # casts of the model's own to float32; 1e-7
        assert float((y - expected).norm() / expected.norm()) < 1e-6
        checked += 1

    specs = {path: site.spec for path, site in normswap.inspect(model).sites.items()}
    for path in specs:
        converted.get_submodule(path).register_forward_hook(lambda m, a, y, path=path: linear(m, a, y, path))
    with torch.no_grad():
        converted(**batches()[0])
    assert checked == len(specs) == len(plan.converted)


def test_it_does_as_well_as_a_class_of_its_own():
    model, data = tiny("gpt2"), batches(5)
    costs = {
        kind: cost(model, apply_plan(copy.deepcopy(model), normswap.plan(model, norm=kind, calibrate=data)), data[-1:])
        for kind in ("none", "none-eps")
    }
    # of a LayerNorm nothing but eps differs: 2e-8 of it
    assert abs(costs["none-eps"] / costs["none"] - 1) < 1e-4


def test_the_folder_is_one_of_the_stock_class(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    tiny("llama").save_pretrained(source)
    done = normswap.convert(source, out, norm="none-eps", tokens=1024, verify="fast")
    assert not [path for path in out.iterdir() if path.suffix == ".py"]
    before, after = (json.loads((path / "config.json").read_text()) for path in (source, out))
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert changed == {"rms_norm_eps"} and after["rms_norm_eps"] == done.plan.config_edits()[0].value
    ids = torch.arange(30)[None]
    with torch.no_grad():
        a = normswap.load(out).eval()(ids).logits
        b = AutoModelForCausalLM.from_pretrained(out).eval()(ids).logits
    assert torch.equal(a, b)
    script = (
        "import sys; sys.modules['normswap'] = None\n"
        "import torch; from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "print(type(model).__name__, float(model(torch.arange(30)[None]).logits.double().norm()))"
    )
    assert fresh.run(script, out).split() == ["LlamaForCausalLM", str(float(b.double().norm()))]
    sites = normswap.inspect(out).sites.values()
    assert {(site.spec.kind, site.spec.eps) for site in sites} == {("rmsnorm", after["rms_norm_eps"])}


def test_what_cannot_be_built_so_is_refused():
    llama = tiny("llama")
    for words in (dict(role="stream"), dict(sites="*.0.*")):
        with pytest.raises(RefusedError, match="rms_norm_eps is the eps of .* which is to stay a norm. Exchange all 5"):
            normswap.plan(llama, norm="none-eps", **words)
    with pytest.raises(RefusedError, match="no number in the configuration of Net is the eps of first.norm"):
        normswap.plan(Net(), norm="none-eps", inputs={"ids": torch.arange(6)[None]})
    with pytest.raises(RefusedError, match="no form of --norm none-eps --exact computes the same function"):
        normswap.plan(tiny("gpt2"), norm="none-eps", exact=True)
    with pytest.raises(RefusedError, match="has no gain to make up for its eps. Take --norm none"):
        normswap.plan(tiny("olmo"), norm="none-eps")


def test_float16_has_room_for_less():
    """Gains have to stay below 65504, and what a Llama's norm rounds before its gain above the least normal number."""
    model = tiny("llama").half()
    model.model.embed_tokens.weight.data /= model.model.embed_tokens.weight.data.float().norm(dim=-1, keepdim=True)
    plan = normswap.plan(model, norm="none-eps", calibrate=batches())
    wide = normswap.plan(copy.deepcopy(model).float(), norm="none-eps", calibrate=batches())
    assert plan.config_edits()[0].value < wide.config_edits()[0].value / 1000
    with torch.no_grad():
        a, b = (
            apply_plan(copy.deepcopy(m), p).float()(**batches()[0]).logits
            for m, p in ((model, plan), (model.float(), wide))
        )
    assert (
        torch.isfinite(a).all() and float((a - b).norm() / b.norm()) < 0.02
    )  # 0.0035; an eps of 1e3 is what there is room for


def test_keys_are_found_by_trying():
    model = tiny("bert")
    found = eps_keys(model, {1e-12}, example_inputs(model))
    assert {key: len(norms) for key, norms in found.items()} == {"layer_norm_eps": 6}
    assert {held for norms in found.values() for held in norms.values()} == {"eps"}
    assert eps_keys(model, {1e-6}, example_inputs(model)) == eps_keys(model, {0.0}, example_inputs(model)) == {}
    nested = build("llava")
    sites = normswap.inspect(nested).sites
    found = eps_keys(nested, {site.spec.eps for site in sites.values()}, example_inputs(nested))
    assert {key.partition(".")[0] for key in found} == {"vision_config", "text_config"}
    assert sum(map(len, found.values())) == len(sites)


def test_a_norm_that_does_not_run_is_not_forgotten():
    """It would be built with the new eps as well, and nobody knows what it normalises."""

    class Idle(LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.aside = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    model = Idle(tiny("llama").config)
    assert eps_keys(model, {model.config.rms_norm_eps}, example_inputs(model)) == {}
    with pytest.raises(RefusedError, match="no number in the configuration of Idle is the eps of"):
        normswap.plan(model, norm="none-eps")


def test_a_norm_with_a_large_eps_is_still_recognised():
    for eps in (1e-6, 1.0, 4.0**14, 4.0**20):
        assert probe(nn.LayerNorm(12, eps=eps), (3, 5, 12)).eps == pytest.approx(eps, rel=1e-6)
        assert probe(nn.RMSNorm(12, eps=eps), (3, 5, 12)).kind == "rmsnorm"
    assert probe(nn.Tanh(), (3, 5, 12)) is probe(nn.GELU(), (3, 5, 12)) is probe(nn.Identity(), (3, 5, 12)) is None
