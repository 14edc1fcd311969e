"""Every family of causal models: converted exactly, with every edit needed; folding, refusals, partial conversions."""

import copy
import json
from functools import cache

import pytest
import torch

import normswap
from models import tiny
from normswap.apply.live import apply_plan
from normswap.errors import NormswapError, RefusedError
from normswap.norms.kinds.rms_norm import RMSNorm
from normswap.planning.plans import Plan
from normswap.understand.normmap import find_sites
from normswap.verification.precision import LiftFloat32

# LayerNorm families, with the flags that change what stands where
LAYERNORM = {
    "gpt2": {},
    "gpt2 cross-layer scales": dict(scale_attn_by_inverse_layer_idx=True),
    "gpt_neox": {},
    "gpt_neox sequential": dict(use_parallel_residual=False),
    "opt": {},
    "opt no bias": dict(enable_bias=False),
    "opt weightless": dict(layer_norm_elementwise_affine=False),
    "opt projected embedding": dict(word_embed_proj_dim=20),
    "olmo": {},
    "olmo clipped qkv": dict(clip_qkv=0.5),
    "olmo tied": dict(tie_word_embeddings=True),
    "phi": {},
    "phi qk norm": dict(qk_layernorm=True),
    "bloom": {},
    "falcon": {},
    "falcon new": dict(new_decoder_architecture=True, num_kv_heads=2),
    "falcon new, one norm": dict(new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1),
    "falcon sequential": dict(parallel_attn=False),
    "falcon bias, alibi": dict(bias=True, alibi=True, multi_query=False),
    "falcon sequential, bias": dict(parallel_attn=False, bias=True),
    "mpt": {},
    "stablelm": {},
    "stablelm parallel": dict(use_parallel_residual=True),
    "stablelm qk norm": dict(qk_layernorm=True),
    "starcoder2": {},
    "starcoder2 no bias": dict(use_bias=False),
    "gptj": {},
    "cohere": {},
    "nemotron": {},
    "phimoe": {},
}
RMSNORM = {
    "llama": dict(attention_bias=True),
    "llama tied": dict(tie_word_embeddings=True),
    "mistral": {},
    "gemma2": {},
    "mixtral": {},
    "olmo2": {},
    "t5": {},
}
# what --fold cannot have there, with the word in the reason that tells why
UNFOLDED = {
    "phi qk norm": ("q_layernorm", "getitem"),
    "bloom": ("word_embeddings_layernorm", "follows it"),
    "falcon bias, alibi": ("input_layernorm", "cannot grow one"),
    "falcon sequential, bias": ("input_layernorm", "cannot grow one"),
    "stablelm qk norm": ("q_layernorm", "cat in"),
    "phimoe": ("post_attention_layernorm", "cannot grow one"),
}

EXACT = 1e-10
WRONG = 1e-6


@cache
def original(name):
    return tiny(name.split()[0], **(LAYERNORM | RMSNORM)[name]).double()


@cache
def planned(name, *, norm="rmsnorm", fold=False, tied="keep", partial=False):
    return normswap.plan(original(name), norm=norm, fold=fold, tied=tied, partial=partial)


def converted(name, plan):
    return apply_plan(copy.deepcopy(original(name)), plan)


def batches():
    """Batches unlike the one observed: lengths, ids, and padding on either side."""
    generator = torch.Generator().manual_seed(1)
    found = [dict(input_ids=torch.randint(3, 90, shape, generator=generator)) for shape in ((2, 9), (1, 1), (3, 17))]
    for side in (slice(None, 4), slice(6, None)):
        mask = torch.ones(2, 11, dtype=torch.long)
        mask[0, side] = 0
        found.append(dict(input_ids=torch.randint(3, 90, (2, 11), generator=generator), attention_mask=mask))
    return found


