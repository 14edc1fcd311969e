"""What recipes hand on to the Trainer, and adapters: the same training where it is to be the same."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel

import normswap
import normswap.tune.publish
import normswap.tune.run as runs
import normswap.tune.train as trainings
from normswap.errors import RecipeError
from normswap.norms.kinds.repbn import RepBNLayerNorm
from normswap.tune.recipe import Recipe
from normswap.tune.trainer import blocks
from normswap.tune.training_arguments import arguments, check_rhythm


@pytest.fixture(scope="module")
def finetuned(small, tmp_path_factory):
    """Carries out a recipe, without comparing the result with the source; gives its losses, weights and folder."""
    tmp_path = tmp_path_factory.mktemp("runs")

    class Nothing:
        def model_dump(self, **kwargs):
            return None

    def carry_out(name, *overrides, **more):
        raw = {
            "model": {
                "path": str(small["gpt2"]),
                "config": {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
            },
            "data": {"block": 32, "held_out_blocks": 4, "calibration_tokens": 256},
            "stages": [{"steps": 3, "learning_rate": 1e-3}],
            "training": {"per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no"},
            "output": str(tmp_path / name),
            "verify": "fast",
        }
        done = runs.finetune(Recipe.of(raw | more, overrides))
        losses = [entry["loss"] for entry in done.history["healed"] if "loss" in entry]
        assert len(losses) == 3
        return losses, load_file(done.folder / "model.safetensors"), done.folder

    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("_compared", Nothing()), ("draw", None), ("write_trained_card", None)):
            patch.setattr(normswap.tune.publish, name, lambda *args, value=value: value)
        yield carry_out


@pytest.fixture(scope="module")
def plain(finetuned):
    return finetuned("plain")


def test_what_was_trained_and_not_converted_is_a_checkpoint_as_any(plain):
    _, _, folder = plain
    assert not (folder / "normswap.json").exists()
    assert json.loads((folder / "training.json").read_text())["training"]["tokens"] == 3 * 4 * 32
    assert normswap.plan(folder, norm="rmsnorm").claim == "exact"


def test_without_a_surgery_no_block_is_moved(finetuned):
    with pytest.raises(RecipeError, match="train 'moved' means no parameter"):
        finetuned("moved", "stages.0.train=moved")


def test_accumulated_and_checkpointed(finetuned, plain):
    """Half the rows at a time, and activations computed twice, are the same training. Measured: 2e-7 and 0."""
    losses, weights, _ = plain
    halved = "training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=2"
    for name, overrides, limit in (
        ("accumulated", halved, 1e-5),
        ("checkpointed", ("training.activation_checkpointing=true",), 1e-6),
    ):
        others, found, _ = finetuned(name, *overrides)
        assert others == pytest.approx(losses, rel=limit)
        assert found.keys() == weights.keys()


def test_autocast(finetuned, plain):
    """bfloat16 where autocast has it, on weights that stay float32."""
    losses = plain[0]
    others, weights, _ = finetuned("bf16", "training.bf16=true")
    assert others == pytest.approx(losses, rel=1e-2) and others != losses  # measured: 1e-3
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_kernels_train_as_norms_do(finetuned, checkpoints):
    """Of a plain model, with sums made by norms; and of both norms that a taper has, with an autocast."""
    notes = []
    # a trained model: of a random one's weights more have a gradient of rounding alone, and Adam steps as far for that
    trained = f"model.path={checkpoints / 'gpt2-shakespeare'}"
    small = (trained, "data.block=8", "training.per_device_train_batch_size=2", "data.held_out_blocks=1")
    taper = {
        "surgery": {"norm": "dyt"},
        "training": {"bf16": True, "learning_rate": 1e-3, "save_strategy": "no", "logging_steps": 1},
        "stages": [{"steps": 3, "taper": {}}],
    }
    with pytest.MonkeyPatch.context() as patch:
        train = runs.train
        patch.setattr(runs, "train", lambda *a: train(*a[:-1], lambda e: notes.append(e.get("note")) or a[-1](e)))
        fused = {"backend": "triton", "fuse_residual": True}
        for words, kernels, said, limit in (
            ({}, fused, "13 norms by triton; 6 of 12 sums by norms", 1e-5),  # measured 2e-7, of weights 2e-6
            (taper, "cpu", "13 norms by cpu", 1e-3),  # bfloat16 between norms: measured 2e-4, of weights 3e-5
        ):
            name = "tapered" if words else "plain"
            losses, weights, _ = finetuned(f"{name}-modules", *small, **words)
            found, found_weights, folder = finetuned(f"{name}-kernels", *small, kernels=kernels, **words)
            assert [note for note in notes if note][-1] == f"kernels: {said}"
            assert found == pytest.approx(losses, rel=limit)
            apart = sum(float((found_weights[n] - w).square().sum()) for n, w in weights.items()) ** 0.5
            assert apart < limit * sum(float(w.square().sum()) for w in weights.values()) ** 0.5
            assert not folder.with_name(f"{name}-kernels.training").exists()


def test_logs_stay(finetuned):
    """What TensorBoard wrote is there when the run has ended, and does not pass for a run that has not."""
    for time, control in enumerate(("false", "true")):
        folder = finetuned("out", "training.report_to=tensorboard", f"control={control}")[2]
        run = folder.with_name("out.training")
        left = {str(path.relative_to(run)) for path in run.rglob("*")}
        events = [path for path in left if "tfevents" in path]
        assert any(path.startswith("runs") for path in events)
        assert any(path.startswith("control/runs") for path in events) == (control == "true")
        assert not any("checkpoint" in path or path.endswith("run.json") for path in left)
        folder.rename(folder.with_name(f"out-{time}"))


def test_adapters_are_merged(finetuned, small, monkeypatch):
    """Linear maps change by what the adapters are, of their rank; norms train; all else is as it was. What is not
    trained is the teacher's own tensor while it lasts, and the teacher does not change."""
    shared = []
    sharing, measure = trainings.share, runs._measure
    originals = []

    def share(own, teacher):
        originals.append({name: p.detach().clone() for name, p in teacher.named_parameters()})
        found = sharing(own, teacher)
        theirs = {p.data_ptr() for p in teacher.parameters()}
        assert all(p.data_ptr() in theirs and not p.requires_grad for p in found)
        shared.extend(found)
        return found

    def measured(setup, model):
        if originals:
            assert all(torch.equal(p, originals[0][name]) for name, p in setup.original.named_parameters())
        return measure(setup, model)

    monkeypatch.setattr(trainings, "share", share)
    monkeypatch.setattr(runs, "_measure", measured)
    source = load_file(small["gpt2"] / "model.safetensors")
    recipe = {"lora": {"r": 3, "alpha": 6}, "objective": ["lm", {"kind": "distill", "weight": 0.1}]}
    _, weights, folder = finetuned("lora", **recipe)
    assert len(shared) == 18 and originals
    assert weights.keys() == source.keys()
    changed = {name for name in source if not torch.equal(weights[name], source[name])}
    maps = {name for name in changed if source[name].ndim == 2}
    norms = {name for name in source if ".ln_" in name}
    assert changed == maps | norms and len(maps) == 8
    for name in maps:
        values = torch.linalg.svdvals((weights[name] - source[name]).double())
        assert values[3] < 1e-5 * values[0]  # rank 3, but for the rounding of the sum
    record = json.loads((folder / "training.json").read_text())["training"]
    assert record["folded"] < 1e-5  # measured: 3e-7, between the model with adapters and the merged one


