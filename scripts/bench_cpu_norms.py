"""RMSNorm on the CPU, one thread, beside the LayerNorm that it replaces.

    .venv/bin/python scripts/bench_cpu_norms.py

Each contender runs in turn, many short runs each, and its median is taken: of the thread's processor time, which other
work on the machine disturbs less than the clock. All in one process. The table goes to scripts/results/cpu_norms.md.
Some ten minutes, of which Inductor's compilations are most; `--without-compile` leaves them out.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import click
import torch
import transformers
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from normswap.kernels.cpu import available, few_passes, norm

RESULTS = Path(__file__).parent / "results" / "cpu_norms.md"
WIDTHS, ROWS, DTYPES = (768, 4096), (1, 512, 4096), (torch.float32, torch.bfloat16)
#: what a fused RMSNorm may take of F.layer_norm's time, at any but a single row
TARGETS = {"forward": 1.1, "forward and backward": 1.5}
BASE, OURS, ROUNDED = "F.layer_norm", "C kernel", "C kernel, Llama's rounding"
SECONDS = 0.003  # of one run


@click.command()
@click.option("--runs", default=31, show_default=True, help="Of each contender.")
@click.option("--without-compile", is_flag=True)
def main(runs: int, without_compile: bool) -> None:
    torch.set_num_threads(1)
    reason = available()
    if reason is not None:
        raise click.ClickException(reason)
    lines: list[tuple[str, ...]] = []
    worst = {(what, single): 0.0 for what in TARGETS for single in (False, True)}
    for dtype in DTYPES:
        for width in WIDTHS:
            for rows in ROWS:
                for what, contenders in _contenders(rows, width, dtype, without_compile).items():
                    with torch.set_grad_enabled(what != "forward"):
                        times = _medians(contenders, runs)
                    base = times[BASE]
                    ratios = {name: t / base for name, t in times.items() if name != BASE}
                    worst[what, rows == 1] = max(worst[what, rows == 1], ratios[OURS])
                    shown = (f"{ratios[name]:.2f}" for name in ratios)
                    cell = (str(dtype).removeprefix("torch."), str(width), str(rows), what, f"{base * 1e6:.0f}", *shown)
                    lines.append(cell)
                    print(" | ".join(cell), flush=True)
    names = ("dtype", "width", "rows", "what", f"{BASE}, us", *ratios)
    table = "\n".join("| " + " | ".join(line) + " |" for line in (names, ("---",) * len(names), *lines))
    verdicts = "\n".join(
        f"- {what}: the C kernel takes at most {worst[what, False]:.2f} times as long as {BASE} at 512 rows and more "
        f"(to reach: {limit}), {worst[what, True]:.2f} times at one row, where it is the call that takes the time"
        for what, limit in TARGETS.items()
    )
    RESULTS.write_text(f"{_head(runs)}\n\n{table}\n\n{verdicts}\n")


def _contenders(
    rows: int, width: int, dtype: torch.dtype, without_compile: bool
) -> dict[str, dict[str, Callable[[], object]]]:
    draw = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(rows, width, generator=draw).to(dtype) for _ in range(2))
    held = [t.requires_grad_() for t in (x, *(torch.randn(width, generator=draw).to(dtype) for _ in range(2)))]
    llama = LlamaRMSNorm(width, eps=1e-5)
    llama.weight = torch.nn.Parameter(held[1].detach())
    how = {"kind": "rmsnorm", "eps": 1e-5, "gain": "w", "casting": "float32", "out_dtype": dtype}
    functions = {
        BASE: lambda x, w, b: F.layer_norm(x, (width,), w, b),
        OURS: lambda x, w, b: norm(x, w, None, **how),
        ROUNDED: lambda x, w, b: norm(x, w, None, **how | {"casting": "float32-before-gain"}),
        "few passes": lambda x, w, b: few_passes(x, w, None, **how),
        "F.rms_norm": lambda x, w, b: F.rms_norm(x, (width,), w, 1e-5),
        "LlamaRMSNorm": lambda x, w, b: llama(x),
    }
    if not without_compile:
        torch.compiler.reset()
        functions["compiled F.rms_norm"] = torch.compile(functions["F.rms_norm"], dynamic=False)

    def backward(name, function):
        of = {BASE: held, "LlamaRMSNorm": [x, llama.weight]}.get(name, held[:2])
        return lambda: torch.autograd.grad(function(*held), of, dy)

    return {
        "forward": {name: (lambda f=f: f(*held)) for name, f in functions.items()},
        "forward and backward": {name: backward(name, f) for name, f in functions.items()},
    }


def _medians(contenders: dict[str, Callable[[], object]], runs: int) -> dict[str, float]:
    """Seconds of a call."""
    calls, times = {}, {name: [] for name in contenders}
    for name, run in contenders.items():
        run(), run()
        calls[name] = max(1, round(SECONDS / max(_seconds(run, 1), 1e-7)))
    for _ in range(runs):
        for name, run in contenders.items():
            times[name].append(_seconds(run, calls[name]))
    return {name: statistics.median(of) for name, of in times.items()}


def _seconds(run: Callable[[], object], calls: int) -> float:
    begun = time.thread_time()
    for _ in range(calls):
        run()
    return (time.thread_time() - begun) / calls


def _head(runs: int) -> str:
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        told = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
        told = {key.strip(): value.strip() for key, value in told.items()}
        cpu = f"{told.get('model name', cpu)} (family {told.get('cpu family')}, model {told.get('model')})"
    cc = os.environ.get("CC", "cc")
    compiler = subprocess.run([cc, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    return (
        "# RMSNorm on the CPU, times relative to F.layer_norm\n\n"
        f"One thread of {cpu}, vectors of {torch.backends.cpu.get_cpu_capability()}; torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {compiler}. Median of {runs} runs. F.layer_norm has a gain and a "
        "bias and gives both gradients; the RMSNorms have a gain."
    )


if __name__ == "__main__":
    main()
