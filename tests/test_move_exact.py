"""Moves that keep the function: outputs, gradients, and what can be trained in the new form."""

import copy

import pytest
import torch
from torch import nn

import normswap
from models import tiny
from normswap.apply.live import apply_plan
from normswap.errors import RefusedError
from normswap.planning.planner import plan_moves
from normswap.planning.request import Request
from normswap.planning.rewrites.moved import Scales
from normswap.understand.normmap import find_sites, inspect
from normswap.verification.precision import LiftFloat32

IDS = torch.randint(3, 99, (2, 7), generator=torch.Generator().manual_seed(0))
POST = ("bert", "bart")


def inputs_of(name: str) -> dict[str, torch.Tensor]:
    return {"input_ids": IDS} | ({"decoder_input_ids": IDS.flip(1)[:, :5]} if name in ("t5", "bart") else {})


def logits(model: nn.Module, name: str) -> torch.Tensor:
    with LiftFloat32():
        return model(**inputs_of(name)).logits


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((found - expected).abs().max() / expected.abs().max()).detach())


def gradients(model: nn.Module, name: str, names: list[str]) -> dict[str, torch.Tensor]:
    y = logits(model, name)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    own = dict(model.named_parameters())
    found = torch.autograd.grad((weights * y).sum(), [own[n] for n in names], allow_unused=True)
    return {n: torch.zeros_like(own[n]) if g is None else g for n, g in zip(names, found, strict=True)}


def check_same(model: nn.Module, moved: nn.Module, name: str) -> None:
    assert relative(logits(moved, name), logits(model, name)) < 1e-12  # measured: up to 1e-15
    mine = dict(moved.named_parameters())
    same = [n for n, p in model.named_parameters() if n in mine and torch.equal(p, mine[n])]
    a, b = gradients(moved, name, same), gradients(model, name, same)
    largest = max(float(g.abs().max()) for g in b.values())
    checked = 0
    for n in same:
        if b[n].abs().max() > 1e-12 * largest:  # the rest is rounding, as of the biases of keys
            assert relative(a[n], b[n]) < 1e-10, n  # measured: up to 4e-15
            checked += 1
    # an exact form folds nothing: as good as all parameters are those of the model
    assert checked > 0.6 * len(mine)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma2", "mixtral", "t5"])
def test_pre_to_post_with_a_carried_scale(name):
    model = tiny(name).double()
    plan = normswap.plan(model, placement="post", exact=True)
    assert plan.claim == "exact" and not plan.refused
    moved = apply_plan(copy.deepcopy(model), plan)
    check_same(model, moved, name)
    assert any("Carried" in type(m).__name__ for m in moved.modules())
    # the function is kept on purpose: with constants it would be another
    plain = apply_plan(copy.deepcopy(model), normswap.plan(model, placement="post"))
    assert relative(logits(plain, name), logits(model, name)) > 0.01


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "bert"])
def test_a_sandwich_norm_behind_a_gate(name):
    model = tiny(name).double()
    moved = copy.deepcopy(model)
    plan = normswap.convert_model(moved, placement="sandwich", exact=True)
    assert plan.claim == "exact"
    assert torch.equal(logits(moved, name), logits(model, name))
    gates = [n for n, _ in moved.named_parameters() if n.endswith(".gate")]
    assert len(gates) == (2 if name == "gpt_neox" else 4)
    found = gradients(moved, name, gates)
    assert all(g.abs().max() > 1e-6 for g in found.values())
    with torch.no_grad():
        for n in gates:
            moved.get_parameter(n).fill_(1.0)
    opened = logits(moved, name)
    assert relative(opened, logits(model, name)) > 0.05
    # fully open, it is the norm: the branch is seen no more by its size
    with torch.no_grad():
        for writer in ends(moved, name):
            for parameter in writer.parameters():
                parameter.mul_(1000.0)
    assert relative(logits(moved, name), opened) < (1e-4 if name != "bert" else 1e-3)


def ends(model: nn.Module, name: str):
    """The linear maps that end the branches."""
    endings = {
        "llama": ("o_proj", "down_proj"),
        "gpt2": ("c_proj",),
        "gpt_neox": ("attention.dense", "dense_4h_to_h"),
        "bert": ("output.dense",),
    }
    found = [module for path, module in model.named_modules() if path.endswith(endings[name])]
    assert len(found) == 4
    return found


@pytest.mark.parametrize("name", POST)
def test_post_to_a_normalised_skip(name):
    model = tiny(name).double()
    moved = copy.deepcopy(model)
    plan = normswap.convert_model(moved, placement="pre-normalized-skip")
    assert plan.claim == "exact" and not plan.refused
    assert relative(logits(moved, name), logits(model, name)) < 1e-12  # measured: 1e-15
    # each layer begins with the norm that the one before ended with
    added = [n for n, _ in moved.named_modules() if n.endswith("norm_first")]
    assert len(added) == {"bert": 1, "bart": 2}[name]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_to_post_and_on_to_a_normalised_skip(name):
    """What was moved to post is a post-norm model as any other, and moves on exactly."""
    model = tiny(name).double()
    normswap.convert_model(model, placement="post")
    there = copy.deepcopy(model)
    plan = normswap.convert_model(model, placement="pre-normalized-skip", exact=True)
    assert plan.claim == "exact" and len(plan.moved) == (2 if name == "gpt_neox" else 4)
    assert relative(logits(model, name), logits(there, name)) < 1e-12  # measured: 6e-16


@pytest.mark.parametrize("target", ["deepnorm", "keel"])
def test_a_post_norm_model_moves_live(target):
    model = tiny("bert").double()
    moved = copy.deepcopy(model)
    plan = normswap.convert_model(moved, placement=target)
    assert [block.after for block in plan.moved] == [target] * 4
    difference = relative(logits(moved, "bert"), logits(model, "bert"))
    assert difference < 1e-12 if target == "deepnorm" else difference > 0.01


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
def test_kind_and_place_change_together(name):
    model = tiny(name).double()
    plain, both = copy.deepcopy(model), copy.deepcopy(model)
    normswap.convert_model(plain, placement="post")
    normswap.convert_model(both, norm="rmsnorm", placement="post")
    kinds = [spec.kind for _, spec in find_sites(both)]
    assert len(kinds) == {"gpt2": 5, "gpt_neox": 3}[name] and set(kinds) == {"rmsnorm"}
    assert {spec.kind for _, spec in find_sites(plain)} == {"layernorm"}
    assert relative(logits(both, name), logits(plain, name)) < 1e-10  # measured: 1e-15


def test_a_factor_on_the_skip_is_seen_and_not_dropped():
    model = tiny("gpt2").double()
    scales = Scales(stream={f"transformer.h[{i}]": 0.7 + 0.1 * i for i in range(4)})
    plan, _ = plan_moves(inspect(model), Request.of(placement="keel"), scales=scales)
    moved = apply_plan(model, plan)
    with pytest.raises(RefusedError, match=r"its skip has a factor of its own \(0\.7\)"):
        normswap.plan(moved, placement="post")


def test_a_model_with_scales_on_its_skips_is_not_moved_again():
    model = tiny("gpt2").double()
    constants = Scales({f"transformer.h[{i}]": 0.6 + 0.1 * i for i in range(4)})
    plan, _ = plan_moves(inspect(model), Request.of(placement="deepnorm"), "", "", None, constants)
    apply_plan(model, plan)
    with torch.no_grad():
        before = logits(model, "gpt2")
        with pytest.raises(RefusedError, match="every block stands so already"):
            normswap.convert_model(model, placement="deepnorm")
        assert torch.equal(logits(model, "gpt2"), before)
