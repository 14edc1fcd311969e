"""RMSNorm to LayerNorm: a reflected stream, calibrated, and `LN([x, -x])`, exact."""

import copy

import pytest
import torch
from torch.nn import functional as F

import normswap
from models import tiny
from normswap.apply.live import apply_plan
from normswap.calibration.data import text_data
from normswap.calibration.rotations import Moments, least_felt, told_by_rest
from normswap.checkpoint.source import Source
from normswap.errors import PlanError, RefusedError
from normswap.norms.kinds.layer_norm import MirroredLayerNorm
from normswap.planning.edits import SwapNorm
from normswap.understand.normmap import find_sites
from normswap.verification.inputs import evaluation_inputs
from normswap.verification.live import measure_live
from normswap.verification.loaded import open_model, tokenizer_of
from sweep import zoo


def batches(count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, 90, (8, 32), generator=generator)} for _ in range(count)]


@torch.no_grad()
def compared(original, converted, inputs):
    """KL in nats per token, and the share of tokens with the same top-1."""
    kl, same, count = 0.0, 0, 0
    for batch in inputs:
        p, q = (model(**batch).logits.double().log_softmax(-1) for model in (original, converted))
        kl += float((p.exp() * (p - q)).sum())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        count += p[..., 0].numel()
    return kl / count, same / count


def copied(model):
    """The same gains in LayerNorms: what somebody would do who does not rotate."""
    model = copy.deepcopy(model)
    for path, spec in find_sites(model):
        norm = SwapNorm(module=path, kind="layernorm", width=spec.width, eps=spec.eps, gain=spec.gain, bias=False,
                        casting=spec.casting).build()  # fmt: skip
        norm.weight.data.copy_(model.get_submodule(path).weight)
        model.set_submodule(path, norm)
    return model


def test_a_trained_llama_with_layernorms_is_close_and_the_same_every_time(checkpoints):
    source = Source.open(checkpoints / "llama-shakespeare")
    model = open_model(source)
    held_out, _, _ = evaluation_inputs(model, tokenizer_of(source), None, 4096)
    plan = normswap.plan(checkpoints / "llama-shakespeare", norm="layernorm", calibrate=True)
    assert plan.claim == "calibrated" and "8192 tokens" in plan.calibrated_on
    converted = apply_plan(copy.deepcopy(model), plan)
    assert {spec.kind for _, spec in find_sites(converted)} == {"layernorm"}
    kl, same = compared(model, converted, held_out)
    assert kl <= 1.0e-4 and same >= 0.992  # measured: 6.3e-5, 99.5%
    assert compared(model, copied(model), held_out)[0] > 10 * kl  # measured: 4.7e-3
    first, again = (
        normswap.plan(checkpoints / "llama-shakespeare", norm="layernorm", calibrate=True, tokens=512) for _ in range(2)
    )
    assert len(first._fitted) == len(plan._fitted)
    assert all(torch.equal(value, again._fitted[name]) for name, value in first._fitted.items())
    data = text_data(source, None, 512, 64, None)()
    assert len(data.batches) > 0  # the text it is fitted on is not the one it is measured on
    fitted_on = {tuple(row.tolist()) for batch in data.batches for row in batch["input_ids"]}
    assert not fitted_on & {tuple(row[:64].tolist()) for batch in held_out for row in batch["input_ids"]}


