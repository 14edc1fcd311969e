"""Norms on the heads of queries and keys: the identity at first, and the norm that they are named for at the end."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

import normswap
from models import tiny
from normswap.apply.live import apply_plan
from normswap.calibration.costs import cost
from normswap.errors import RefusedError
from normswap.norms.kinds import KINDS
from normswap.observe.inputs import example_inputs
from normswap.verification.precision import LiftFloat32
from sweep.zoo import build

# who gives queries and keys: modules of their own, one module for both, in runs by head, by kind, by group
FAMILIES = [
    "llama",
    "gpt2",
    "gpt_neox",
    "bloom",
    "falcon",
    "mpt",
    "opt",
    "mixtral",
    "cohere",
    "bert",
    "t5",
    "bart",
    "vit",
]


def opened(model: nn.Module, gate: float) -> int:
    """Set all gates; how many there are."""
    gates = [p for name, p in model.named_parameters() if name.endswith("gate")]
    for p in gates:
        p.data.fill_(gate)
    return len(gates)


@torch.no_grad()
def result(model: nn.Module, inputs) -> torch.Tensor:
    return model(**inputs)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_function_is_the_same_until_a_gate_opens(family):
    model = tiny(family).double().eval()
    inputs = example_inputs(model)
    before = result(model, inputs)
    plan = normswap.convert_model(model, qk_norm="rmsnorm")
    assert plan.claim == "exact"
    after = result(model, inputs)
    assert torch.equal(before, after)  # 0: `x + 0 (N(x) - x)` rounds nothing
    assert opened(model, 1.0) == len(plan.module_edits()) - len(
        {e.module for e in plan.edits if e.edit == "norm_output"}
    )
    assert not torch.allclose(result(model, inputs), before)
    assert torch.isfinite(result(model, inputs)).all()


def test_an_open_gate_makes_a_llama_the_model_that_has_these_norms():
    """Qwen3 is a Llama with an RMSNorm on each head of queries and keys, before positions are turned in."""
    llama = tiny("llama").double().eval()
    keys = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads".split()
    shared = {key: getattr(llama.config, key) for key in (*keys, "head_dim", "rms_norm_eps", "tie_word_embeddings")}
    reference = Qwen3ForCausalLM(Qwen3Config(**shared, rope_parameters=llama.config.rope_parameters)).double().eval()
    normswap.convert_model(llama, qk_norm="rmsnorm")
    assert opened(llama, 1.0) == 4
    generator = torch.Generator().manual_seed(1)
    for name, p in llama.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            p.data = 1 + 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    state = {
        name.replace("_proj.q_norm", "_norm").replace("_proj.k_norm", "_norm"): t
        for name, t in llama.state_dict().items()
        if not name.endswith("gate")
    }
    reference.load_state_dict(state)
    ids = torch.randint(0, llama.config.vocab_size, (2, 9), generator=generator)
    with LiftFloat32():
        a, b = result(llama, {"input_ids": ids}), result(reference, {"input_ids": ids})
    assert float((a - b).abs().max() / b.abs().max()) < 1e-12  # 6e-16


def test_queries_and_keys_in_one_matrix_are_normalised_head_by_head():
    """GPT-2 against its own attention with the norms written by hand around the fused projection."""
    model = tiny("gpt2").double().eval()
    inputs = example_inputs(model)
    by_hand = copy.deepcopy(model)
    heads, width = model.config.n_head, model.config.n_embd // model.config.n_head

    def normed(module, args, y):
        q, k, v = y.split(model.config.n_embd, dim=-1)
        eps = model.config.layer_norm_epsilon
        q, k = (
            nn.functional.layer_norm(x.unflatten(-1, (heads, width)), (width,), eps=eps).flatten(-2) for x in (q, k)
        )
        return torch.cat([q, k, v], dim=-1)

    for block in by_hand.transformer.h:
        block.attn.c_attn.register_forward_hook(normed)
    normswap.convert_model(model, qk_norm="layernorm")
    assert opened(model, 1.0) == 4
    a, b = result(model, inputs), result(by_hand, inputs)
    assert float((a - b).abs().max() / b.abs().max()) < 1e-12  # 5e-16


def test_the_folder_loads_generates_with_a_cache_and_trains(checkpoints, tmp_path):
    source = checkpoints / "gpt_neox-shakespeare"
    done = normswap.convert(source, tmp_path / "out", qk_norm="rmsnorm", tokens=2048, verify="fast")
    assert done.plan.claim == "exact" and done.plan.calibrated_on.startswith("2048 tokens")
    assert done.report.mathematics.comparison.output.error.max == 0.0
    assert "range(0, 480, 96)" in (done.folder / "modeling_normswap.py").read_text()
    model = AutoModelForCausalLM.from_pretrained(done.folder, trust_remote_code=True)
    assert not any(torch.equal(norm.weight, torch.ones(48)) for norm in model.modules() if hasattr(norm, "gate"))
    assert opened(model, 0.5) == 12
    ids = torch.arange(12)[None]
    cached, plain = (
        model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=use, pad_token_id=0) for use in (True, False)
    )
    assert torch.equal(cached, plain)
    losses = []
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        loss = model(ids, labels=ids).loss
        loss.backward()
        gates = [p.grad for name, p in model.named_parameters() if name.endswith("gate")]
        assert len(gates) == 12 and all(bool(g.abs() > 0) for g in gates)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[1] < losses[0]
    assert normswap.undo(done.folder, tmp_path / "back", verify="fast").same_files


def test_gains_are_weighted_least_squares_channel_by_channel():
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, generator=generator, dtype=torch.float64) for n in ((50, 6), (50,)))
    n, w = x / x.square().mean(-1, keepdim=True).sqrt(), w.square()
    root = w.sqrt()[:, None]
    for kind in ("gated-rmsnorm", "gated-layernorm"):
        found = KINDS[kind].inserted(n, x, w)
        for channel in range(6):
            columns = [n[:, channel]] + [torch.ones(50, dtype=torch.float64)] * ("bias" in found)
            best = torch.linalg.lstsq(root * torch.stack(columns, 1), root * x[:, [channel]]).solution.flatten()
            ours = torch.stack([found[name][channel] for name in ("weight", "bias") if name in found])
            assert (ours - best).abs().max() < 1e-12  # 4e-16


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_on_data_gains_are_those_with_which_an_opened_gate_changes_least(kind):
    model = tiny("llama").double().eval()
    for layer in model.model.layers:  # a scale that a norm takes out, and its gain puts back
        layer.self_attn.q_proj.weight.data *= 3
    generator = torch.Generator().manual_seed(2)
    batches = [{"input_ids": torch.randint(0, 99, (4, 30), generator=generator)} for _ in range(3)]
    neutral = normswap.plan(model, qk_norm=kind)
    assert any("Their gains are 1, as there are no data" in reason for reason in neutral.reasons)
    fitted = normswap.plan(model, qk_norm=kind, calibrate=batches)
    assert fitted.claim == "exact" and fitted.calibrated_on == "2 batches"
    assert not any("no data" in reason for reason in fitted.reasons)
    costs = []
    for plan in (neutral, fitted):
        converted = apply_plan(copy.deepcopy(model), plan)
        assert all(torch.equal(result(converted, inputs), result(model, inputs)) for inputs in batches)
        assert opened(converted, 1.0) == 4
        costs.append(cost(model, converted, batches[-1:]))
    assert costs[1] < 0.95 * costs[0]  # 0.67 and 0.91 of it


@pytest.mark.parametrize(
    "family, kind, message",
    [
        ("olmo2", "rmsnorm", "gets no norm on queries and keys: its q has the norm model.layers.0.self_attn.q_norm"),
        ("llama", "batchnorm", "--qk-norm batchnorm is not offered: expected one of rmsnorm, layernorm"),
    ],
)
def test_what_cannot_be_had_is_refused(family, kind, message):
    with pytest.raises(RefusedError, match=message):
        normswap.plan(tiny(family), qk_norm=kind)


def test_keys_of_a_latent_projection_are_refused_and_named():
    """DeepSeek's keys are put together of two modules' outputs; its queries are not."""
    model = build("deepseek_v3")
    with pytest.raises(RefusedError, match="no single module gives its k"):
        normswap.plan(model, qk_norm="rmsnorm")
    plan = normswap.plan(model, qk_norm="rmsnorm", partial=True)
    assert plan.refused and {e.module.rpartition(".")[2] for e in plan.edits if e.edit == "add_norm"} == {"q_norm"}
