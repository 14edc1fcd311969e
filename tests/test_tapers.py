"""Tapers: they start as the source, end as what is published, and both forms are trained on the way."""

import copy
import math
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from models import tiny
from normswap.apply.live import apply_plan, apply_structure
from normswap.calibration.data import Data, silent
from normswap.errors import RecipeError, RefusedError, VerificationError
from normswap.planning.edits import AddNorm, SwapNorm
from normswap.planning.request import Request
from normswap.repbn import folded_plan, reestimate
from normswap.tune.recipe import Recipe, Stage
from normswap.tune.run import finetune
from normswap.tune.schedule import Schedule
from normswap.tune.selection import select
from normswap.tune.surgery import Surgery, check_start, difference, finish, operate, plan_surgery
from normswap.tune.tapers import Tapered, TaperedLane, ramped, set_ramps, turns
from normswap.understand.normmap import find_sites
from normswap.verification.precision import LiftFloat32

CHECKPOINTS = Path(__file__).parent / "checkpoints"


def tokens(vocabulary: int = 99, count: int = 4, rows: int = 4, length: int = 16) -> list[dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, vocabulary, (rows, length), generator=g)} for _ in range(count)]


def surgery_of(source: nn.Module, tapers: bool = True, batches=None, **words) -> Surgery:
    batches = batches or tokens()
    return plan_surgery(source, Request.of(**words), Data(source, batches[:-1], batches[-1:], "ids", silent), tapers)


@torch.no_grad()
def trained(model: nn.Module) -> nn.Module:
    """As if it were: every parameter stands elsewhere, and nothing is centred or of one scale that was."""
    g = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=g, dtype=parameter.dtype))
    return model


# ---- from the source to the target

# what the scaffolding is: norms exchanged, a ramp of their own, lanes, gates, and two of them at once
TAPERS = [
    ("gpt2", dict(norm="dyt"), Tapered, 5),
    ("llama", dict(norm="derf"), Tapered, 5),
    ("gemma2", dict(norm="none"), Tapered, 9),
    ("bert", dict(norm="dyt"), Tapered, 6),
    ("phi", dict(norm=["dyt", "rmsnorm"], role=["stream", "final"]), Tapered, 2),
    ("gpt_neox", dict(norm="dyt", sites="*.0.*"), Tapered, 2),
    ("llama", dict(placement="deepnorm"), TaperedLane, 4),
    ("gpt_neox", dict(placement="post", norm="rmsnorm"), TaperedLane, 2),
    ("gptj", dict(placement="post", fold=True), TaperedLane, 2),
    ("llama", dict(placement="post", qk_norm="rmsnorm"), (TaperedLane, Tapered), 8),
    ("phi", dict(placement="sandwich", norm="rmsnorm"), Tapered, 2),
    ("opt", dict(qk_norm="layernorm"), Tapered, 4),
]


@pytest.mark.parametrize("name, words, scaffolding, count", TAPERS, ids=[f"{n} {w}" for n, w, *_ in TAPERS])
def test_a_taper_starts_as_the_source_and_ends_as_its_target(name, words, scaffolding, count):
    batches = tokens()
    with LiftFloat32():
        source = tiny(name).double()
        kept = copy.deepcopy(source.state_dict())
        surgery = surgery_of(source, **words)
        model = operate(source, surgery)
        sites = ramped(model)
        assert len(sites) == count and all(isinstance(module, scaffolding) for module in sites.values())
        assert {type(module) for module in sites.values()} == set(
            scaffolding if isinstance(scaffolding, tuple) else [scaffolding]
        )
        assert difference(source, model, batches[-1:]) < 1e-10  # 7.2e-16
        assert check_start(source, model, batches[-1:]) < 1e-10

        # halfway, both sides are trained
        set_ramps(model, dict.fromkeys(sites, 0.5))
        model.train()(**batches[0])[0].square().sum().backward()
        without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert not without
        model.zero_grad()

        set_ramps(trained(model.eval()), dict.fromkeys(sites, 0.0))
        scaffold = copy.deepcopy(model)
        plan, final = finish(source, surgery, model)
        assert difference(scaffold, final, batches[-1:]) < 1e-10  # 8.3e-16
        assert difference(source, final, batches[-1:]) > 1e-2, "it is no longer the source"
        assert not ramped(final) and not any(isinstance(m, Tapered | TaperedLane) for m in final.modules())
        assert not any("gate" == n.rpartition(".")[2] for n, _ in final.named_parameters())
        assert all(torch.equal(value, kept[key]) for key, value in source.state_dict().items())

        # what is published is built from the plan: the same structure, which takes these weights
        built = apply_plan(tiny(name, seed=7).double(), plan)
        built.load_state_dict(final.state_dict())
        assert difference(final, built.eval(), batches[-1:]) == 0


