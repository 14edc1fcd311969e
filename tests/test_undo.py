"""Conversions taken back: the source's own class, computing what the converted folder computes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import fresh
import normswap
from models import tiny
from normswap.cli import main
from normswap.errors import RefusedError, SourceError, VerificationError

GPT2, LLAMA, NEOX = "gpt2-shakespeare", "llama-shakespeare", "gpt_neox-shakespeare"
# Of the others no hashes of the source are taken, as they are not verified.
HASHED = "behind a gate"
# conversion -> the worst difference of a weight from the source's, relative to the largest of its tensor
EXACT = {
    "centred": (GPT2, dict(norm="rmsnorm"), 1e-6),  # 3.4e-8
    "centred, folded, untied": (GPT2, dict(norm="rmsnorm", fold=True, tied="untie"), 1e-6),  # 1.1e-7
    "biases grown": (NEOX, dict(norm="rmsnorm", fold=True), 1e-6),  # 1.6e-7
    "folded": (LLAMA, dict(fold=True), 1e-6),  # 9.9e-8
    "rotated": (LLAMA, dict(rotate="hadamard"), 1e-6),
    "behind a carried scale": (LLAMA, dict(placement="post", exact=True), 0.0),
    "behind a gate": (GPT2, dict(placement="sandwich", exact=True), 0.0),
}


@pytest.fixture(scope="module")
def converted(checkpoints: Path, tmp_path_factory):
    """Folders by conversion, made when asked for."""
    root, made = tmp_path_factory.mktemp("converted"), {}

    def get(name: str) -> Path:
        if name not in made:
            source, words, _ = EXACT[name]
            verify = "fast" if name == HASHED else "none"
            made[name] = normswap.convert(checkpoints / source, root / str(len(made)), verify=verify, **words).folder
        return made[name]

    return get


@pytest.mark.parametrize("name", EXACT)
def test_what_was_converted_comes_back(checkpoints, converted, tmp_path, name):
    source, _, tolerance = EXACT[name]
    # on all of the text one of them; on a part of it, the same is measured
    done = normswap.undo(converted(name), tmp_path / "back", verify="full" if name == "centred" else "fast")
    # float64 on weights that were rounded to float32: 2e-15 to 2.4e-8
    assert done.report.mathematics.comparison.output.error.max < 1e-6
    assert done.report.tensors_checked > 50
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoints / source, done.folder))
    assert before.keys() == after.keys()
    worst = max(float((before[k] - after[k]).abs().max() / before[k].abs().max().clamp_min(1e-30)) for k in before)
    assert worst <= tolerance
    assert done.same_files == (name == HASHED) and (worst == 0 or name != HASHED)
    names = {path.name for path in done.folder.iterdir()}
    assert not names & {"normswap.json", "normswap.undo", "modeling_normswap.py", "README.md"}
    assert json.loads((done.folder / "config.json").read_text()) == json.loads(
        (checkpoints / source / "config.json").read_text()
    )


def test_a_page_shows_what_was_undone(converted, tmp_path):
    folder, page = converted("folded"), tmp_path / "page.html"
    command = ["convert", folder, tmp_path / "back", "--undo", "--verify", "fast", "--report", page]
    result = CliRunner().invoke(main, [str(word) for word in command])
    assert result.exit_code == 0, result.output
    text = page.read_text(encoding="utf-8")
    assert "The same function" in text and "undone" in text
    assert f"normswap convert {folder.name} back --undo" in text
    inside = CliRunner().invoke(main, ["convert", str(folder), str(tmp_path / "b"), "--undo", "--report", str(folder)])
    assert inside.exit_code == 2 and not (tmp_path / "b").exists()


def test_a_process_without_normswap_loads_what_came_back(checkpoints, converted, tmp_path):
    normswap.undo(converted("centred, folded, untied"), tmp_path / "back", verify="none")
    script = (
        "import sys; sys.modules['normswap'] = None\n"
        "import torch; from transformers import AutoModelForCausalLM\n"
        "a, b = (AutoModelForCausalLM.from_pretrained(p).double().eval() for p in sys.argv[1:])\n"
        "ids = torch.arange(64)[None] * 7 % 1000\n"
        "a, b = a(ids).logits, b(ids).logits\n"
        "print(type(b).__name__, float((a - b).norm() / a.norm()))"
    )
    assert float(fresh.run(script, checkpoints / GPT2, tmp_path / "back").split()[1]) < 1e-6  # 1.5e-7 is measured


def test_half_precision_comes_back_to_its_own_rounding(checkpoints, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoints / GPT2, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    out = normswap.convert(tmp_path / "source", tmp_path / "out", norm="rmsnorm", verify="none").folder
    back = normswap.undo(out, tmp_path / "back", verify="fast").folder
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "source", back))
    errors = {k: float((before[k].float() - after[k].float()).norm() / before[k].float().norm()) for k in before}
    assert 0 < max(errors.values()) < 2**-8  # 2.0e-3
    assert all(after[k].dtype == torch.bfloat16 for k in after)


def test_experts_that_are_stored_apart_come_back(tmp_path):
    torch.manual_seed(0)
    model = tiny("mixtral").double()
    for name, p in model.named_parameters():
        if name.endswith("norm.weight"):
            p.data.uniform_(0.5, 1.5)
    model.save_pretrained(tmp_path / "source", max_shard_size="50KB")
    out = normswap.convert(tmp_path / "source", tmp_path / "out", fold=True, verify="none").folder
    back = normswap.undo(out, tmp_path / "back", verify="fast").folder
    shards = sorted(path.name for path in back.glob("*.safetensors"))
    assert len(shards) > 1
    for shard in shards:
        before, after = load_file(tmp_path / "source" / shard), load_file(back / shard)
        assert before.keys() == after.keys()
        for key in before:
            torch.testing.assert_close(after[key], before[key], rtol=1e-14, atol=1e-15)


def test_what_was_trained_in_between_stays_trained(converted, tmp_path):
    """Training that keeps the stream centred: queries and keys read norms and write to no stream."""
    folder = tmp_path / "trained"
    _change(converted("centred"), folder, lambda name, t: t * 1.1 if name.endswith("attn.c_attn.weight") else t)
    back = normswap.undo(folder, tmp_path / "back", verify="fast").folder
    a, b = (load_file(f / "model.safetensors")["transformer.h.0.attn.c_attn.weight"] for f in (folder, back))
    assert torch.equal(a, b)


def test_training_that_the_source_cannot_express_is_refused(converted, tmp_path):
    """RMSNorm sees a mean that training brought back; LayerNorm does not."""
    folder = tmp_path / "trained"
    _change(converted("centred"), folder, lambda name, t: t + 0.1 if name.endswith("mlp.c_proj.bias") else t)
    with pytest.raises(VerificationError, match="cannot be undone.*trained"):
        normswap.undo(folder, tmp_path / "back", verify="fast")
    assert not (tmp_path / "back").exists()


def test_what_cannot_be_undone_says_so(checkpoints, converted, tmp_path):
    with pytest.raises(RefusedError, match="was not converted by normswap"):
        normswap.undo(checkpoints / GPT2, tmp_path / "back")

    moved = normswap.convert(checkpoints / GPT2, tmp_path / "post", placement="post", tokens=256, verify="none").folder
    with pytest.raises(RefusedError, match="cannot be undone: the result is calibrated.*gpt2-shakespeare"):
        normswap.undo(moved, tmp_path / "back")

    bare = tmp_path / "bare"
    _change(converted("centred"), bare, lambda name, t: t)
    (bare / "normswap.undo").unlink()
    with pytest.raises(SourceError, match="normswap.undo.*cannot be read"):
        normswap.undo(bare, tmp_path / "back")

    model = AutoModelForCausalLM.from_pretrained(checkpoints / LLAMA)
    model.model.layers[2].input_layernorm.weight.data[:3] = 0
    model.save_pretrained(tmp_path / "zeros")
    out = normswap.convert(tmp_path / "zeros", tmp_path / "folded", fold=True, verify="none").folder
    with pytest.raises(RefusedError, match="layers.2.input_layernorm.weight has 3 gains of 0"):
        normswap.undo(out, tmp_path / "back")


def _change(source: Path, folder: Path, change) -> None:
    """A copy of a folder with other weights, as a training would leave it."""
    folder.mkdir()
    for path in source.iterdir():
        if path.name != "model.safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    save_file({k: change(k, t) for k, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
