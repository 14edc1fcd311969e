"""What the launchers launch, compiled for a GPU of compute capability 9.0 that need not be there; prints a line each.

    python tests/triton_compile.py [FORM,KIND,CASTING,WIDTH,DTYPE ...]    run without TRITON_INTERPRET

A line: the case, the kernel, registers per thread, bytes of stack (what did not fit into registers), shared memory.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import triton
from triton.backends.compiler import GPUTarget

from normswap.kernels.triton import launch, launch_backward, tiles
from normswap.kernels.triton.launch import Norm

CASES = [
    "norm,rmsnorm,float32-before-gain,4096,bfloat16",
    "add-norm,layernorm,input,770,bfloat16",
    "norm-add-norm,layernorm,float32,1024,float16",
    "norm-add,rmsnorm,float32,8192,bfloat16",
    "norm,layernorm,float32,65536,bfloat16",
    "add-norm,layernorm,float32,64,float64",
]


def main() -> None:
    launched = []
    run = triton.runtime.JITFunction.run

    def compiled(kernel, *args, grid, warmup, **options):
        launched.append((kernel, run(kernel, *args, grid=grid, warmup=True, **options)))

    triton.runtime.driver.set_active(  # an H200, as far as the compiler asks
        SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda _: 0,
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
        )
    )
    triton.runtime.JITFunction.run = compiled
    launch.check = lambda *_: None
    for module in (launch, launch_backward):
        module.device_of, module.on_device_of = lambda _: 0, lambda _: nullcontext()
    tiles._multiprocessors, tiles._shared_memory = lambda _: 132, lambda _: 232448
    for case in sys.argv[1:] or CASES:
        form, kind, casting, width, dtype = case.split(",")
        launched.clear()
        _launch(form, kind, casting, int(width), getattr(torch, dtype))
        for kernel, binary in launched:
            registers, stack = _resources(binary.asm["cubin"])
            print(f"{case} {kernel.__name__} {registers} {stack} {binary.metadata.shared}", flush=True)


def _launch(form: str, kind: str, casting: str, width: int, dtype: torch.dtype) -> None:
    """The forward and the backward of a form."""
    x, weight, bias = (
        torch.empty(64, width, dtype=dtype),
        torch.empty(width, dtype=dtype),
        torch.empty(width, dtype=dtype),
    )
    norm = Norm(dtype, kind, 1e-5, "1 + w", casting)
    if form == "norm-add-norm":
        _, s, stats, stats2 = launch.launch_norm_add_norm(x, x, weight, bias, weight, bias, norm, norm)
        kept = (x, x, s, stats, stats2, weight, bias, weight, bias, x)
        launch_backward.launch_norm_add_norm_backward(*kept, norm, norm, (True,) * 4)
        return
    given = [x] if form == "norm" else [x, x]
    stats = getattr(launch, f"launch_{form.replace('-', '_')}")(*given, weight, bias, norm)[-1]
    ds = x if form == "add-norm" else None
    launch_backward.launch_backward(x, x, stats, weight, bias, ds, norm, True, kind == "layernorm")


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of stack."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return tuple(int(re.search(rf"{what}:(\d+)", told)[1]) for what in ("REG", "STACK"))


if __name__ == "__main__":
    main()