def test_a_trained_checkpoint_is_tapered():
    folder = CHECKPOINTS / "gpt2-shakespeare"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = (Path(__file__).parents[1] / "normswap/data/shakespeare.txt").read_text("utf-8")
    ids = torch.tensor(tokenizer(text)["input_ids"][:768]).view(-1, 32)
    batches = [{"input_ids": rows} for rows in ids.split(8)]
    source = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").double().eval()
    surgery = surgery_of(source, batches=batches, placement="post", norm="rmsnorm")
    model = operate(source, surgery)
    assert difference(source, model, batches[-1:]) < 1e-10  # 1.2e-15
    set_ramps(model, dict.fromkeys(ramped(model), 0.0))
    scaffold = copy.deepcopy(model)
    plan, final = finish(source, surgery, model)
    assert difference(scaffold, final, batches[-1:]) < 1e-10  # 1.1e-15
    assert plan.claim == "calibrated" and plan.calibrated_on == surgery.target.calibrated_on


def test_the_constants_of_skips_are_those_that_were_trained():
    source = tiny("gpt2").double()
    surgery = surgery_of(source, placement="post")
    model = operate(source, surgery)
    lanes = [module for module in ramped(model).values()]
    for lane, step in zip(lanes, surgery.target.moved, strict=True):
        assert lane.scale == pytest.approx(step.scale, rel=1e-12)  # it ends in what was calibrated
    for number, lane in enumerate(lanes):
        lane.log_scale.data.add_(0.1 * number)
    scales = [lane.scale for lane in lanes]
    set_ramps(model, dict.fromkeys(ramped(model), 0.0))
    plan, _ = finish(source, surgery, model)
    assert [block.scale for block in plan.moved] == pytest.approx(scales, rel=1e-12)


def test_the_gates_of_the_plan_are_open():
    source = tiny("llama").double()
    surgery = surgery_of(source, qk_norm="rmsnorm")
    assert {e.kind for e in surgery.target.edits if isinstance(e, AddNorm)} == {"gated-rmsnorm"}
    model = operate(source, surgery)
    set_ramps(model, dict.fromkeys(ramped(model), 0.0))
    plan, _ = finish(source, surgery, model)
    added = [e for e in plan.edits if isinstance(e, AddNorm)]
    assert len(added) == 4 and {e.kind for e in added} == {"rmsnorm"}
    assert not [e for e in plan.edits if getattr(e, "tensor", "").endswith(".gate")]


def test_a_taper_that_has_not_ended_is_not_taken_away():
    source = tiny("gpt2").double()
    surgery = surgery_of(source, norm="dyt")
    with pytest.raises(AssertionError, match="has not ended"):
        finish(source, surgery, operate(source, surgery))


def test_without_a_taper_it_is_a_conversion():
    source = tiny("gpt2").double()
    surgery = surgery_of(source, tapers=False, norm="dyt")
    model = operate(source, surgery)
    assert not ramped(model) and surgery.exact is None
    plan, final = finish(source, surgery, model)
    assert final is model and plan is surgery.target


def test_a_start_that_is_not_the_source_is_seen():
    source = tiny("gpt2").double()
    model = operate(source, surgery_of(source, norm="dyt"))
    model.transformer.h[0].ln_1.ramp.fill_(0.9)
    with pytest.raises(VerificationError, match="starts .* away from it .*Nothing was trained"):
        check_start(source, model, tokens()[-1:])