def test_what_a_layernorm_takes_out_is_the_direction_that_was_found():
    """By hand: the original with `n - v (v^T n)`, scaled back, plus what is told of it, in the place of each norm."""
    model, data = tiny("llama").double(), batches()
    plan = normswap.plan(model, norm="layernorm", calibrate=data)
    converted = apply_plan(copy.deepcopy(model), plan)
    fitted, by_hand = plan._fitted, copy.deepcopy(model)
    v = fitted["lost.0"]
    assert v.norm() == pytest.approx(1)

    def instead(path, norm):
        c, m = fitted[f"{path}.restored"], fitted[f"{path}.bias"][0] * len(v) ** 0.5
        assert abs(float(c @ v)) < 1e-12

        def hook(module, args, output):
            rest = args[0] - (args[0] @ v).unsqueeze(-1) * v
            n = rest * (rest.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
            return norm.weight * (n + (n @ c + m).unsqueeze(-1) * v)

        norm.register_forward_hook(hook)

    for path in plan.rotated[0].sites:
        instead(path, by_hand.get_submodule(path))
    with torch.no_grad():
        a, b = (m(**data[0]).logits for m in (by_hand, converted))
    assert (a - b).abs().max() < 1e-12 * a.abs().max()  # 1.0e-15


def test_what_is_found_is_the_least_and_what_is_told_is_the_regression():
    generator = torch.Generator().manual_seed(0)
    scales = torch.linspace(0.3, 2, 8, dtype=torch.float64)
    n = torch.randn(4000, 8, generator=generator, dtype=torch.float64) * scales + 1
    n[:, 3] = 0.5 * n[:, 6] + 0.01 * n[:, 3]
    own = Moments(len(n), n.sum(0), n.T @ n)
    g = torch.eye(8, dtype=torch.float64)
    found = least_felt([(own, g)])
    least = torch.linalg.eigh(own.covariance).eigenvectors[:, 0]
    assert abs(float(found @ least)) > 1 - 1e-6  # where readers weigh all alike, the direction of least variance
    heavy = g + 1e4 * torch.outer(least, least)
    assert abs(float(least_felt([(own, heavy)]) @ least)) < 0.2  # a reader that would miss it much has its say
    e = torch.eye(8, dtype=torch.float64)[3]
    c, m = told_by_rest(own, e)
    assert (n @ c + m - n @ e).std() < 0.1 * (n @ e).std()


@pytest.mark.parametrize(("name", "words"), [("gemma", dict(tied="untie")), ("mixtral", {})])
def test_1_plus_w_ties_and_experts_are_respected(name, words):
    model = zoo.build(name).double()
    data = batches()
    converted = apply_plan(copy.deepcopy(model), normswap.plan(model, norm="layernorm", calibrate=data, **words))
    assert {spec.kind for _, spec in find_sites(converted)} == {"layernorm"}
    kl, copies = (compared(model, other, data[-1:])[0] for other in (converted, copied(model)))
    assert kl < 0.5 * copies


def test_norms_on_no_stream_get_the_exact_form():
    model = zoo.build("qwen3").double()
    plan = normswap.plan(model, norm="layernorm", calibrate=batches())
    kinds = {edit.module: edit.kind for edit in plan.edits if isinstance(edit, SwapNorm)}
    assert {kind for path, kind in kinds.items() if path.endswith(("q_norm", "k_norm"))} == {"mirrored-layernorm"}
    assert {kind for path, kind in kinds.items() if path.endswith("layernorm")} == {"layernorm"}


@pytest.mark.parametrize("axis", [-1, -2])
def test_mirrored_is_an_rmsnorm(axis):
    x = torch.randn(3, 5, 5, dtype=torch.float64) + 2
    norm = MirroredLayerNorm(5, eps=0.1, casting="input", axis=axis).double()
    torch.nn.init.normal_(norm.weight)
    expected = F.rms_norm(x.movedim(axis, -1), (5,), norm.weight, 0.1).movedim(-1, axis)
    torch.testing.assert_close(norm(x), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", ["llama", "gemma", "gemma2", "olmo2", "qwen3", "mixtral", "t5"])
def test_exact_is_mirrored_on_any_rmsnorm(name):
    model = zoo.build(name)
    plan = normswap.plan(model, norm="layernorm", exact=True)
    measured = measure_live(model, plan, [zoo.inputs_for(model)])
    assert plan.claim == "exact" and len(plan.converted) == len(measured.sites) > 0
    assert measured.worst_error < 1e-12  # 1.1e-15


def test_refusals_say_the_way_out():
    with pytest.raises(RefusedError, match=r"--exact puts in a LayerNorm of \[x, -x\]"):
        normswap.plan(tiny("gemma2"), norm="layernorm", tied="untie")
    with pytest.raises(RefusedError, match="leave --rotate out"):
        normswap.plan(tiny("llama"), norm="layernorm", rotate="random")
    model = tiny("llama")
    with pytest.raises(PlanError, match="--calibrate"):
        apply_plan(model, normswap.plan(model, norm="layernorm"))
