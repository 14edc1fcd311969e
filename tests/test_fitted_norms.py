"""Kinds of norm that are fitted on data: DyT, Derf, a frozen scale, RepBN."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import fresh
import normswap
from models import tiny
from normswap.errors import RefusedError
from normswap.norms.kind import Samples
from normswap.norms.kinds import KINDS
from normswap.norms.kinds.repbn import RepBNLayerNorm, RepBNRMSNorm
from normswap.norms.spec import NormSpec
from tune_tasks import CONTEXT

CHECKPOINTS = Path(__file__).parent / "checkpoints"
# KL to the original on other text: 0.018 (repbn 0.019); copying the gains costs 1.7 to 3 (dyt, derf), 0.13 (none)
FITTED = {"dyt": 0.03, "derf": 0.03, "none": 0.03, "repbn": 0.03}


@cache
def converted(kind: str, folder: Path) -> normswap.Conversion:
    return normswap.convert(CHECKPOINTS / "gpt2-shakespeare", folder / kind, norm=kind, tokens=2048, verify="fast")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fitted")


@pytest.mark.parametrize("kind", FITTED)
def test_a_trained_model_is_near_its_original(folder, kind):
    done = converted(kind, folder)
    assert done.plan.claim == "calibrated" and len(done.plan.converted) == len(done.plan.fitted_norms) == 13
    output = done.report.mathematics.comparison.output
    assert output.kl.mean < FITTED[kind]


@pytest.mark.parametrize("kind", FITTED)
def test_what_normswap_loads_is_what_the_folder_s_own_code_loads(folder, kind):
    path = converted(kind, folder).folder
    models = normswap.load(path), AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    with torch.no_grad():
        a, b = (model.eval()(torch.arange(30)[None]).logits for model in models)
    assert torch.equal(a, b)


@pytest.mark.parametrize("kind", FITTED)
def test_a_process_without_normswap_generates_with_and_without_a_cache(folder, kind):
    script = (
        "import sys; sys.modules['normswap'] = None\n"
        "import torch; from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "assert not [m for m in model.modules() if type(m) is torch.nn.LayerNorm]\n"
        "ids = torch.arange(20)[None] * 11 % 1000\n"
        "words = dict(max_new_tokens=12, do_sample=False, pad_token_id=0)\n"
        "a, b = (model.generate(ids, use_cache=use, **words) for use in (True, False))\n"
        "print(torch.equal(a, b))"
    )
    assert fresh.run(script, converted(kind, folder).folder).split() == ["True"]


def samples(x: torch.Tensor, kind: str = "rmsnorm") -> Samples:
    """What an RMSNorm with random gains makes of x."""
    spec = NormSpec(kind=kind, axes=(-1,), width=x.shape[-1], eps=1e-6)
    gain = torch.linspace(0.5, 2, x.shape[-1])
    y = gain * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + spec.eps)
    return Samples(x, y, x, spec, {"gain": gain})


def test_a_frozen_scale_has_a_second_one_for_tokens_far_from_all_others():
    """As the first token of many models: 40 times the length of the rest."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 16, generator=generator)
    x = x / x.square().mean(-1, keepdim=True).sqrt()  # of one length, so that one scale is exact
    far = torch.zeros(500, dtype=torch.bool)
    far[::50] = True
    data = samples(torch.where(far[:, None], 40 * x, x))
    fit = KINDS["none"].routes["rmsnorm"].fit
    values = fit(data)
    assert {"far", "threshold"} <= values.keys() and not {"far"} & fit(samples(x)).keys()
    norm = KINDS["none-apart"].module(16, gain="w", bias=True)
    norm.load_state_dict({name: t.float() for name, t in values.items()})
    error = (norm(data.x).detach() - data.y).abs().max() / data.y.abs().max()
    assert float(error) < 1e-4  # 1.7e-7; with one scale for all, a token of each kind would be off by its whole length
    alone = torch.cat([norm(row[None]) for row in data.x])  # a token is told by itself, wherever it stands
    assert torch.equal(alone, norm(data.x))


@pytest.mark.parametrize("kind", ["dyt", "derf"])
def test_saturation_is_seen(kind):
    route = KINDS[kind].routes["rmsnorm"]
    x = torch.randn(400, 8, generator=torch.Generator().manual_seed(1))
    values = route.fit(samples(x))
    calm = route.flat(values, x).float().mean()
    wild = route.flat(values | {"alpha": values["alpha"] * 50}, x).float().mean()
    assert float(calm) < 0.2 and float(wild) > 0.8