@pytest.mark.parametrize(
    "name, words, message",
    [
        ("gpt2", dict(norm="rmsnorm"), "nothing of it can be tapered, it is exact as it is. Leave `taper` out"),
        ("llama", dict(norm="layernorm"), "no exact form that a taper could start from. Leave `taper` out"),
        ("gpt2", dict(placement="reordered"), "--placement reordered: there is no exact form .* Leave `taper` out"),
        ("olmo2", dict(placement="post"), "no exact form .*expected pre-norm blocks and a final norm.* Leave `taper`"),
        ("gpt2", dict(placement="post", norm="rmsnorm", tied="untie"), "has a lm_head.weight of its own"),
    ],
)
def test_what_is_not_tapered(name, words, message):
    source = tiny(name).double()
    with pytest.raises(RefusedError, match=message) as refused:
        operate(source, surgery_of(source, **words))
    assert "--exact" not in str(refused.value)  # nobody asked for it


# ---- modules


def test_a_tapered_norm_is_between_its_two_forms():
    old, new = nn.LayerNorm(6).double(), nn.Linear(6, 6).double()
    tapered = Tapered(old, new)
    x = torch.randn(3, 6, dtype=torch.float64)
    for ramp in (1.0, 0.75, 0.0):
        set_ramps(tapered, {"": ramp})
        assert (tapered(x) - (ramp * old(x) + (1 - ramp) * new(x))).abs().max() < 1e-14
    assert tapered.normalized_shape == (6,)  # code of the model may ask
    assert set(ramped(nn.Sequential(tapered))) == {"0"}
    assert "ramp" in tapered.state_dict()


def test_a_tapered_lane_is_between_each_token_s_scale_and_one_for_all():
    lane = TaperedLane(2.5, torch.zeros((), dtype=torch.float64))
    normed, s = torch.randn(4, 6, dtype=torch.float64), torch.rand(4, 1, dtype=torch.float64) + 0.5
    for ramp in (1.0, 0.5, 0.0):
        set_ramps(lane, {"": ramp})
        by_hand = normed * s**ramp * 2.5 ** (1 - ramp)
        assert (lane(torch.cat([normed, s], -1)) - by_hand).abs().max() < 1e-14
    assert lane.scale == pytest.approx(2.5, rel=1e-15)


# ---- order


SITES = ["h.0.ln_1", "h.0.ln_2", "h.1.ln_1", "h.1.ln_2", "ln_f"]


@pytest.mark.parametrize(
    "order, expected",
    [
        ("together", [0, 0, 0, 0, 0]),
        ("forward", [0, 1, 2, 3, 4]),
        ("backward", [4, 3, 2, 1, 0]),
        (("ln_f", "*.ln_2", "*"), [2, 1, 2, 1, 0]),
        (("*",), [0, 0, 0, 0, 0]),
    ],
)
def test_the_order_of_a_taper(order, expected):
    assert turns(SITES, order) == expected


@pytest.mark.parametrize(
    "order, message",
    [
        (("*.ln_1", "*.ln_2"), r"no pattern fits ln_f \(1 of 5 sites\)"),
        (("*", "*.ln_3"), r"'\*.ln_3' fits no site of h.0.ln_1, h.0.ln_2"),
        (("*", "ln_f"), "'ln_f' fits no site that a pattern before it does not fit"),
        ((), r"no pattern fits h.0.ln_1, .* \(5 of 5 sites\)"),
    ],
)
def test_orders_that_are_refused(order, message):
    with pytest.raises(RecipeError, match=message):
        turns(SITES, order)


# ---- schedule


def schedule_of(*stages: dict, tokens_per_step: int = 100) -> Schedule:
    return Schedule.of([Stage(**stage) for stage in stages], tokens_per_step, 0.5)


def test_stages_follow_one_another():
    schedule = schedule_of(dict(tokens=101), dict(steps=3, name="second", learning_rate=0.25), dict(tokens=400))
    assert [(s.name, s.start, s.end) for s in schedule.spans] == [
        ("stage 0", 0, 2),  # as many whole steps as reach its tokens
        ("second", 2, 5),
        ("stage 2", 5, 9),
    ]
    assert schedule.steps == 9 and [s.learning_rate for s in schedule.spans] == [0.5, 0.25, 0.5]
    assert [schedule.at(step).name for step in (0, 1, 2, 4, 5, 8, 9, 20)] == [
        *("stage 0", "stage 0", "second", "second", "stage 2", "stage 2"),
        *("stage 2", "stage 2"),  # after the end, the last
    ]


