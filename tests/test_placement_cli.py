"""Moved norms as a user meets them: plans, conversions, cards, the second trace, and what is refused."""

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import normswap
from models import tiny
from normswap.calibration.data import TOKENS
from normswap.cli import main, options
from normswap.errors import VerificationError
from normswap.planning.edits import Rewrite
from normswap.planning.plans import Plan
from normswap.understand.normmap import find_sites

GPT2 = "gpt2-shakespeare"
#: two layers of six, on few tokens: enough to see every stage
REQUEST = ("--placement", "post", "--layers", "0-1")
WEIGHTS, CODE = "model.safetensors", "modeling_normswap.py"


def run(*args: object) -> Result:
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture(scope="module")
def planned(tmp_path_factory, checkpoints) -> tuple[Path, str]:
    """A calibrated plan, saved, and what was printed of it."""
    path = tmp_path_factory.mktemp("planned") / "plan.json"
    shown = run("plan", checkpoints / GPT2, *REQUEST, "--calibrate", "--tokens", 512, "-o", path)
    assert shown.exit_code == 0, shown.stderr
    assert shown.stderr == f"saved {path} and {path.with_suffix('.safetensors')}\n"
    return path, shown.stdout


@pytest.fixture(scope="module")
def converted(tmp_path_factory, checkpoints) -> tuple[normswap.Conversion, dict[str, tuple[int, int]]]:
    """The same move in one go, and what was told of its progress: stage -> (done, of)."""
    told: dict[str, tuple[int, int]] = {}
    done = normswap.convert(
        checkpoints / GPT2,
        tmp_path_factory.mktemp("converted") / "out",
        placement="post",
        layers="0-1",
        tokens=512,
        verify="fast",
        progress=lambda what, done, total: told.update({what: (done, total)}),
    )
    return done, told


def test_a_plan_without_calibration_says_so(checkpoints):
    shown = run("plan", checkpoints / GPT2, "--placement", "post")
    assert shown.exit_code == 0, shown.stderr
    assert "claim: untrained. Nothing is fitted to data: every constant of the move is 1" in words(shown.stdout)
    # nothing is measured, so layers are one row
    assert re.search(r"transformer\.h\[0-11\] +0-5 +pre -> post +12", shown.stdout)
    for row in (
        r"add_norm +transformer\.h\.0\.norm_first +layernorm, gain w, bias",
        r"fill +transformer\.h\.0\.norm_first\.weight +1 ",
        r"swap_norm +transformer\.ln_f +affine, gain w, bias",
        r"rewrite +transformer\.h\.1-5 +forward: self\.ln_1\(x\) -> x, x -> self\.ln_1\(x\), .* +5",
    ):
        assert re.search(row, shown.stdout), row
    assert "hidden_states -> self.norm_first(hidden_states) on entry" in shown.stdout
    assert run("plan", "--help").stdout.count(f"default: {TOKENS}") == 1 and options.TOKENS == TOKENS


def test_a_calibrated_plan_shows_where_it_hurts(planned):
    path, shown = planned
    plan = Plan.load(path)
    assert plan.claim == "calibrated" and "claim: calibrated. Constants and weights are fitted" in shown
    assert "Calibrated on 512 tokens of shipped Shakespeare." in shown and "the constant in the place of" in shown
    assert len(plan.moved) == 4
    for block in plan.moved:
        assert None not in (block.spread, block.error, block.unfitted, block.kl) and block.error < block.unfitted
        numbers = f"{block.scale:.4g} +{block.spread:.1%} +{block.unfitted:.1%} +{block.error:.1%}"
        assert re.search(rf"{re.escape(block.name)} .*pre -> post +{numbers}", shown), block
    # what a layer costs alone is said once, with the longest bar where it hurts most
    bars = re.findall(r"([\d.]+e-\d+) +(\u2588+)", shown)
    assert [cost for cost, _ in bars] == [f"{plan.moved[i].kl:.1e}" for i in (0, 2)]
    assert len(max(bars, key=lambda bar: float(bar[0]))[1]) == 12
    # numbers that differ by layer do not take a row each
    assert re.search(r"scale +transformer\.h\.0-1\.attn\.c_attn\.weight +times [\d.]+ to [\d.]+ +2 ", shown)
    assert re.search(r"refit +transformer\.h\.0-1\.mlp\.c_proj\.weight +values fitted in calibration.* +2 ", shown)


