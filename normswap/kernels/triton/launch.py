"""Forward kernels on tensors: shapes, strides and dtypes made into what a kernel is told, results allocated.

Shapes: x and residual `(..., width)`, gains and biases `(width,)`; statistics `(1 or 2, ...)`, rstd and a LayerNorm's
mean, of the axes of x but the last, float32 (float64 for float64), so that they are sharded as x is.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import NamedTuple

import torch

from normswap.errors import KernelError
from normswap.kernels.triton import tiles
from normswap.kernels.triton.forward import forward_kernel
from normswap.kernels.triton.roundings import TRITON_DTYPES, roundings
from normswap.kernels.triton.rows import rows_of
from normswap.kernels.triton.sandwich import sandwich_kernel
from normswap.kernels.triton.steps import INTERPRETED

Optional = torch.Tensor | None  # where a norm may have none


class Norm(NamedTuple):
    """How a norm computes, see `NormSpec`; `out_dtype` is that of its output."""

    out_dtype: torch.dtype
    kind: str
    eps: float
    gain: str | None
    casting: str

    @property
    def layernorm(self) -> bool:
        return self.kind == "layernorm"


def launch_norm(x: torch.Tensor, weight: Optional, bias: Optional, norm: Norm, whole: int = tiles.FORWARD_WHOLE):
    """y = N(x). Gives y and the statistics."""
    y, _, stats = _forward("norm", x, None, weight, bias, norm, whole)
    return y, stats


def launch_add_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: Optional,
    bias: Optional,
    norm: Norm,
    whole: int = tiles.FORWARD_WHOLE,
):
    """s = residual + x; y = N(s). Gives y, s and the statistics."""
    return _forward("add-norm", x, residual, weight, bias, norm, whole)


def launch_norm_add(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: Optional,
    bias: Optional,
    norm: Norm,
    whole: int = tiles.FORWARD_WHOLE,
):
    """s = residual + N(x). Gives s and the statistics."""
    _, s, stats = _forward("norm-add", x, residual, weight, bias, norm, whole)
    return s, stats


def launch_norm_add_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: Optional,
    bias: Optional,
    weight2: Optional,
    bias2: Optional,
    norm: Norm,
    norm2: Norm,
    whole: int = tiles.FORWARD_WHOLE // 2,
):
    """s = residual + N(x); y = N2(s). Gives y, s and the statistics of both; two kernels where a row is too wide."""
    tile = tiles.forward_tile(x.shape[-1], device_of(x), whole)
    if tile.block < x.shape[-1]:
        s, stats = launch_norm_add(x, residual, weight, bias, norm, whole)
        y, stats2 = launch_norm(s, weight2, bias2, norm2, whole)
        return y, s, stats, stats2
    check(x, residual, weight, bias, norm)
    check(x, residual, weight2, bias2, norm2)
    s = x.new_empty(x.shape, dtype=torch.promote_types(residual.dtype, norm.out_dtype))
    y = torch.empty_like(s, dtype=norm2.out_dtype)
    stats, stats2 = new_stats(x, norm), new_stats(s, norm2)
    if x.numel():
        x, at = rows_of(x)
        rows = x.numel() // x.shape[-1]
        steps, steps2 = roundings_of(x, weight, bias, norm), roundings_of(s, weight2, bias2, norm2)
        with on_device_of(x):
            sandwich_kernel[(-(-rows // tile.rows),)](
                x, there(residual, x), there(weight, x), there(bias, x), there(weight2, x), there(bias2, x),
                y, s, stats, stats2, rows, *at,
                x.shape[-1], tile.block, tile.rows, TRITON_DTYPES[s.dtype], steps2.acc,
                norm.layernorm, norm.gain, bias is not None, norm.eps, TRITON_DTYPES[norm.out_dtype],
                steps.step, steps.hat, steps.gained, steps.biased,
                norm2.layernorm, norm2.gain, bias2 is not None, norm2.eps,
                steps2.step, steps2.hat, steps2.gained, steps2.biased,
                num_warps=tile.warps,
            )  # fmt: skip
    return y, s, stats, stats2


def new_stats(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """Room for the statistics of the rows of `x`."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((1 + norm.layernorm, *x.shape[:-1]), dtype=dtype)


