"""The numbers of the README, measured again: conversions of the trained checkpoints, and inspection at full size.

.venv/bin/python scripts/measure.py            # prints Markdown tables
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import click
import torch
import transformers
from transformers.utils import logging

import normswap

CHECKPOINTS = Path(__file__).parent.parent / "tests" / "checkpoints"
CONVERSIONS = [
    ("gpt2-shakespeare", "--norm rmsnorm", dict(norm="rmsnorm")),
    ("gpt2-shakespeare", "--norm rmsnorm --tied untie", dict(norm="rmsnorm", tied="untie")),
    ("gpt2-shakespeare", "--norm rmsnorm --fold --tied untie", dict(norm="rmsnorm", fold=True, tied="untie")),
    ("gpt_neox-shakespeare", "--norm rmsnorm", dict(norm="rmsnorm")),
    ("gpt_neox-shakespeare", "--norm rmsnorm --fold", dict(norm="rmsnorm", fold=True)),
    ("llama-shakespeare", "--fold", dict(fold=True)),
]
# shapes of well-known models, built without weights
FULL_SIZE = {
    "Llama 70B": ("llama", dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                                num_attention_heads=64, num_key_value_heads=8, vocab_size=128256)),
    "GPT-NeoX 20B": ("gpt_neox", dict(hidden_size=6144, intermediate_size=24576, num_hidden_layers=44,
                                      num_attention_heads=64, vocab_size=50432)),
}  # fmt: skip


@click.command()
@click.option("--inspect-only", "config_folder", type=click.Path(path_type=Path), hidden=True)
def main(config_folder: Path | None) -> None:
    """Measure and print the tables of the README."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if config_folder is not None:
        _inspect(config_folder)
        return
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    print(f"{versions}, {os.cpu_count()} CPU cores\n")
    print("| checkpoint | conversion | worst error, float64 | worst error, float32 | nats, float32 | nats, bfloat16 |")
    print("|---|---|---|---|---|---|")
    for name, words, request in CONVERSIONS:
        with tempfile.TemporaryDirectory() as folder:
            source, half = CHECKPOINTS / name, Path(folder) / "half"
            report = normswap.convert(source, Path(folder) / "out", **request).report
            normswap.convert(source, half, **request, dtype="bfloat16", verify="fast")
            cost = _nats(normswap.verify(source, half, dtype="bfloat16"))
        exact, stored = report.mathematics.comparison.output, report.stored
        print(
            f"| {name} | `{words}` | {exact.error.max:.1e} | {stored.comparison.output.error.max:.1e} "
            f"| {_nats(stored):+.1e} | {cost:+.1e} |"
        )
    print("\n| configuration, no weights | norms | seconds | peak memory |\n|---|---|---|---|")
    for name, (model_type, sizes) in FULL_SIZE.items():
        with tempfile.TemporaryDirectory() as folder:
            config = transformers.AutoConfig.for_model(model_type, **sizes)
            architecture = transformers.AutoModelForCausalLM._model_mapping[type(config)].__name__
            (Path(folder) / "config.json").write_text(json.dumps({**config.to_dict(), "architectures": [architecture]}))
            command = [sys.executable, __file__, "--inspect-only", folder]
            norms, seconds, memory = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        print(f"| {name} | {norms} | {float(seconds):.1f} | {float(memory):.2f} GiB |")


def _inspect(folder: Path) -> None:
    start = time.perf_counter()
    found = normswap.inspect(folder)
    seconds = time.perf_counter() - start
    print(len(found.sites), seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def _nats(report) -> float:
    """Change of the mean cross-entropy."""
    output = report.comparison.output
    return output.cross_entropy_b.mean - output.cross_entropy_a.mean


if __name__ == "__main__":
    main()