def logits(model, batch):
    with LiftFloat32():
        found = model(**batch, use_cache=False).logits
    # rows of padding attend to nothing, and are no part of the model's function
    return found[batch["attention_mask"].bool()] if "attention_mask" in batch else found


@cache
def expected(name):
    with torch.no_grad():
        return [logits(original(name), batch) for batch in batches()]


def error(model, name, first=False):
    """The largest difference of the logits on any batch, relative to their spread."""
    pairs = list(zip(batches(), expected(name), strict=True))
    with torch.no_grad():
        off = [
            float((logits(model, batch) - want).abs().max() / want.std()) for batch, want in pairs[: 1 if first else 9]
        ]
    return max(off) if all(x == x for x in off) else float("inf")


def kinds(model):
    return [spec.kind for _, spec in find_sites(model)]


# -- exactness ---------------------------------------------------------------------------------------------------------


UNTIED = ("gpt_neox", "olmo", "phi", "stablelm", "gptj", "nemotron", "phimoe")  # in their configurations
TIED = [name for name in LAYERNORM if name == "olmo tied" or name.split()[0] not in UNTIED]


@pytest.mark.parametrize(("name", "tied"), [(n, "keep") for n in LAYERNORM] + [(n, "untie") for n in TIED])
def test_layernorm_becomes_rmsnorm_exactly(name, tied):
    before = kinds(original(name))
    assert len(before) >= 3 and set(before) == {"layernorm"}
    plan = planned(name, tied=tied)
    model = converted(name, plan)
    assert plan.claim == "exact" and not plan.refused
    # a norm whose output is centred too is a norm and something more
    more = [edit for edit in plan.edits if edit.edit == "centre_output" and edit.module in plan.converted]
    assert len(more) == (name == "bloom")
    assert kinds(model) == ["rmsnorm"] * (len(before) - len(more))
    swapped = [path for path, module in model.named_modules() if isinstance(module, RMSNorm)]
    assert set(swapped) == set(plan.converted) and len(swapped) == len(before)
    # measured: 3e-15 to 8e-15
    assert error(model, name) < EXACT
    tables = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    untied = [edit for edit in plan.edits if edit.edit == "untie"]
    # where the head is no embedding, untying would gain nothing and is left out
    assert bool(untied) == (original(name).config.tie_word_embeddings and tied == "untie" and "project" not in name)
    assert (tables[0] is tables[1]) == (original(name).config.tie_word_embeddings and not untied)


@pytest.mark.parametrize("name", LAYERNORM)
def test_folded_norms_are_weightless(name):
    if name in UNFOLDED:
        site, why = UNFOLDED[name]
        with pytest.raises(RefusedError) as caught:
            planned(name, fold=True, tied="untie")
        assert caught.value.refusals and all(why in reason for _, reason in caught.value.refusals)
        assert any(site in path for path, _ in caught.value.refusals)
    plan = planned(name, fold=True, tied="untie", partial=name in UNFOLDED)
    model = converted(name, plan)
    left = {refusal.site for refusal in plan.refused}
    norms = {path: module for path, module in model.named_modules() if isinstance(module, RMSNorm)}
    assert len(norms) == len(kinds(original(name))) > len(left)
    for path, norm in norms.items():
        assert path in left or (norm.weight is None and norm.bias is None), path
    # measured: 4e-15 to 1e-14
    assert error(model, name) < EXACT


