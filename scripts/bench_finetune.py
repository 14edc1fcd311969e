"""Whole training steps with each kernel backend: tokens per second and peak memory of GPT-2- and Llama-shaped models.

    .venv/bin/python scripts/bench_finetune.py                  # on a GPU, bfloat16
    .venv/bin/python scripts/bench_finetune.py --device cpu     # one thread, float32, small models
    .venv/bin/python scripts/bench_finetune.py --quick          # a few layers

A step is forward, loss, backward and AdamW. One model with random weights is given each backend in turns
(`use_kernels`, residual sums in the norms where a backend makes them), and as a whole to `torch.compile`; on a GPU
medians count, on a CPU, where others only add to a time, the fastest step. The table, with how many of a model's norms
and residual sums kernels compute, goes to scripts/results/finetune.md.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import click
import torch
import transformers

from normswap.errors import KernelError
from normswap.kernels.backends import BACKENDS
from normswap.kernels.swap import restore_kernels, use_kernels
from stopwatch import in_words, machine

RESULTS = Path(__file__).parent / "results"
TITLES = {"cuda": "GPU", "cpu": "CPU, one thread"}
#: per device: words, width, layers, heads, sequences, tokens of each
SHAPES = {"cuda": {"gpt2": (50304, 1024, 24, 16, 8, 1024), "llama": (32000, 2048, 16, 16, 4, 2048)},
          "cpu": {"gpt2": (1024, 512, 4, 8, 2, 128), "llama": (1024, 512, 4, 8, 2, 128)}}  # fmt: skip
EAGER, COMPILED = "none", "none, model compiled"


@click.command()
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option("--quick", is_flag=True, help="Four layers, fewer turns.")
@click.option("--turns", type=int, help="Of all backends; by default 5, 2 with --quick.")
@click.option("--steps", default=5, show_default=True, help="Measured in each turn, after two that are not.")
@click.option("--results", default=RESULTS, type=click.Path(file_okay=False, path_type=Path), help="Folder.")
def main(device: str, quick: bool, turns: int | None, steps: int, results: Path) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise click.ClickException("there is no GPU here; `--device cpu` measures small models on the CPU")
    if device == "cpu":
        torch.set_num_threads(1)
    results.mkdir(parents=True, exist_ok=True)
    kept = results / f"finetune-{device}.json"
    found = {"machine": machine(device), "models": {}}
    for name, shape in SHAPES[device].items():
        found["models"][name] = _measure(name, shape, device, quick, turns or (2 if quick else 5), steps)
        kept.write_text(json.dumps(found, indent=1))
    files = {d: results / f"finetune-{d}.json" for d in TITLES}
    (results / "finetune.md").write_text(_table({d: json.loads(f.read_text()) for d, f in files.items() if f.exists()}))
    click.echo((results / "finetune.md").read_text())


def _measure(name: str, shape: tuple, device: str, quick: bool, turns: int, steps: int) -> dict:
    """Of one model, by backend: tokens per second, peak bytes, and how many norms and sums kernels compute."""
    words, width, layers, heads, sequences, length = shape
    model = _model(name, words, width, min(layers, 4) if quick else layers, heads, length)
    model = model.to(device, torch.bfloat16 if device == "cuda" else torch.float32)
    compiled = torch.compile(model)
    ids = torch.randint(0, model.config.vocab_size, (sequences, length), device=device)
    took: dict[str, list[float]] = {}
    found: dict[str, dict] = {}
    chosen: dict[str, dict] = {}
    for turn in range(turns):
        for backend in (EAGER, *BACKENDS, "auto", COMPILED):
            if backend in found and "why" in found[backend]:
                continue
            restore_kernels(model)
            said = {"norms": 0, "sums": 0}
            if backend not in (EAGER, COMPILED):
                try:
                    kernels = use_kernels(model, backend, fuse_residual=True, chosen=chosen.get(backend))
                except KernelError as error:
                    found[backend] = {"why": str(error)}
                    continue
                chosen[backend] = kernels.chosen()
                said = {"norms": len(kernels.served), "sums": sum(pair.reason is None for pair in kernels.fusing.pairs)}
                if not kernels.served:
                    found[backend] = {"why": kernels.sites[0].why}
                    continue
            seconds, peak = _steps(compiled if backend == COMPILED else model, ids, steps)
            took.setdefault(backend, []).extend(seconds)
            found[backend] = said | {
                "tokens_per_second": ids.numel() / (statistics.median if device == "cuda" else min)(took[backend]),
                "peak_bytes": max(peak, found.get(backend, {}).get("peak_bytes", 0)),
            }
            click.echo(f"{name}, turn {turn + 1}, {backend}: {found[backend]}")
    restore_kernels(model)
    shape_said = f"width {width}, {len(_blocks(model))} layers, {sequences} x {length} tokens"
    return {"shape": shape_said, "parameters": sum(p.numel() for p in model.parameters()), "backends": found}


def _steps(model: torch.nn.Module, ids: torch.Tensor, steps: int) -> tuple[list[float], int]:
    """Seconds of each step, and the peak of memory."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    model.train()
    seconds = []
    _forget_peak(ids.device)
    for step in range(steps + 2):
        start = _now(ids.device)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step >= 2:
            seconds.append(_now(ids.device) - start)
    return seconds, _peak(ids.device)


def _model(name: str, words: int, width: int, layers: int, heads: int, length: int) -> torch.nn.Module:
    torch.manual_seed(0)
    if name == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=words,
            n_embd=width,
            n_layer=layers,
            n_head=heads,
            n_positions=length,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
            bos_token_id=0,
            eos_token_id=0,
        )
    else:
        config = transformers.LlamaConfig(
            vocab_size=words,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=(width * 11) // 4,
            max_position_embeddings=length,
        )
    config.use_cache = False
    return transformers.AutoModelForCausalLM.from_config(config)


def _blocks(model: torch.nn.Module) -> torch.nn.ModuleList:
    return next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _peak(device: torch.device) -> int:
    """Bytes: allocated on the GPU, or resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def _table(found: dict[str, dict]) -> str:
    lines = ["<!-- scripts/bench_finetune.py -->"]
    for device, title in TITLES.items():
        lines.append(f"# {title}\n")
        if device not in found:
            lines.append("Not measured.\n")
            continue
        lines.append(f"{in_words(found[device]['machine'])}. Norms and sums: how many of them kernels compute.\n")
        for name, of_model in found[device]["models"].items():
            lines += [
                f"{name}: {of_model['shape']}, {of_model['parameters'] / 1e6:.0f}M parameters.\n",
                "| backend | norms | sums | tokens/s | of none | peak memory, GB |",
                "|---|---|---|---|---|---|",
            ]
            alone = of_model["backends"][EAGER]["tokens_per_second"]
            for backend, told in of_model["backends"].items():
                if "why" in told:
                    lines.append(f"| {backend} | {told['why']} | | | | |")
                    continue
                speed = told["tokens_per_second"]
                lines.append(
                    f"| {backend} | {told['norms']} | {told['sums']} | {speed:.0f} | {speed / alone:.2f} "
                    f"| {told['peak_bytes'] / 1e9:.2f} |"
                )
            lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