RATES = {
    "constant": [0.1, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2],
    "linear": [0.1, *(0.2 * (1 - k / 8) for k in range(8))],
    "cosine": [0.1, *(0.1 * (1 + math.cos(math.pi * k / 8)) for k in range(8))],
}


@pytest.mark.parametrize("kind", RATES)
def test_learning_rates(kind):
    # 10 steps, of which the first 2 warm up: half of the rate, then all of it
    first = dict(steps=5, learning_rate=0.3, schedule="constant")
    schedule = schedule_of(first, dict(steps=10, learning_rate=0.2, warmup=0.2, schedule=kind))
    by_hand = [0.3] * 5 + [0.1, 0.2, *RATES[kind][1:]][:10]
    found = [schedule.at(step).rate(step) for step in range(15)]
    assert found == pytest.approx(by_hand[: len(found)], abs=1e-15)
    assert schedule.at(15).rate(15) == pytest.approx(0.2 if kind == "constant" else 0.0, abs=1e-15)


@pytest.mark.parametrize("shape", ["cosine", "linear"])
@pytest.mark.parametrize("groups", [[0, 0, 0], [0, 1, 2], [2, 1, 0]], ids=["together", "forward", "backward"])
def test_ramps(shape, groups):
    taper = dict(shape=shape, over=0.5)
    schedule = schedule_of(dict(steps=4), dict(steps=20, taper=taper), dict(steps=3))
    ramps = [schedule.ramps(step, groups) for step in range(schedule.steps + 1)]
    assert ramps[:4] == [[1.0, 1.0, 1.0]] * 4  # before
    assert all(r == [0.0, 0.0, 0.0] for r in ramps[4 + 10 - 1 :])  # from the last step of its part on, exactly
    assert any(0 < r < 1 for r in ramps[4])  # it begins with its stage
    for before, after in zip(ramps, ramps[1:], strict=False):
        assert all(a <= b for a, b in zip(after, before, strict=True))
    if len(set(groups)) > 1:  # one after another: at most one is on its way
        assert all(sum(0 < r < 1 for r in at) <= 1 for at in ramps)
        first, last = groups.index(0), groups.index(2)
        assert ramps[4 + 3][first] == 0.0 and ramps[4 + 3][last] == 1.0
    else:
        by_hand = {"linear": 1 - 3 / 10, "cosine": (1 + math.cos(math.pi * 3 / 10)) / 2}[shape]
        assert ramps[4 + 2] == pytest.approx([by_hand] * 3, abs=1e-15)


def test_without_a_taper_there_is_no_ramp():
    assert schedule_of(dict(steps=4)).ramps(2, [0, 1]) == [0.0, 0.0]
    short = schedule_of(dict(steps=1, taper=dict(over=0.1)))
    assert short.ramps(0, [0, 1, 2]) == [0.0, 0.0, 0.0]  # a stage of one step ends its taper


# ---- what a stage trains


def test_what_a_stage_trains():
    source = tiny("gpt2").double()
    norms = [path for path, _ in find_sites(source)]
    every = {name for name, _ in source.named_parameters()}
    in_norms = {name for name in every if ".ln_" in name}
    assert len(in_norms) == 10
    assert select(source, "all", None, norms) == every
    assert select(source, "norms", None, norms) == in_norms
    assert select(source, "*.mlp.*", None, norms) == {name for name in every if ".mlp." in name}
    both = select(source, ("norms", "transformer.wte.weight"), None, norms)
    assert both == in_norms | {"transformer.wte.weight"}

    surgery = surgery_of(source, placement="post")
    model = operate(source, surgery)
    lanes = {f"{path}.log_scale" for path, m in model.named_modules() if isinstance(m, TaperedLane)}
    assert len(lanes) == 4 and select(model, "skips", surgery.exact, norms) == lanes
    moved = select(model, "moved", surgery.exact, norms)
    assert {name for name in moved if name.startswith("transformer.h.")} and "transformer.wte.weight" not in moved

    surgery = surgery_of(source, norm="dyt", sites="*.ln_1")
    model = operate(source, surgery)
    found = select(model, "norms", surgery.target, norms)  # old and new ones
    assert {"transformer.h.0.ln_1.old.weight", "transformer.h.0.ln_1.new.weight", "transformer.ln_f.bias"} <= found
    assert not any(".mlp." in name or ".attn." in name for name in found)