def test_repbn_takes_its_statistics_from_unmasked_tokens():
    norm = RepBNLayerNorm(6, eps=1e-5, gain="w", bias=True).double().train()
    x = torch.randn(3, 7, 6, dtype=torch.float64)
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, 4:] = mask[2, :2] = 0
    norm.masks = (mask,)
    y = norm(x)
    rows = x[mask.bool()]
    by_hand = nn.functional.batch_norm(rows, None, None, eps=1e-5, training=True) + rows
    assert (y[mask.bool()] - by_hand).abs().max() < 1e-12  # 2e-15
    other = nn.BatchNorm1d(6, dtype=torch.float64)
    other(rows)
    assert (norm.bn_mean - other.running_mean).abs().max() < 1e-12
    assert (norm.bn_var - other.running_var).abs().max() < 1e-12


def test_a_ramp_leads_from_the_old_norm_to_the_new_one_in_evaluation_too():
    norm = RepBNRMSNorm(6, eps=1e-5, gain="w", bias=True).double().eval()
    x = torch.randn(5, 6, dtype=torch.float64)
    at = {}
    for ramp in (0.0, 0.25, 1.0):
        norm.ramp.fill_(ramp)
        at[ramp] = norm(x)
    old = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
    assert (at[1.0] - old).abs().max() < 1e-12
    assert (at[0.25] - (0.25 * at[1.0] + 0.75 * at[0.0])).abs().max() < 1e-12


def _whole(rank: int, path: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
    norm, x = _shared()
    part = x[2 * rank : 2 * rank + 2].requires_grad_()
    y = norm(part)
    (y * torch.linspace(0, 1, 6, dtype=torch.float64)).square().sum().backward()
    torch.save((y.detach(), part.grad, norm.bn_var), f"{path}/{rank}.pt")
    torch.distributed.destroy_process_group()


def _shared():
    norm = RepBNLayerNorm(6, eps=1e-5, gain="w", bias=True).double().train()
    return norm, torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def test_two_processes_have_the_statistics_of_one_with_all_of_the_batch(tmp_path):
    processes = [CONTEXT.Process(target=_whole, args=(rank, str(tmp_path))) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    norm, x = _shared()
    x.requires_grad_()
    y = norm(x)
    (y * torch.linspace(0, 1, 6, dtype=torch.float64)).square().sum().backward()
    assert (torch.cat([p[0] for p in parts]) - y).abs().max() < 1e-12
    assert (torch.cat([p[1] for p in parts]) - x.grad).abs().max() < 1e-12
    assert all((p[2] - norm.bn_var).abs().max() < 1e-12 for p in parts)


def test_repbn_is_measured_again_and_folds_away(folder):
    model = AutoModelForCausalLM.from_pretrained(converted("repbn", folder).folder, trust_remote_code=True).double()
    tokenizer = AutoTokenizer.from_pretrained(converted("repbn", folder).folder)
    ids = tokenizer("To be, or not to be: that is the question. " * 8, return_tensors="pt").input_ids
    counts = normswap.reestimate(model.train(), [{"input_ids": ids}])
    assert len(counts) == 13 and set(counts.values()) == {ids.numel()} and model.training
    model.eval()
    with torch.no_grad():
        before = model(ids).logits
        left = normswap.fold_repbn(model, {"input_ids": ids})
        after = model(ids).logits
    assert len(left) == 13 and sum(left.values()) >= 12  # the tied head keeps the last gain and bias
    assert not any(hasattr(module, "bn_var") for module in model.modules())
    assert float((after - before).abs().max() / before.abs().max()) < 1e-10


def test_a_ramp_that_is_on_is_not_folded(folder):
    model = AutoModelForCausalLM.from_pretrained(converted("repbn", folder).folder, trust_remote_code=True)
    model.transformer.h[1].ln_1.ramp.fill_(0.5)
    with pytest.raises(RefusedError, match="transformer.h.1.ln_1 is on its ramp at 0.5"):
        normswap.fold_repbn(model)
    with pytest.raises(RefusedError, match="has no RepBN"):
        normswap.reestimate(tiny("gpt2"), [{"input_ids": torch.arange(5)[None]}])


def test_kinds_that_do_not_go_together_are_refused(folder):
    source = CHECKPOINTS / "gpt2-shakespeare"
    for words, message in (
        (dict(norm="dyt", placement="post"), "norms that move can become rmsnorm"),
        (dict(norm="dyt", fold=True), "cannot be folded in the same run. Leave --fold out"),
        (dict(norm="dyt", exact=True), "no form of --norm dyt --exact computes the same function"),
        (dict(norm=["dyt", "none"]), "is to become dyt and none at once"),
        (dict(norm="dyt", sites=["*", "*"]), "belong to no norm"),
        (dict(norm="dyt", role="nowhere"), "role 'nowhere' is not known"),
        (dict(norm="dyt", nrom="x"), "what was asked for is not understood: nrom"),
    ):
        with pytest.raises(RefusedError, match=message):
            normswap.plan(source, **words)
