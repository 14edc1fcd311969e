"""A recipe's run that is killed, in whatever moment, ends as one that was not; one that diverged goes on."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from normswap.errors import RecipeError
from normswap.tune.folder import begin, held, path_of
from normswap.tune.recipe import Recipe
from tune_tasks import finetune, published, said

STEPS, SAVED = 6, 2


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, small):
    """Two stages and a taper, over norms in turn. A checkpoint every 2 steps, which are not those of log lines. The
    model has dropout."""
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(
        f"""
        model: {small["gpt2"]}
        surgery: {{norm: dyt}}
        data: {{block: 32, held_out_blocks: 4, calibration_tokens: 256}}
        stages:
          - {{steps: 1, learning_rate: 1e-3, train: norms}}
          - {{steps: {STEPS - 1}, learning_rate: 1e-3, warmup: 0.3, taper: {{order: forward, over: 0.7}}}}
        training: {{per_device_train_batch_size: 2, eval_steps: {SAVED}, logging_steps: 3}}
        output: nowhere
        verify: fast
        """
    )
    return path


def run(recipe, out, *args, code=0, **upset) -> str:
    """What `normswap finetune` said on stderr."""
    folder = out.parent / f"said-{out.name}"
    codes = finetune(folder, [str(recipe), f"output={out}", *args], without_comparison=None, **upset)
    assert codes == [code], said(folder)
    return said(folder)


def logged(record, name):
    """By step, what was logged, without what the clock says."""
    entries = {}
    for entry in record["history"][name]:
        if "train_loss" in entry:  # of the part since the last start
            continue
        kept = {key: value for key, value in entry.items() if "second" not in key and "runtime" not in key}
        entries.setdefault(entry["step"], {}).update({k: v for k, v in kept.items() if k != "minutes"})
    return entries


def check_same(out, whole, runs):
    """Weights, losses and scores are those of the uninterrupted run, to the last bit."""
    (weights, record), (others, other) = published(out), published(whole)
    assert weights.keys() == others.keys() and len(weights) > 30
    assert max(float((weights[name] - others[name]).abs().max()) for name in weights) == 0
    assert record["scores"] == other["scores"]
    for name in runs:
        found, wanted = logged(record, name), logged(other, name)
        assert found == wanted and [*found] == [0, 1, 2, 3, 4, 6]
        assert all("loss" in found[step] for step in (1, 2, 3, 4, 6))
        assert all("eval_mean" in found[step] for step in (0, 2, 4, 6))


def test_killed_again_and_again(recipe, tmp_path):
    """In the control's run, in the middle of the taper, while a checkpoint is written, and behind the last step; then a
    checkpoint loses its end, and another one has hardly begun."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(recipe, whole, "control=true", "kernels=cpu")
    assert not path_of(Recipe.of(recipe, (f"output={whole}",))).exists()

    folder = tmp_path / "out.training"
    words = run(recipe, out, "control=true", "kernels=cpu", code=-9, kill_in_control=3)
    assert "control, stage 1, step 2: held out" in words and "healing" not in words
    words = run(recipe, out, "control=true", "kernels=cpu", "--resume", code=-9, kill_in_step=3)
    assert "control: goes on behind step 2 of 6" in words and "healing, stage 1, step 2:" in words
    ramps = [v for k, v in load_file(folder / "checkpoint-2/model.safetensors").items() if k.endswith(".ramp")]
    assert len(ramps) == 5 and 0 < sum(float(ramp) for ramp in ramps) < 5  # some sites have turned, some have not
    words = run(recipe, out, "control=true", "kernels=cpu", "--resume", code=-9, kill_in_save=4)
    assert "control: goes on behind step 6 of 6" in words and "healing: goes on behind step 2 of 6" in words
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == ["checkpoint-2"]
    run(recipe, out, "control=true", "kernels=cpu", "--resume", code=-9, kill_in_publish=None)
    assert not out.exists()

    weights = folder / "checkpoint-6/model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    (folder / "checkpoint-8").mkdir()
    shutil.copy(folder / "checkpoint-4/model.safetensors", folder / "checkpoint-8")
    words = run(recipe, out, "control=true", "kernels=cpu", "--resume")
    assert "healing: goes on behind step 4 of 6" in words
    check_same(out, whole, ("healed", "control"))
    assert not folder.exists()