def test_the_measure_sees_a_conversion_without_centring():
    """Guards all of the above: these models have streams with large means."""
    for name in ("gpt2", "gpt_neox", "opt", "olmo", "bloom", "falcon", "mpt", "cohere", "phimoe"):
        plan = planned(name)
        bare = plan.model_copy(update={"edits": tuple(edit for edit in plan.edits if edit.edit == "swap_norm")})
        # measured: 6.0 to 8.2
        assert error(converted(name, bare), name, first=True) > 0.5, name


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "bloom", "phimoe"])
def test_gradients_flow_to_every_parameter_that_had_one(name):
    batch = batches()[0]
    found = []
    for model in (original(name), converted(name, planned(name))):
        model = copy.deepcopy(model).requires_grad_(True)
        logits(model, batch).square().mean().backward()
        found.append({k: float(p.grad.abs().max()) for k, p in model.named_parameters() if p.grad is not None})
    before, after = found
    assert before.keys() == after.keys() and len(before) > 10
    for key in before:
        assert (before[key] > 0) == (after[key] > 0), key
    head = original(name).get_output_embeddings().weight
    if head is not original(name).get_input_embeddings().weight:
        (key,) = [key for key, p in original(name).named_parameters() if p is head]
        # what reads is as it was, and so is its gradient; measured: 1e-15
        assert after[key] == pytest.approx(before[key], rel=1e-10)


@pytest.mark.parametrize("name", ["gpt2", "phimoe", "cohere"])
def test_convert_model_verifies_and_converts_in_place(name):
    model = copy.deepcopy(original(name))
    plan = normswap.convert_model(model, norm="rmsnorm")
    assert set(kinds(model)) == {"rmsnorm"} and plan == planned(name)
    # measured: 2e-15 to 7e-15
    assert error(model, name) < EXACT


# -- every edit is needed ----------------------------------------------------------------------------------------------

REQUESTS = {
    "swap": dict(),
    "swap and fold": dict(fold=True, tied="untie"),
    "fold": dict(norm=None, fold=True, tied="untie"),
}
CASES = [
    ("gpt2", "swap"),
    ("gpt2", "swap and fold"),
    ("gpt_neox", "swap and fold"),
    ("opt", "swap and fold"),
    ("bloom", "swap"),
    ("bloom", "swap and fold"),
    ("falcon new", "swap and fold"),
    ("stablelm qk norm", "swap"),
    ("cohere", "swap"),
    ("cohere", "fold"),
    ("phimoe", "swap and fold"),
    ("mixtral", "fold"),
    ("gemma2", "fold"),
]


def outcome(name, plan, edit):
    """What gives the lack of one edit away; empty when nothing does."""
    lacking = plan.model_copy(update={"edits": tuple(e for e in plan.edits if e is not edit)})
    try:
        model = converted(name, lacking)
    except NormswapError:
        return "refused"
    try:
        off = error(model, name, first=True)
    except (AttributeError, TypeError):
        return "cannot run"  # a stock norm whose parameters were dropped
    if off > WRONG:
        return "wrong"
    if edit.edit == "swap_norm":
        norm = model.get_submodule(edit.module)
        x = torch.randn(2, 3, edit.width, dtype=torch.float64)
        with torch.no_grad(), LiftFloat32():
            return "a LayerNorm remains" if torch.allclose(norm(x + 1), norm(x)) else ""
    if edit.edit == "fold_bias" and keys_only(name, edit):
        return "other keys"
    return ""


def keys_only(name, edit):
    """Whether the edit gives keys a constant, which no softmax over keys sees: then the keys themselves must tell."""
    return edit.tensor.endswith("k_proj.bias") and name.startswith("opt") and key_error(name, edit) > WRONG


def key_error(name, edit):
    plan = planned(name, fold=True, tied="untie")
    lacking = plan.model_copy(update={"edits": tuple(e for e in plan.edits if e != edit)})
    assert len(lacking.edits) == len(plan.edits) - 1
    seen = []
    for model in (original(name), converted(name, plan), converted(name, lacking)):
        hook = model.get_submodule(edit.tensor.rpartition(".")[0]).register_forward_hook(
            lambda module, args, output: seen.append(output)
        )
        with torch.no_grad():
            logits(model, batches()[0])
        hook.remove()
    want, whole, without = seen
    # measured: 3e-16
    assert float((whole - want).abs().max() / want.std()) < EXACT
    return float((without - want).abs().max() / want.std())


