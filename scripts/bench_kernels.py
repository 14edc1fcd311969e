"""Every kernel backend and form against the speed of a copy on the same device, forward and backward.

    .venv/bin/python scripts/bench_kernels.py                    # on a GPU
    .venv/bin/python scripts/bench_kernels.py --device cpu       # one thread, smaller inputs
    .venv/bin/python scripts/bench_kernels.py --quick            # bfloat16, few sizes
    .venv/bin/python scripts/bench_kernels.py --only-report      # the table and the picture, from what was measured

A cell is one form, pass, dtype and size. Its contenders take turns, with cold caches; on a GPU medians count, on a CPU,
where others only add to a time, the least. The bound is the least that must be moved (`bench_report.MOVED`) at the
speed of a copy, which takes its turn. A backend without a form makes its norm and leaves the sum to torch, as a model
would. Cells are kept in scripts/results/kernels-DEVICE.json as they are done, and a run goes on where it was stopped on
the same machine; the table kernels.md and the picture kernels.png are made of these.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click
import torch
import torch._functorch.config as functorch

from bench_report import picture, table
from normswap.kernels.backend import Kernel
from normswap.kernels.backends import BACKENDS
from normswap.kernels.call import Call, Norm
from normswap.kernels.decomposed import decomposed
from stopwatch import Stopwatch, machine

RESULTS = Path(__file__).parent / "results"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
#: of a grid: widths, rows
SIZES = {
    ("cuda", False): ((512, 1024, 2048, 4096, 8192, 16384, 32768, 65536), (1024, 4096, 16384, 65536)),
    ("cuda", True): ((1024, 4096, 8192, 16384), (4096, 16384)),
    ("cpu", False): ((512, 768, 2048, 4096, 16384, 65536), (64, 1024)),
    ("cpu", True): ((768, 4096), (512,)),
}
#: what is measured: form, kind, casting
OPERATIONS = {
    "rmsnorm": ("norm", "rmsnorm", "float32"),
    "rmsnorm, Llama's rounding": ("norm", "rmsnorm", "float32-before-gain"),
    "layernorm": ("norm", "layernorm", "float32"),
    "add, rmsnorm": ("add-norm", "rmsnorm", "float32"),
    "add, layernorm": ("add-norm", "layernorm", "float32"),
    "rmsnorm, add": ("norm-add", "rmsnorm", "float32"),
    "rmsnorm, add, rmsnorm": ("norm-add-norm", "rmsnorm", "float32"),
}
EAGER = "eager"


@click.command()
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option("--quick", is_flag=True, help="bfloat16 and few sizes.")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(list(DTYPES)), help="By default all.")
@click.option("--turns", default=20, show_default=True, help="Runs of each contender per cell.")
@click.option("--only-report", is_flag=True, help="Measure nothing.")
@click.option("--results", default=RESULTS, type=click.Path(file_okay=False, path_type=Path), help="Folder.")
def main(device: str, quick: bool, dtypes: tuple[str, ...], turns: int, only_report: bool, results: Path) -> None:
    files = {device: results / f"kernels-{device}.json" for device in ("cuda", "cpu")}
    if not only_report:
        if device == "cuda" and not torch.cuda.is_available():
            raise click.ClickException("there is no GPU here; `--device cpu` measures what runs on a CPU")
        if device == "cpu":
            torch.set_num_threads(1)
        results.mkdir(parents=True, exist_ok=True)
        measure(files[device], device, quick, dtypes or (("bfloat16",) if quick else tuple(DTYPES)), turns)
    found = {of: json.loads(file.read_text()) for of, file in files.items() if file.exists()}
    (results / "kernels.md").write_text(table(found))
    picture(found, results / "kernels.png")
    click.echo(results / "kernels.md")


def measure(file: Path, device: str, quick: bool, dtypes: tuple[str, ...], turns: int) -> None:
    """The cells of a grid that are not in the file, or are of another machine."""
    functorch.donated_buffer = False  # a graph is run backward many times
    watch = Stopwatch(device)
    told = machine(device)
    kept = json.loads(file.read_text()) if file.exists() else {}
    if kept.get("machine") != told:
        kept = {"machine": told, "cells": {}, "on_host": {}}
    widths, rows = SIZES[device, quick]
    for operation, dtype in itertools.product(OPERATIONS, dtypes):
        if f"{operation}|{dtype}" not in kept["on_host"]:
            kept["on_host"][f"{operation}|{dtype}"] = _on_host(watch, operation, DTYPES[dtype])
        for width, count in itertools.product(widths, rows):
            name = f"{operation}|{dtype}|{count}|{width}"
            if name in kept["cells"] or not _fits(device, count * width * DTYPES[dtype].itemsize):
                continue
            kept["cells"][name] = _cell(watch, operation, DTYPES[dtype], count, width, turns)
            file.write_text(json.dumps(kept, indent=1))
            click.echo(f"{name}: " + _said(kept["cells"][name]))
            if "torch._dynamo" in sys.modules:
                torch._dynamo.reset()  # its cache of graphs is bounded


def contenders(call: Call) -> dict[str, Kernel]:
    """By name: plain torch as models write it, and each backend that serves the norm of the call."""
    found = {EAGER: decomposed(call)}
    if call.norm.kind == "layernorm":  # models call torch's own
        found[EAGER] = _unfused(BACKENDS["torch"], call)
    for name, backend in BACKENDS.items():
        if backend.rejects(call) is None:
            found[name] = backend.build(call)
        elif backend.rejects(_norm_alone(call)) is None:
            found[name] = _unfused(backend, call)
    return found


def asked(operation: str, dtype: torch.dtype, width: int, device: str) -> Call:
    """The call of an operation."""
    form, kind, casting = OPERATIONS[operation]
    norm = Norm(kind, 1e-6, "w", kind == "layernorm", casting if dtype.itemsize < 4 else "float32", dtype, dtype)
    residual = None if form == "norm" else dtype
    return Call(form, width, dtype, device, norm, norm if form == "norm-add-norm" else None, residual)


def _norm_alone(call: Call) -> Call:
    return replace(call, form="norm", then=None, residual=None)


def passes(kernel: Kernel, call: Call, rows: int) -> tuple[Callable, Callable]:
    """Runs of a kernel forward, with a graph, and backward, for the gradients of all inputs."""
    torch.manual_seed(0)

    def made(*shape):
        return torch.randn(shape, dtype=call.dtype, device=call.device).requires_grad_()

    tensors = [made(rows, call.width) for _ in range(1 if call.form == "norm" else 2)]
    for norm in call.norms:
        tensors += [made(call.width), made(call.width) if norm.bias else None]
    wanted = [tensor for tensor in tensors if tensor is not None]
    results = kernel(*tensors)
    results = (results,) if isinstance(results, torch.Tensor) else results
    arriving = [torch.randn_like(result) for result in results]
    return lambda: kernel(*tensors), lambda: torch.autograd.grad(results, wanted, arriving, retain_graph=True)


def _cell(watch: Stopwatch, operation: str, dtype: torch.dtype, rows: int, width: int, turns: int) -> dict:
    """Seconds by pass and contender; of one that fails, why."""
    call = asked(operation, dtype, width, watch.device)
    runs: dict[str, dict[str, Callable]] = {"forward": {}, "backward": {}}
    failed = {}
    for name, kernel in contenders(call).items():
        try:
            forward, backward = passes(kernel, call, rows)
            forward(), backward()
            watch.wait()
        except Exception as error:  # of any library; the others are measured nevertheless
            failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            continue
        runs["forward"][name], runs["backward"][name] = forward, backward
    found = {which: watch.in_turns({"copy": watch.copy} | of_pass, turns) for which, of_pass in runs.items()}
    bandwidth = {which: watch.copied / found[which].pop("copy") for which in found}
    return {"form": call.form, "copied_per_second": bandwidth} | found | ({"failed": failed} if failed else {})


def _on_host(watch: Stopwatch, operation: str, dtype: torch.dtype) -> dict[str, list[float]]:
    """Seconds that the host is busy with a forward and a backward, by contender: those of tiny inputs."""
    call = asked(operation, dtype, 512, watch.device)
    found = {}
    for name, kernel in contenders(call).items():
        try:
            found[name] = [watch.on_host(run) for run in passes(kernel, call, 1)]
        except Exception:  # said where it is measured
            continue
    return found


def _unfused(backend, call: Call) -> Kernel:
    """A call by a backend that has its norms alone."""
    norm = backend.build(_norm_alone(call))

    def run(x, *tensors):
        if call.form == "norm":
            return norm(x, *tensors)
        residual, weight, bias, *second = tensors
        s = residual + (x if call.form == "add-norm" else norm(x, weight, bias))
        if call.form == "norm-add":
            return s
        return norm(s, *(second or (weight, bias))), s

    return run


def _fits(device: str, size: int) -> bool:
    """Whether contenders' tensors of `size` bytes fit: each holds about twelve, and the graph of eager torch more."""
    contending = 7 * 12
    memory = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else 8 << 30
    return size * contending < 0.9 * memory


def _said(cell: dict) -> str:
    return "; ".join(
        f"{which} " + ", ".join(f"{name} {seconds * 1e6:.0f}" for name, seconds in cell[which].items())
        for which in ("forward", "backward")
    ) + "".join(f"; {name} failed: {why}" for name, why in cell.get("failed", {}).items())


if __name__ == "__main__":
    main()