def test_a_saved_plan_gives_the_same_files_without_data(checkpoints, tmp_path, planned, converted):
    done = run("convert", checkpoints / GPT2, tmp_path / "out", "--plan", planned[0], "--verify", "none")
    assert done.exit_code == 0, done.stderr
    direct = converted[0].folder
    for name in (WEIGHTS, CODE, "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (direct / name).read_bytes(), name
    plans = [json.loads((f / "normswap.json").read_text())["plan"] for f in (tmp_path / "out", direct)]
    assert plans[0] == plans[1] and plans[0]["calibrated_on"] == "512 tokens of shipped Shakespeare"
    planned[0].with_suffix(".safetensors").rename(tmp_path / "elsewhere")
    refused = run("convert", checkpoints / GPT2, tmp_path / "again", "--plan", planned[0])
    (tmp_path / "elsewhere").rename(planned[0].with_suffix(".safetensors"))
    assert refused.exit_code == 2 and "cannot read" in refused.stderr and "Traceback" not in refused.stderr


def test_every_stage_tells_its_progress(converted):
    told = converted[1]
    stages = ["measuring scales", "moving layers alone", "refitting blocks", "writing", "proving"]
    assert list(told) == stages and all(done == total > 0 for done, total in told.values())


def test_moved_norms_are_no_sites_to_compare(checkpoints, converted):
    found = converted[0].report.mathematics.comparison
    moved = {f"transformer.h.{i}.ln_{j}" for i in (0, 1) for j in (1, 2)} | {"transformer.h.0.norm_first"}
    assert moved <= set(found.moved) and not found.unmatched
    compared = [site.site for site in found.sites]
    # with layers 0 and 1 normalised, the stream goes on so: the norms behind them are where they were
    assert compared and not moved & set(compared) and "transformer.ln_f" in compared
    assert found.first_divergence not in moved
    assert 0 < found.output.kl.mean < 0.1
    again = normswap.verify(checkpoints / GPT2, converted[0].folder, tokens=256).comparison
    assert again.moved == found.moved and not again.unmatched


def test_the_card_tells_what_moved_and_what_it_cost(converted):
    done = converted[0]
    card = (done.folder / "README.md").read_text()
    assert f"# {GPT2} with post norms" in card and "Claim: **calibrated**. Constants and weights are fitted" in card
    for block in done.plan.moved:
        assert f"| {block.name} | {block.layer} | pre -> post | {block.scale:.4g} |" in card
    assert "Calibrated on 512 tokens of shipped Shakespeare." in card and "heals in a fine-tune" in card
    output = done.report.mathematics.comparison.output
    numbers = " | ".join(
        f"{n:.1e}" for n in (output.kl.mean, output.kl.median, output.kl.p99, output.kl.p999, output.kl.max)
    )
    assert f"| KL, nats (mathematics, float64) | {numbers} |" in card
    assert f"the same token is most probable at {output.top1:.2%} of the positions" in card
    assert "--placement post --layers 0-1 --tokens 512" in card


def test_a_budget_moves_the_layers_that_cost_least(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr("normswap.calibration.data.COST_TOKENS", 256)  # for the sake of time
    path = tmp_path / "plan.json"
    asked = ("--placement", "post", "--layers", "auto:0.003", "--calibrate", "--tokens", 512, "-o", path)
    shown = run("plan", checkpoints / GPT2, *asked)
    assert shown.exit_code == 0, shown.stderr
    plan = Plan.load(path)
    moved = {block.layer for block in plan.moved}
    # measured: layers 2 to 5; each alone costs 0.009, 0.008, 0.005, 0.003, 0.001 and 0.0003
    assert 0 < len(moved) < 6 and moved == set(range(6 - len(moved), 6))
    assert f"--layers {','.join(map(str, sorted(moved)))} at" in shown.stdout


# ---- the second trace


def test_a_move_that_the_second_trace_does_not_show_is_not_published():
    model = tiny("gpt2")
    plan = normswap.plan(model, placement="post")
    at = next(i for i, edit in enumerate(plan.edits) if isinstance(edit, Rewrite) and edit.module.endswith("h.1"))
    lost = plan.edits[at].model_copy(update={"changes": plan.edits[at].changes[:-1]})
    broken = plan.model_copy(update={"edits": (*plan.edits[:at], lost, *plan.edits[at + 1 :])})
    with pytest.raises(VerificationError, match=r"h\[\d\] should be post now, and no norm is found behind its sum"):
        normswap.convert_model(model, plan=broken)
    assert normswap.convert_model(model, plan=plan) is plan


def test_a_norm_that_nothing_calls_is_not_published():
    model = tiny("gpt2")
    plan = normswap.plan(model, placement="sandwich", exact=True)
    at = next(i for i, edit in enumerate(plan.edits) if isinstance(edit, Rewrite))
    lost = plan.edits[at].model_copy(update={"changes": plan.edits[at].changes[:-1]})
    broken = plan.model_copy(update={"edits": (*plan.edits[:at], lost, *plan.edits[at + 1 :])})
    with pytest.raises(VerificationError, match=r"norm_branch_2 is added by the move, and nothing calls it"):
        normswap.convert_model(model, plan=broken)
    assert normswap.convert_model(model, plan=plan).claim == "exact"


def test_an_exact_move_is_measured_as_one(checkpoints, tmp_path):
    done = run("convert", checkpoints / GPT2, tmp_path / "out", "--placement", "post", "--exact", "--verify", "fast")
    assert done.exit_code == 0, done.stderr
    assert "claim: exact. The result computes the same function" in done.stdout
    assert re.search(r"transformer\.h\[0-11\] +0-5 +pre -> post +12", done.stdout)
    assert "No difference beyond rounding in the output" in done.stdout
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- transformer.h[0-11], layer 0-5: pre -> post" in card and "fine-tune" not in card


def test_kind_and_place_change_together():
    model = tiny("gpt2")
    plan = normswap.convert_model(model, norm="rmsnorm", placement="post")
    assert plan.claim == "untrained"
    kinds = [spec.kind for _, spec in find_sites(model)]
    # two blocks in each of two layers, and the norm at the entry
    assert kinds == ["rmsnorm"] * 5


# ---- refusals

BAD_REQUESTS = {
    "unknown placement": (("--placement", "nowhere"), "placement 'nowhere' is not offered: expected one of pre, post"),
    "no such layer": (("--placement", "post", "--layers", "9"), "this model has no layer 9; expected numbers from 0"),
    "no numbers": (("--placement", "post", "--layers", "two"), "expects numbers and ranges such as 0-3,7"),
    "layers alone": (("--layers", "0-3"), "layers 0-3 belong to no placement"),
    "no budget": (("--placement", "post", "--layers", "auto:x"), "expected auto:KL, with a number of nats"),
    "not exact": (("--placement", "deepnorm", "--exact"), "Leave out --exact to have it calibrated"),
    "no such text": (("--placement", "post", "--text", "nosuch.txt", "--verify", "none"), "nosuch.txt cannot be read"),
    "tokens for nothing": (("--norm", "rmsnorm", "--tokens", "99"), "there is nothing to calibrate"),
    "tokens with a plan": (("--plan", "nosuch.json", "--tokens", "99"), "a saved plan already says what to do"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_requests_that_cannot_be_met_are_refused(checkpoints, tmp_path, name):
    asked, message = BAD_REQUESTS[name]
    refused = run("convert", checkpoints / GPT2, tmp_path / "out", *asked)
    assert refused.exit_code == 2 and refused.stdout == "" and "Traceback" not in refused.stderr
    assert message in refused.stderr
    assert not list(tmp_path.iterdir())


def test_plans_refuse_what_needs_calibration(checkpoints, tmp_path):
    for asked, message in (
        (("--placement", "post", "--layers", "auto:0.01"), "so it takes a calibration"),
        (("--placement", "post", "--text", "x.txt"), "add --calibrate"),
        (("--norm", "rmsnorm", "--calibrate"), "there is nothing to calibrate"),
    ):
        refused = run("plan", checkpoints / GPT2, *asked)
        assert refused.exit_code == 2 and refused.stdout == "" and message in refused.stderr, refused.stderr