@pytest.mark.parametrize(("name", "asked"), CASES)
def test_every_edit_is_needed(name, asked):
    plan = planned(name, **REQUESTS[asked], partial=True)
    assert error(converted(name, plan), name, first=True) < EXACT
    assert len(plan.edits) >= 8
    inert = [edit for edit in plan.edits if edit.edit != "set_config" and not outcome(name, plan, edit)]
    assert inert == []


def test_the_flag_for_tied_embeddings_reaches_the_configuration(tmp_path):
    """On a live model untying says it all; a checkpoint needs the flag, and without it says that things are tied."""
    tiny("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "source")
    plan = normswap.plan(tmp_path / "source", fold=True, tied="untie")
    lacking = plan.model_copy(update={"edits": tuple(edit for edit in plan.edits if edit.edit != "set_config")})
    assert len(lacking.edits) == len(plan.edits) - 1
    flags = []
    for made in (plan, lacking):
        normswap.convert(tmp_path / "source", tmp_path / "out", plan=made, verify="none", overwrite=True)
        flags.append(json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"])
    assert flags == [False, True]


# -- folding where norms are RMSNorms already --------------------------------------------------------------------------

STAY = {
    "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "olmo2": ("q_norm", "k_norm", "post_attention_layernorm", "post_feedforward_layernorm"),
}


@pytest.mark.parametrize("name", ["llama", "llama tied", "mistral", "gemma2", "mixtral", "olmo2"])
def test_gains_of_rmsnorms_are_folded_and_stay_neutral(name):
    stay = STAY.get(name, ())
    if stay:
        with pytest.raises(RefusedError, match="--partial") as caught:
            planned(name, norm=None, fold=True, tied="untie")
        assert {path.rpartition(".")[2] for path, _ in caught.value.refusals} == set(stay)
    plan = planned(name, norm=None, fold=True, tied="untie", partial=bool(stay))
    model = converted(name, plan)
    # measured: 2e-15 to 4e-15
    assert error(model, name) < EXACT
    sites, neutral = find_sites(model), 0.0 if name == "gemma2" else 1.0
    before = original(name).state_dict()
    checked = 0
    for path, spec in sites:
        gain = model.get_submodule(path).weight
        if path.endswith(stay) and stay:
            assert torch.equal(gain, before[f"{path}.weight"])
        else:
            assert spec.gain == ("1 + w" if name == "gemma2" else "w")
            assert torch.equal(gain, torch.full_like(gain, neutral)), path
            checked += 1
    assert checked == len(plan.converted) > 0
    assert not plan.module_edits()  # the stock class still fits


def test_routers_and_fused_experts_are_readers_too():
    plan = planned("mixtral", norm=None, fold=True)
    layer = {edit.tensor for edit in plan.edits if edit.edit == "fold_gain" and "layers.1.mlp" in edit.tensor}
    assert layer == {"model.layers.1.mlp.gate.weight", "model.layers.1.mlp.experts.gate_up_proj"}


def test_a_bias_folded_into_readers_without_one_grows_it():
    plan = planned("nemotron", fold=True)
    model = converted("nemotron", plan)
    grown = [edit.module for edit in plan.edits if edit.edit == "grow_bias"]
    assert "lm_head" in grown and len(grown) == 9
    for path in grown:
        assert original("nemotron").get_submodule(path).bias is None
        # measured: 0.4 and more
        assert model.get_submodule(path).bias.abs().max() > 0.1


# -- plans are data ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "bloom", "phi", "phimoe"])
def test_a_plan_read_from_json_gives_the_same_bits(name, tmp_path):
    plan = planned(name, fold=True, tied="untie", partial=True)
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan
    first, second = converted(name, plan).state_dict(), converted(name, again).state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_there_is_nothing_to_untie_where_nothing_is_tied():
    for name in ("gpt_neox", "nemotron"):
        assert not original(name).config.tie_word_embeddings
        assert planned(name, tied="untie").edits == planned(name).edits


def test_a_plan_made_twice_is_the_same():
    for name in ("gpt_neox", "phimoe"):
        assert normswap.plan(original(name), norm="rmsnorm") == planned(name)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "mixtral", "t5"])
