"""Two processes against one, and killed runs against whole ones, over what recipes can ask for.

    .venv/bin/python scripts/check_distributed.py [CASE ...]

For each case, one process trains with twice the accumulation of two (RepBN, whose statistics are over all processes:
with twice the rows); then two processes do, DDP and FSDP, are killed in the middle of it, and resumed. Prints the
largest relative difference of what was logged behind each (losses, held-out losses, gradient norms) and the largest
difference of a final weight. About 10 minutes on 2 cores; exits with 1 where something is further apart than `LIMIT`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

#: of what is logged, relative; in float32, and where activations are bfloat16
LIMIT, LIMIT_BF16 = 5e-5, 5e-3

GPT2 = "model: {path: %s, config: {attn_pdrop: 0.0, resid_pdrop: 0.0, embd_pdrop: 0.0}}"
LLAMA = "model: %s"
STAGES = """
  - {steps: 2, learning_rate: 1e-3, train: norms}
  - {steps: 4, learning_rate: 1e-3, warmup: 0.3, taper: {order: forward, over: 0.7}}
"""
NO_TAPER = "\n  - {steps: 2, learning_rate: 1e-3, train: norms}\n  - {steps: 4, learning_rate: 1e-3}\n"

#: surgery, stages, what else
CASES = {
    "dyt": (GPT2, "{norm: dyt}", STAGES, ""),
    "distill": (GPT2, "{norm: rmsnorm}", NO_TAPER, "objective: [lm, distill, hidden]"),
    "repbn": (GPT2, "{norm: repbn}", STAGES, ""),
    "post": (GPT2, "{placement: post}", STAGES, ""),
    "llama-none": (LLAMA, "{norm: none}", STAGES, ""),
    "qk-norm": (LLAMA, "{qk_norm: rmsnorm}", STAGES, ""),
    "lora": (GPT2, "{norm: dyt}", NO_TAPER, "objective: distill\nlora: {r: 4}"),
    "checkpointed": (GPT2, "{norm: dyt}", STAGES, "training.activation_checkpointing=true"),
    "bf16": (GPT2, "{norm: dyt}", STAGES, "training.bf16=true"),
    "control": (GPT2, "{norm: dyt}", STAGES, "control: true"),
}


def main() -> int:
    failed = 0
    print(f"{'case':14} {'processes':20} {'logged':>9} {'weights':>9}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        if not sys.argv[1:]:
            torchrun(Path(folder))
        for name in sys.argv[1:] or CASES:
            base = Path(folder) / name
            base.mkdir()
            for what, logged, weights in compared(name, base):
                failed += logged > (LIMIT_BF16 if name == "bf16" else LIMIT)
                print(f"{name:14} {what:20} {logged:9.1e} {weights:9.1e}", flush=True)
    return 1 if failed else 0


def compared(name: str, base: Path) -> Iterator[tuple[str, float, float]]:
    """How each of the pairs of processes ends, and how far from one."""
    import tune_tasks

    recipe, overrides = written(base, *CASES[name])

    def run(what, *args, processes=1, code=0, **upset):
        out = base / what
        full = [str(recipe), f"output={out}", *overrides, *args]
        codes = tune_tasks.finetune(base / f"said-{what}", full, processes, without_comparison=None, **upset)
        if codes != [code] * processes:
            for rank in range(processes):
                print(tune_tasks.said(base / f"said-{what}", rank)[-2000:])
            raise SystemExit(f"{name}, {what}: ended with {codes}, expected {code}")
        return out

    rows = "per_device_train_batch_size=4" if name == "repbn" else "gradient_accumulation_steps=2"
    one = run("one", f"training.{rows}")
    ways = {"DDP": (), "FSDP": ("training.fsdp=true",)}
    if name == "lora":  # with FSDP it is not resumed, and says so
        two = run("FSDP", *ways.pop("FSDP"), processes=2)
        yield "FSDP, whole", *apart(tune_tasks, one, two)
    for what, args in ways.items():
        run(what, *args, processes=2, code=-9, kill_in_step=3)
        two = run(what, *args, "--resume", processes=2)
        yield f"{what}, killed", *apart(tune_tasks, one, two)


def written(base: Path, model: str, surgery: str, stages: str, more: str) -> tuple[Path, list[str]]:
    """The recipe of a case, and what is set beside it."""
    source = ROOT / "tests/checkpoints" / ("llama-shakespeare" if model is LLAMA else "gpt2-shakespeare")
    path = base / "recipe.yaml"
    overrides = [more] if more.startswith("training.") else []
    lines = [
        model % source,
        f"surgery: {surgery}",
        "data: {block: 32, held_out_blocks: 5, calibration_tokens: 256}",
        f"stages:{stages}",
        "training: {per_device_train_batch_size: 2, eval_steps: 2, logging_steps: 1}",
        "output: nowhere",
        "verify: fast",
        "" if overrides else more,
    ]
    path.write_text("\n".join(lines))
    return path, overrides


def apart(tune_tasks, one: Path, two: Path) -> tuple[float, float]:
    """How far logs (relative) and weights are apart."""
    (weights, record), (others, other) = tune_tasks.published(one), tune_tasks.published(two)
    assert weights.keys() == others.keys()
    worst, checked = 0.0, 0
    for run, entries in record["history"].items():
        assert len(entries) == len(other["history"][run])
        for entry, found in zip(entries, other["history"][run], strict=True):
            for key in ("loss", "grad_norm", "eval_mean", "eval_p99.9", "learning_rate", "ramp"):
                if key in entry:
                    worst = max(worst, abs(entry[key] - found[key]) / max(abs(entry[key]), 1e-6))
                    checked += 1
    assert checked > 20
    return worst, max(float((weights[k] - others[k]).abs().max()) for k in weights)


def torchrun(folder: Path) -> None:
    """The command of the README, once."""
    recipe, _ = written(folder, *CASES["dyt"])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "normswap", "finetune"]
    done = subprocess.run(
        [*command, str(recipe), f"output={folder / 'out'}"], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0 and done.stdout.count("converted and trained") == 1, done.stderr
    assert done.stderr.count("published") == 1
    failed = subprocess.run(
        [*command, str(recipe), "data.block=x"], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert failed.returncode != 0 and failed.stderr.count("data.block: ") == 1, failed.stderr
    print("torchrun: in order", flush=True)


if __name__ == "__main__":
    sys.exit(main())
