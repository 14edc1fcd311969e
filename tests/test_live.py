import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM
from transformers.models.olmo.modeling_olmo import OlmoLayerNorm

import normswap
from hand_plans import PARTS, folded_gpt2_plan, logits, plan_of, rms_edits, rms_plan, small, swap, token_ids
from models import WIDTH, tiny
from normswap.apply.live import apply_plan, apply_structure
from normswap.errors import PlanError, RefusedError
from normswap.norms.kinds.rms_norm import RMSNorm
from normswap.planning.edits import Centre, Drop, Fill, FoldBias, FoldGain, GrowBias, SetConfig, Untie

CASES = [
    ("gpt2", "untie"),
    ("gpt2", "centre output"),
    ("gpt_neox", None),
    ("olmo", None),
    ("phi", None),
    ("phimoe", None),
]


@pytest.fixture(autouse=True)
def olmo_in_float64(monkeypatch):
    """OLMo's norm computes in float32 inside, even in a float64 model."""
    monkeypatch.setattr(OlmoLayerNorm, "forward", lambda self, x: F.layer_norm(x, self.normalized_shape, eps=1e-5))


def relative(found, expected):
    return float((found - expected).abs().max() / expected.std())


@pytest.mark.parametrize(("model_type", "tied"), CASES)
def test_rms_plan_keeps_the_function(model_type, tied):
    model, ids = small(model_type), token_ids()
    expected = logits(model, ids)
    plan = rms_plan(model, tied)

    swapped = copy.deepcopy(model)
    apply_structure(swapped, plan_of(model, [e for e in plan.edits if e.edit == "swap_norm"]))
    # the test can fail: without centring, the same swap is far off (measured: 6.1 to 8.7)
    assert relative(logits(swapped, ids), expected) > 1

    assert apply_plan(model, plan) is model
    norms = [path for path, module in model.named_modules() if path.endswith(PARTS[model_type][1])]
    assert norms and all(isinstance(model.get_submodule(path), RMSNorm) for path in norms)
    assert not any(isinstance(module, nn.LayerNorm) for module in model.modules())
    # measured: 2.3e-15 to 5.7e-15
    assert relative(logits(model, ids), expected) < 1e-10


def test_folded_plan_keeps_the_function_and_leaves_no_weights_in_the_norms():
    model, ids = small("gpt2"), token_ids()
    expected = logits(model, ids)
    apply_plan(model, folded_gpt2_plan(model))
    assert model.lm_head.bias.shape == (99,) and model.lm_head.bias.abs().max() > 0.1
    assert not any("ln_" in name for name in model.state_dict())
    # measured: 6.2e-15
    assert relative(logits(model, ids), expected) < 1e-10


def test_edits_act_in_float64_on_originals_and_round_once():
    model = small("gpt_neox", dtype=torch.bfloat16)
    before = {name: value.double().clone() for name, value in model.state_dict().items()}
    layer = "gpt_neox.layers.0"
    weight, bias, norm = (
        f"{layer}.mlp.dense_h_to_4h.weight",
        f"{layer}.mlp.dense_h_to_4h.bias",
        f"{layer}.input_layernorm",
    )
    edits = [
        # what is read is changed first, in the plan's order, and must still be read as it was
        Fill(tensor=f"{norm}.weight", value=1.0),
        Fill(tensor=f"{norm}.bias", value=0.0),
        FoldGain(tensor=weight, axis=1, weight=f"{norm}.weight", form="w"),
        Centre(tensor=weight, axis=0, groups=3),
        FoldBias(tensor=bias, reader=weight, axis=1, bias=f"{norm}.bias"),
    ]
    apply_plan(model, plan_of(model, edits))

    gained = (before[weight] * before[f"{norm}.weight"]).unflatten(0, (3, -1))
    expected = {
        f"{norm}.weight": torch.ones(32),
        f"{norm}.bias": torch.zeros(32),
        weight: (gained - gained.mean(1, keepdim=True)).flatten(0, 1),
        bias: before[bias] + before[weight] @ before[f"{norm}.bias"],
    }
    after = model.state_dict()
    for name in before:
        assert after[name].dtype == torch.bfloat16
        assert torch.equal(after[name], expected.get(name, before[name]).bfloat16()), name
    assert not torch.equal(before[weight].bfloat16(), after[weight])