def test_rmsnorm_models_are_not_centred(name):
    with pytest.raises(RefusedError, match="no layernorm.*rmsnorm.*Nothing to convert"):
        planned(name, norm="rmsnorm")


def test_post_norm_bert_is_refused_with_module_reason_and_way_out():
    model = tiny("bert").double()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(RefusedError) as caught:
        normswap.convert_model(model, norm="rmsnorm")
    reasons = dict(caught.value.refusals)
    site = "bert.encoder.layer.0.attention.output.LayerNorm"
    assert "bert.embeddings.LayerNorm" in reasons[site] and "attention.self.query" in reasons[site]
    assert "bert.embeddings.LayerNorm" not in reasons and len(reasons) == 5
    assert "--partial" in str(caught.value) and "bert.encoder.layer.0-1.output.LayerNorm" in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_partial_converts_what_can_be_and_leaves_the_rest():
    model = tiny("bert").double()
    plan = normswap.plan(model, norm="rmsnorm", partial=True)
    assert plan.converted == ("bert.embeddings.LayerNorm",) and len(plan.refused) == 5
    done = apply_plan(copy.deepcopy(model), plan)
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), LiftFloat32():
        want, found = model(input_ids=ids).logits, done(input_ids=ids).logits
    # measured: 1e-15
    assert float((found - want).abs().max() / want.std()) < EXACT
    before, after = model.state_dict(), done.state_dict()
    assert kinds(done).count("rmsnorm") == 1 and kinds(done).count("layernorm") == 5
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and all(key.startswith(("bert.embeddings.", "cls.predictions.decoder")) for key in changed)


@pytest.mark.parametrize(
    "flags",
    [
        ("opt", dict(do_layer_norm_before=False)),
        ("bloom", dict(apply_residual_connection_post_layernorm=True)),
        ("bart", {}),
    ],
    ids=["opt post-norm", "bloom post-norm", "bart"],
)
def test_the_same_class_post_norm_is_refused(flags):
    """The class is the one that converts above: its flags move the norms."""
    model = tiny(flags[0], **flags[1]).double()
    with pytest.raises(RefusedError) as caught:
        normswap.plan(model, norm="rmsnorm")
    assert any("would notice a shift" in reason for _, reason in caught.value.refusals)


def test_head_norms_of_cohere_are_centred_through_queries_and_keys():
    model = tiny("cohere", use_qk_norm=True).double()
    plan = normswap.plan(model, norm="rmsnorm")
    done = apply_plan(copy.deepcopy(model), plan)
    assert len(plan.converted) == 7 and done.model.layers[0].self_attn.q_norm.weight.shape == (4, 8)
    with torch.no_grad():
        want, found = (logits(m, batches()[0]) for m in (model, done))
    # measured: 3e-15
    assert float((found - want).abs().max() / want.std()) < EXACT


def test_vit_is_converted_exactly():
    model = tiny("vit").double()
    pixels = torch.randn(3, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plan = normswap.plan(model, norm="rmsnorm")
    done = apply_plan(copy.deepcopy(model), plan)
    centred = {edit.tensor for edit in plan.edits if edit.edit == "centre"}
    start = "vit.embeddings."
    assert {f"{start}cls_token", f"{start}position_embeddings", f"{start}patch_embeddings.projection.weight"} <= centred
    with torch.no_grad():
        want, found = model(pixel_values=pixels).logits, done(pixel_values=pixels).logits
    # measured: 3e-15
    assert float((found - want).abs().max() / want.std()) < EXACT
    inputs = dict(pixel_values=pixels)
    assert {spec.kind for _, spec in find_sites(done, inputs)} == {"rmsnorm"}