@pytest.mark.parametrize("reentrant", [True, False])
def test_statistics_are_taken_once(reentrant):
    """A RepBN whose activations are computed twice has moved its running statistics by one step."""
    torch.manual_seed(0)
    norm = RepBNLayerNorm(8, gain="w", bias=True).double().train()
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    checkpoint(norm, x, use_reentrant=reentrant).square().sum().backward()
    assert torch.allclose(norm.bn_mean, 0.1 * x.detach().mean((0, 1)), atol=1e-15)
    assert norm.bn_weight.grad.abs().min() > 0


@pytest.mark.parametrize(
    "training, words",
    [
        ({"save_steps": 3, "eval_steps": 2}, "save_steps is 3, and evaluation is every 2 steps.*expected a multiple"),
        ({"eval_strategy": "no"}, "evaluation is never; a checkpoint is kept when it was found good"),
        ({"save_strategy": "epoch"}, "save_strategy is epoch; expected steps or no"),
    ],
)
def test_checkpoints_are_evaluated(training, words, tmp_path):
    with pytest.raises(RecipeError, match=words):
        check_rhythm(arguments(training, tmp_path, 20, 1e-3))
    check_rhythm(arguments({"save_steps": 0.3, "eval_steps": 0.1}, tmp_path, 20, 1e-3))


def test_blocks_are_found_behind_a_surgery():
    """FSDP shards by the names of classes, of which a move makes others."""
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=16))
    assert blocks(model) == ["GPT2Block"]
    for block in model.transformer.h:
        block.__class__ = type("Moved", (type(block),), {})
    assert blocks(model) == ["Moved"]


def test_a_control_has_kernels_too_and_a_backend_that_is_not_there_is_said_at_once(checkpoints, tmp_path):
    words = (
        f"model={checkpoints / 'gpt2-shakespeare'}",
        "data.block=16",
        "data.held_out_blocks=2",
        "verify=fast",
        "stages.0.tokens=64",
        "training.per_device_train_batch_size=2",
        "guards={loss: null, tail: null}",
    )
    notes = []
    recipe = Recipe.of("kernels-only", (*words, "control=true", "kernels=torch", f"output={tmp_path / 'out'}"))
    done = normswap.finetune(recipe, say=lambda entry: notes.append(entry.get("note")))
    assert [note for note in notes if note] == ["kernels: 13 norms by torch"] * 2
    assert {"control", "healed"} <= done.scores.keys()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(normswap.KernelError, match="quack-kernels is not installed"):
        normswap.finetune(Recipe.of("kernels-only", (*words, "kernels=quack", f"output={tmp_path / 'other'}")))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