def test_parameters_keep_identity_gradient_flag_dtype_and_mode():
    model = small("gpt2", dtype=torch.float16).train()
    model.transformer.h[1].ln_1.eval()
    model.transformer.h[0].ln_1.weight.requires_grad_(False)
    model.transformer.wte.weight.requires_grad_(False)
    before = dict(model.named_parameters(remove_duplicate=False))
    apply_plan(model, rms_plan(model, "untie"))
    after = dict(model.named_parameters(remove_duplicate=False))
    assert before.keys() == after.keys()
    for name, parameter in after.items():
        assert (parameter is before[name]) == (name != "lm_head.weight"), name
        assert parameter.requires_grad == before[name].requires_grad
        assert parameter.dtype == torch.float16
    assert not model.lm_head.weight.requires_grad
    assert [block.ln_1.training for block in model.transformer.h] == [True, False]


def test_untied_weights_stay_untied(tmp_path):
    model = small("gpt2")
    table = model.lm_head.weight.detach().clone()
    apply_plan(model, rms_plan(model, "untie"))
    assert torch.equal(model.lm_head.weight, table)
    assert not torch.equal(model.transformer.wte.weight, table)
    assert not model.config.tie_word_embeddings and not model.all_tied_weights_keys

    model.tie_weights()
    assert torch.equal(model.lm_head.weight, table)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(again.lm_head.weight, table)
    assert torch.equal(again.transformer.wte.weight, model.transformer.wte.weight)


def test_structure_works_on_the_meta_device():
    model = small("gpt2")
    plan = folded_gpt2_plan(model)
    with torch.device("meta"):
        empty = type(model)(copy.deepcopy(model.config))
        untouched = type(model)(copy.deepcopy(model.config))
    apply_structure(empty, plan)
    apply_plan(model, plan)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert {name: tuple(value.shape) for name, value in empty.state_dict().items()} == shapes
    with pytest.raises(PlanError, match="is to be edited, but it has no values here"):
        apply_plan(untouched, plan)


def test_config_edits_reach_nested_configurations():
    model = small("gpt2")
    model.config.text_config = copy.deepcopy(model.config)
    edits = [SetConfig(key="n_inner", value=7), SetConfig(key="text_config.n_inner", value=8)]
    apply_structure(model, plan_of(model, edits))
    assert (model.config.n_inner, model.config.text_config.n_inner) == (7, 8)
    with pytest.raises(PlanError, match="sets vision.width, but GPT2Config has no vision"):
        apply_structure(model, plan_of(model, [SetConfig(key="vision.width", value=1)]))