@pytest.mark.parametrize(
    "train, message",
    [
        ("*.nothing.*", r"train '\*.nothing.\*' means no parameter of this model. Expected all, norms, skips, moved"),
        ("skips", "Skips have scales while a taper moves norms"),
        ("moved", "Blocks move where the surgery has a placement"),
        (("all", "*.nothing"), "means no parameter"),
    ],
)
def test_a_stage_that_would_train_nothing(train, message):
    source = tiny("gpt2")
    with pytest.raises(RecipeError, match=message):
        select(source, train, None, [path for path, _ in find_sites(source)])


# ---- RepBN


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_repbn_is_tapered_measured_again_and_folded(name):
    batches = tokens()
    with LiftFloat32():
        source = tiny(name).double()
        surgery = surgery_of(source, norm="repbn")
        model = operate(source, surgery)
        sites = ramped(model)
        assert len(sites) == 5 and not any(isinstance(m, Tapered) for m in model.modules())  # it has a ramp of its own
        assert difference(source, model, batches[-1:]) < 1e-10  # 5.7e-16

        set_ramps(model, dict.fromkeys(sites, 0.5))
        norm = model.get_submodule(next(iter(sites)))
        before = norm.bn_mean.clone()
        model.train()(**batches[0])[0].square().sum().backward()
        assert not torch.equal(norm.bn_mean, before)
        for parameter in (norm.weight, norm.bn_weight, norm.bn_bias, norm.eta):
            assert parameter.grad.abs().sum() > 0
        model.zero_grad()

        set_ramps(trained(model.eval()), dict.fromkeys(sites, 0.0))
        plan, model = finish(source, surgery, model)
        counts = reestimate(model, batches)
        assert set(counts) == set(sites) and set(counts.values()) == {4 * 4 * 16}
        measured = copy.deepcopy(model)
        plan = folded_plan(plan, model, batches[0])
        assert difference(measured, model, batches[-1:]) < 1e-10  # 1.4e-15
        assert not any(hasattr(module, "bn_var") or hasattr(module, "eta") for module in model.modules())
        kinds = {edit.kind for edit in plan.edits if isinstance(edit, SwapNorm)}
        assert kinds <= {"identity", "affine"} and "identity" in kinds

        built = tiny(name, seed=7).double()
        apply_structure(built, plan)
        built.load_state_dict(model.state_dict())
        assert difference(model, built.eval(), batches[-1:]) == 0


def test_a_model_that_had_repbn_is_published_without_it(tmp_path):
    tiny("gpt2", vocab_size=1024).save_pretrained(tmp_path / "model")
    for path in (CHECKPOINTS / "gpt2-shakespeare").glob("tokenizer*"):
        shutil.copy(path, tmp_path / "model")
    done = finetune(
        Recipe.of(
            {
                "model": str(tmp_path / "model"),
                "surgery": {"norm": "repbn"},
                "data": {"block": 32, "held_out_blocks": 4, "calibration_tokens": 256},
                "stages": [{"steps": 3, "learning_rate": 1e-4, "taper": {"order": "forward"}}],
                "training": {"per_device_train_batch_size": 2, "use_cpu": True},
                "output": str(tmp_path / "out"),
                "verify": "fast",
            }
        )
    )
    assert done.folded < 1e-5 and done.scores["start"]["mean"] == pytest.approx(done.scores["source"]["mean"], abs=1e-5)
    model = AutoModelForCausalLM.from_pretrained(done.folder, trust_remote_code=True)
    assert not [name for name in model.state_dict() if "bn_" in name or "eta" in name or "ramp" in name]
    assert not [name for name, _ in model.named_parameters() if ".h." in name and ".ln_" in name]  # nothing is left
    assert Recipe.of(done.folder / "recipe.yaml").stages == done.recipe.stages
    assert "RepBN" not in (done.folder / "modeling_normswap.py").read_text(encoding="utf-8")