def test_a_diverged_run_goes_on_with_another_rate(recipe, tmp_path):
    out = tmp_path / "out"
    words = run(recipe, out, "stages.1.learning_rate=1", "stages.0.steps=2", code=2)
    assert words.count("the run diverged") == 1 and "Traceback" not in words
    assert "checkpoint-2. The same command with --resume and a lower stages.1.learning_rate goes on from it" in words
    assert not out.exists()

    words = run(recipe, out, "stages.1.learning_rate=1e-4", "stages.0.steps=2", "--resume")
    assert "goes on behind step 2 of 7" in words
    _, record = published(out)
    assert record["changes"] == [
        {"key": "stages.1.learning_rate", "was": 1.0, "now": 1e-4, "since": {"healed": 2}},
    ]
    rates = {step: values["learning_rate"] for step, values in logged(record, "healed").items() if "loss" in values}
    assert [*rates] == [1, 2, 3, 4, 6, 7] and all(rates[step] <= 1e-4 for step in (3, 4, 6, 7))
    assert rates[4] == pytest.approx(1e-4)  # behind the warm-up, at its highest
    assert record["scores"]["healed"]["mean"] < record["scores"]["source"]["mean"] + 1


def test_a_loss_that_is_no_number_stops_the_run(recipe, tmp_path):
    words = run(recipe, tmp_path / "out", code=2, poison_step=2)
    assert "in step 3 loss is nan in training" in words and "checkpoint-2" in words
    assert sorted(p.name for p in (tmp_path / "out.training").glob("checkpoint-*")) == ["checkpoint-2"]


def test_ctrl_c_says_how_to_go_on(recipe, tmp_path):
    words = run(recipe, tmp_path / "out", code=130, interrupt_in_step=1)
    assert "with --resume goes on from the last checkpoint" in words and "Traceback" not in words
    assert (tmp_path / "out.training").is_dir() and not (tmp_path / "out").exists()


def test_what_is_there_is_not_touched(recipe, tmp_path):
    """A run is begun once, and resumed by its own recipe; rates may change, and batches whose product stays."""

    def opened(*overrides, rows=2, resume=False, restart=False):
        return begin(Recipe.of(recipe, (f"output={tmp_path / 'out'}", *overrides)), {"rows": rows}, resume, restart)

    with pytest.raises(RecipeError, match="no run to resume. Leave --resume out"):
        opened(resume=True)
    folder = path_of(Recipe.of(recipe, (f"output={tmp_path / 'out'}",)))
    with held(folder):
        assert opened() == []
        (folder / "checkpoint-2").mkdir()
        (folder / "runs").mkdir()
        with pytest.raises(RecipeError, match="a run that did not end: --resume goes on with it, --restart"):
            opened()
        with pytest.raises(RecipeError, match="data.block is 32 and not 64. Resume it with its own, or give --restart"):
            opened("data.block=64", resume=True)
        with pytest.raises(RecipeError, match="stages.0.steps is 1 and not 5"):
            opened("stages.0.steps=5", resume=True)
        with pytest.raises(RecipeError, match="rows is 2 and not 4. A step has as many rows as"):
            opened(rows=4, resume=True)
        halved = "training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=2"
        keys = {change.key: (change.was, change.now) for change in opened(*halved, resume=True)}
        assert keys == {halved[0].split("=")[0]: (2, 1), halved[1].split("=")[0]: (None, 2)}
        kept = opened(*halved, "guards.loss=null", resume=True)
        assert [change.key for change in kept][2:] == ["guards.loss"] and len(kept) == 3
        with pytest.raises(RecipeError, match="another process is training there"), held(folder):
            pass
        assert opened(restart=True) == []
        assert sorted(path.name for path in folder.iterdir()) == ["lock", "run.json"]
        assert json.loads((folder / "run.json").read_text())["size"] == {"rows": 2}


def test_masks_are_drawn_by_the_place_in_the_training(checkpoints):
    """Neither what was drawn before, nor how many processes there are, changes the masks of a row; passes differ."""
    from transformers import AutoTokenizer

    from normswap.tune.data import corpus
    from normswap.tune.passes import Passes

    tokenizer = AutoTokenizer.from_pretrained(checkpoints / "gpt2-shakespeare")
    tokenizer.add_special_tokens({"mask_token": "<m>", "pad_token": "<p>"})
    raw = {"model": "m", "data": {"block": 32}, "objective": "mlm", "output": "o", "training": {"learning_rate": 1}}
    data = corpus(Recipe.of(raw | {"stages": [{"steps": 1}]}), tokenizer, {"attention_mask"}, None)
    n = len(data.train)
    rows = Passes(data.train, 2 * n + 4, 7)
    first = data.collate([rows[4], rows[5]])
    data.collate([rows[0], rows[1]])
    again = data.collate([Passes(data.train, 2 * n + 4, 7)[i] for i in (4, 5)])
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert (first["labels"] >= 0).any() and (first["labels"] < 0).any()
    order = [rows[i]["input_ids"] for i in range(2 * n)]
    assert sorted(order[:n]) == sorted(order[n:]) == sorted(data.train["input_ids"]) and order[:n] != order[n:]