LN = "transformer.h.0.ln_1"
MISFITS = {
    "missing tensor": ([Centre(tensor="transformer.wxe.weight", axis=1)], "transformer.wxe.weight"),
    "missing axis": ([Centre(tensor="transformer.wpe.weight", axis=2)], r"transformer.wpe.weight.*\(64, 32\)"),
    "groups": (
        [Centre(tensor="transformer.wpe.weight", axis=1, groups=5)],
        "centre does not fit transformer.wpe.weight",
    ),
    "missing module": ([GrowBias(module="lm_tail", size=3)], "module lm_tail"),
    "bias size": (
        [
            GrowBias(module="lm_head", size=3),
            FoldBias(tensor="lm_head.bias", reader="lm_head.weight", axis=1, bias="transformer.ln_f.bias"),
        ],
        "fold_bias does not fit lm_head.bias",
    ),
    "bias there": ([GrowBias(module="transformer.h.0.mlp.c_fc", size=3)], "has one already"),
    "no place for a bias": ([GrowBias(module="transformer.wte", size=3)], "no place for a bias"),
    "width": (
        [swap(LN, nn.LayerNorm(31), 31)],
        r"transformer.h.0.ln_1.weight: expected shape \(31,\), found \(32,\)",
    ),
    "lost bias": ([swap(LN, nn.LayerNorm(32), 32, bias=False)], "would lose transformer.h.0.ln_1.bias"),
    "reads nothing": (
        [FoldGain(tensor="transformer.h.0.attn.c_attn.weight", axis=0, weight="ln.weight", form="w")],
        "reads ln.weight",
    ),
    "gain of another width": (
        [FoldGain(tensor="transformer.h.0.mlp.c_fc.weight", axis=1, weight=f"{LN}.weight", form="w")],
        "fold_gain does not fit transformer.h.0.mlp.c_fc.weight",
    ),
    "dropped, then filled": ([Drop(tensor=f"{LN}.bias"), Fill(tensor=f"{LN}.bias", value=0)], "no value yet"),
    "value for what is gone": (
        [swap(LN, nn.LayerNorm(32), 32, bias=False), Drop(tensor="transformer.h.0.ln_1.bias")]
        + [FoldBias(tensor=f"{LN}.bias", reader="transformer.wpe.weight", axis=1, bias="transformer.h.0.ln_2.bias")],
        "new structure has no such tensor",
    ),
    "both names of a tied tensor": (
        [Fill(tensor="lm_head.weight", value=0), Fill(tensor="transformer.wte.weight", value=0)],
        "one tied tensor",
    ),
    "untie what is not there": ([Untie(tensor="lm_tail.weight", source="transformer.wte.weight")], "no tensor lm_tail"),
    "circle": (
        [
            FoldGain(tensor=f"{LN}.weight", axis=0, weight=f"{LN}.bias", form="w"),
            FoldGain(tensor=f"{LN}.bias", axis=0, weight=f"{LN}.weight", form="w"),
        ],
        "in a circle",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_plan_that_does_not_fit_leaves_the_model_as_it_was(name):
    misfit, message = MISFITS[name]
    model = small("gpt2", dtype=torch.float32)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    structure, config = repr(model), model.config.to_dict()
    # sound edits stand before the misfit: of values, structure, ties and configuration
    sound = [Fill(tensor="transformer.h.1.ln_2.weight", value=1), SetConfig(key="n_inner", value=5)]
    sound += [swap("transformer.h.1.ln_1", model.transformer.h[1].ln_1, 32)]
    with pytest.raises(PlanError, match=message):
        apply_plan(model, plan_of(model, sound + misfit))
    assert repr(model) == structure and model.config.to_dict() == config
    assert model.lm_head.weight is model.transformer.wte.weight
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


def test_another_model_is_refused():
    model = small("gpt2")
    plan = plan_of(model, rms_edits(model, "untie"), architecture="GPTNeoXForCausalLM")
    with pytest.raises(PlanError, match="made for GPTNeoXForCausalLM, but the model is a GPT2LMHeadModel"):
        apply_plan(model, plan)


def test_one_flag_ties_several_tensors_so_all_are_untied_or_none():
    config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    model = BertForMaskedLM(config)
    weight = Untie(tensor="cls.predictions.decoder.weight", source="bert.embeddings.word_embeddings.weight")
    bias = Untie(tensor="cls.predictions.decoder.bias", source="cls.predictions.bias")
    with pytest.raises(PlanError, match="leaves cls.predictions.decoder.bias tied"):
        apply_plan(model, plan_of(model, [weight]))
    assert model.config.tie_word_embeddings
    apply_plan(model, plan_of(model, [weight, bias]))
    assert model.cls.predictions.decoder.weight is not model.bert.embeddings.word_embeddings.weight
    assert model.cls.predictions.decoder.bias is not model.cls.predictions.bias


# ---- what the observed pass does not reach, or kernels hide


def test_cross_attention_that_did_not_run_is_refused():
    """Given nothing to look at it is passed by; given something, it writes to the stream."""
    model = tiny("gpt2", add_cross_attention=True).double()
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 90, (3, 5), generator=generator)
    with pytest.raises(RefusedError, match=r"h\.0\.crossattention\.c_attn\.weight and 15 more did not take part"):
        normswap.plan(model, norm="rmsnorm", inputs=dict(input_ids=ids))
    seen = torch.randn(3, 7, WIDTH, generator=generator, dtype=torch.float64)
    original = copy.deepcopy(model)
    plan = normswap.convert_model(
        model, norm="rmsnorm", inputs=dict(input_ids=ids, encoder_hidden_states=seen, use_cache=False)
    )
    assert any("ln_cross_attn" in path for path in plan.converted)
    with torch.no_grad():
        for given in (dict(encoder_hidden_states=seen), {}):
            assert relative(model(ids, **given).logits, original(ids, **given).logits) < 1e-10


def test_experts_in_kernels_without_float64_are_verified_all_the_same():
    model = tiny("mixtral", experts_implementation="grouped_mm")
    assert normswap.convert_model(model, fold=True).converted
    assert model.config._experts_implementation == "grouped_mm"