def check(x: torch.Tensor, residual: Optional, weight: Optional, bias: Optional, norm: Norm) -> None:
    """Raises KernelError where these cannot go into a kernel together."""
    width = x.shape[-1] if x.ndim else 0
    if not 1 <= width <= tiles.MAX_WIDTH:
        raise KernelError(f"expected rows of 1 to {tiles.MAX_WIDTH} values, found an input of shape {tuple(x.shape)}")
    dtypes = [norm.out_dtype, x.dtype]
    for name, tensor, shape in (("residual", residual, x.shape), ("gain", weight, (width,)), ("bias", bias, (width,))):
        if tensor is None:
            continue
        dtypes.append(tensor.dtype)
        if tensor.shape != shape:
            raise KernelError(f"expected a {name} of shape {tuple(shape)}, found {tuple(tensor.shape)}")
        if tensor.device != x.device:
            raise KernelError(f"expected all tensors on {x.device}, found a {name} on {tensor.device}")
    if not _go_together(*dtypes):
        raise KernelError(
            "expected float16, bfloat16 and float32, or float64 for all tensors of a norm, "
            f"found {', '.join(sorted(set(map(str, dtypes))))}; keep the module's own forward there"
        )
    if (weight is None) != (norm.gain is None):
        raise KernelError(f"expected a gain's form where there is a gain, and only there; found {norm.gain!r}")
    if x.device.type != ("cpu" if INTERPRETED.value else "cuda"):
        raise KernelError(
            f"Triton kernels run on GPUs, found a tensor on {x.device}; use backend 'torch' or 'compile' there. "
            "(On the CPU they run in the interpreter, slowly, if TRITON_INTERPRET=1 is set before triton is imported, "
            "and then on the CPU alone.)"
        )


def _forward(
    form: str, x: torch.Tensor, residual: Optional, weight: Optional, bias: Optional, norm: Norm, whole: int
) -> tuple[Optional, Optional, torch.Tensor]:
    """y, s and the statistics; None for what the form does not give."""
    check(x, residual, weight, bias, norm)
    y = s = None
    read = x  # what the norm reads, as to dtype and shape
    if form != "norm-add":
        y = x.new_empty(x.shape, dtype=norm.out_dtype)
    if form != "norm":
        added = x.dtype if form == "add-norm" else norm.out_dtype
        s = x.new_empty(x.shape, dtype=torch.promote_types(residual.dtype, added))
        read = s if form == "add-norm" else x
    stats = new_stats(read, norm)
    if x.numel():
        width = x.shape[-1]
        x, at = rows_of(x)
        rows = x.numel() // width
        steps = roundings_of(read, weight, bias, norm)
        tile = tiles.forward_tile(width, device_of(x), whole)
        with on_device_of(x):
            forward_kernel[(-(-rows // tile.rows),)](
                x, there(residual, x), there(weight, x), there(bias, x), there(y, x), there(s, x), stats,
                rows, *at,
                form, width, tile.block, tile.rows, norm.layernorm,
                norm.gain, bias is not None, norm.eps,
                TRITON_DTYPES[norm.out_dtype], None if s is None else TRITON_DTYPES[s.dtype],
                steps.step, steps.hat, steps.gained, steps.biased, steps.acc,
                num_warps=tile.warps,
            )  # fmt: skip
    return y, s, stats


@cache
def _go_together(*dtypes: torch.dtype) -> bool:
    """Whether one accumulator serves them all."""
    return set(dtypes) <= set(TRITON_DTYPES) and (torch.float64 not in dtypes or len(set(dtypes)) == 1)


def roundings_of(read: torch.Tensor, weight: Optional, bias: Optional, norm: Norm):
    return roundings(
        norm.casting,
        read.dtype,
        None if weight is None else weight.dtype,
        None if bias is None else bias.dtype,
    )


def there(tensor: Optional, other: torch.Tensor) -> torch.Tensor:
    """`tensor` as kernels read it, contiguous; where it is not there, a pointer that is not read."""
    return other if tensor is None else tensor.contiguous()


def device_of(x: torch.Tensor) -> int | None:
    """Index of the GPU, None in the interpreter."""
    return None if INTERPRETED.value else x.device.index


def on_device_of(x: torch.Tensor) -> AbstractContextManager:
    """The device of `x` made the current one, where kernels are launched."""
    if INTERPRETED.value or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)
