"""Two processes (gloo) train as one with twice the accumulation, DDP and FSDP; what ends one of them ends both, once.

More of what recipes can ask for is compared by `scripts/check_distributed.py`.
"""

import pytest

from tune_tasks import finetune, load_file, published, said


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, small):
    """Norms alone, then a taper of all, with a teacher."""
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(
        f"""
        model:
          path: {small["gpt2"]}
          config: {{attn_pdrop: 0.0, resid_pdrop: 0.0, embd_pdrop: 0.0}}
        surgery: {{norm: dyt}}
        data: {{block: 32, held_out_blocks: 5, calibration_tokens: 256}}
        objective: [lm, {{kind: distill, weight: 0.5}}]
        stages:
          - {{steps: 2, learning_rate: 1e-3, train: norms}}
          - {{steps: 3, learning_rate: 1e-3, warmup: 0.3, taper: {{order: forward, over: 0.7}}}}
        training: {{per_device_train_batch_size: 2, eval_steps: 2, logging_steps: 1}}
        output: nowhere
        verify: fast
        """
    )
    return path


@pytest.fixture(scope="module")
def one(recipe, tmp_path_factory):
    """What one process makes of it, and the rows that it trained on."""
    folder = tmp_path_factory.mktemp("one")
    args = [str(recipe), f"output={folder / 'out'}", "training.gradient_accumulation_steps=2"]
    assert finetune(folder, args, without_comparison=None, note_rows=str(folder)) == [0], said(folder)
    return folder / "out", (folder / "rows-0").read_text().splitlines()


def check_as_one(out, one, said_by_two):
    """Losses, norms of gradients and scores to rounding; the log is told once."""
    (weights, record), (others, other) = published(out), published(one)
    assert weights.keys() == others.keys() and len(weights) > 30
    checked = 0
    for entry, wanted in zip(record["history"]["healed"], other["history"]["healed"], strict=True):
        for key in ("loss", "grad_norm", "learning_rate", "ramp", "eval_mean", "eval_p99.9"):
            if key in wanted:
                assert entry[key] == pytest.approx(wanted[key], rel=5e-5), (key, wanted["step"])
                checked += 1
    assert checked >= 5 * 4 + 4 * 2
    # Adam's first steps are as large for a gradient of rounding as for any other
    assert max(float((weights[name] - others[name]).abs().max()) for name in weights) < 5e-4
    assert record["scores"]["healed"]["mean"] == pytest.approx(other["scores"]["healed"]["mean"], abs=1e-5)
    assert said_by_two[0].count("step 5: loss") == said_by_two[0].count("published") == 1
    assert "step" not in said_by_two[1] and "published" not in said_by_two[1]


def test_data_parallel(recipe, one, tmp_path):
    """Measured: equal to the last bit."""
    args = [str(recipe), f"output={tmp_path / 'out'}"]
    assert finetune(tmp_path, args, 2, without_comparison=None, note_rows=str(tmp_path)) == [0, 0], said(tmp_path)
    check_as_one(tmp_path / "out", one[0], [said(tmp_path, rank) for rank in (0, 1)])
    assert (said(tmp_path, 0, "out") != "") and said(tmp_path, 1, "out") == ""
    # each trained on its half
    rows = [(tmp_path / f"rows-{rank}").read_text().splitlines() for rank in (0, 1)]
    assert len(rows[0]) == len(rows[1]) == 10 and not set(rows[0]) & set(rows[1])
    assert sorted(rows[0] + rows[1]) == sorted(one[1])


def test_sharded_and_killed(recipe, one, tmp_path):
    """FSDP2, killed before the second stage has begun for some parameters. Measured: 6e-6, weights 5e-5."""
    args = [str(recipe), f"output={tmp_path / 'out'}", "training.fsdp=true"]
    assert finetune(tmp_path, args, 2, without_comparison=None, kill_in_step=3) == [-9, -9], said(tmp_path)
    kept = [path.name for path in (tmp_path / "out.training/checkpoint-2").iterdir()]
    assert "pytorch_model_fsdp.bin" in kept and "rng_state_1.pth" in kept  # it was sharded
    assert finetune(tmp_path, [*args, "--resume"], 2, without_comparison=None) == [0, 0], said(tmp_path)
    words = [said(tmp_path, rank) for rank in (0, 1)]
    assert words[0].count("healing: goes on behind step 2 of 5") == 1
    check_as_one(tmp_path / "out", one[0], words)
    assert not (tmp_path / "out.training").exists()
    assert not any(name.endswith("ramp") for name in load_file(tmp_path / "out/model.safetensors"))


@pytest.mark.parametrize(
    "args, upset, words",
    [
        (["data.block=x"], {"slow_main": 2.0}, "data.block: "),
        ([], {"fail_in_surgery": None}, "Refused: this surgery is refused"),
        (["stages.0.learning_rate=30", "guards.loss=0.5"], {}, "the run diverged: in step 2"),
    ],
)
def test_an_error_ends_both_and_is_said_once(recipe, tmp_path, args, upset, words):
    codes = finetune(tmp_path, [str(recipe), f"output={tmp_path / 'out'}", *args], 2, within=300, **upset)
    assert codes == [2, 2]
    assert said(tmp_path, 0).count(words) == 1 and "Traceback" not in said(tmp_path, 0) + said(tmp_path, 1)
    assert "Error" not in said(tmp_path, 1) and "Refused" not in said(tmp_path, 1)
    # nothing was saved that one could go on from
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.training").exists()
