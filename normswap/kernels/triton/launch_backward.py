"""Backward kernels on tensors, and the sums of their partial sums. Shapes are those of `launch`."""

from __future__ import annotations

import torch

from normswap.kernels.triton import tiles
from normswap.kernels.triton.backward import backward_kernel
from normswap.kernels.triton.launch import Norm, Optional, device_of, on_device_of, roundings_of, there
from normswap.kernels.triton.reduce import reduce_kernel
from normswap.kernels.triton.roundings import TRITON_DTYPES
from normswap.kernels.triton.rows import rows_of
from normswap.kernels.triton.sandwich_backward import sandwich_backward_kernel


def launch_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    stats: torch.Tensor,
    weight: Optional,
    bias: Optional,
    ds: Optional,
    norm: Norm,
    need_weight: bool,
    need_bias: bool,
    whole: int = tiles.BACKWARD_WHOLE,
) -> tuple[torch.Tensor, Optional, Optional]:
    """Gradients of what the norm read, `x`, and of its gain and bias where they are needed, else None.

    Args:
        dy: of the output.
        ds: a gradient that arrived at `x` otherwise, which is added.
        stats: as the forward gave them.
        bias: for its dtype alone.
    """
    width = x.shape[-1]
    dx = x.new_empty(x.shape)
    if not x.numel():
        return dx, *_zeros(weight if need_weight else None, bias if need_bias else None)
    x, at = rows_of(x)
    rows = x.numel() // width
    steps = roundings_of(x, weight, bias, norm)
    device = device_of(x)
    read = dy.element_size() + x.element_size() + (0 if ds is None else ds.element_size())
    gain = 0 if weight is None else weight.element_size()
    tile = tiles.backward_tile(width, read, gain, device, whole)
    programs = tiles.programs(tile, -(-rows // tile.rows), device)
    partials = _partials(stats, programs, need_weight + need_bias, width, tile.block >= width)
    with on_device_of(x):
        backward_kernel[(programs,)](
            dy.contiguous(), there(ds, x), x, stats, there(weight, x), dx, partials, rows, *at,
            width, tile.block, tile.rows, tile.stages, tile.keeps_gain,
            norm.layernorm, norm.gain, need_weight, need_bias, ds is not None,
            steps.step, steps.hat, steps.gained, steps.acc,
            num_warps=tile.warps,
        )  # fmt: skip
        dw, db = _summed(partials, weight if need_weight else None, bias if need_bias else None)
    return dx, dw, db


def launch_norm_add_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    s: torch.Tensor,
    stats: torch.Tensor,
    stats2: torch.Tensor,
    weight: Optional,
    bias: Optional,
    weight2: Optional,
    bias2: Optional,
    ds: Optional,
    norm: Norm,
    norm2: Norm,
    needs: tuple[bool, bool, bool, bool],
    whole: int = tiles.SANDWICH_WHOLE,
) -> tuple[torch.Tensor, torch.Tensor, Optional, Optional, Optional, Optional]:
    """Gradients of s, of x, and of gain, bias, gain2 and bias2 where they are needed, else None.

    Args:
        dy: of the output.
        ds: that arrived at s otherwise, which is added.
        needs: whether those of gain, bias, gain2 and bias2 are needed.
    """
    width = x.shape[-1]
    device = device_of(x)
    read = sum(0 if tensor is None else tensor.element_size() for tensor in (dy, ds, s, x))
    tile = tiles.sandwich_backward_tile(width, read, device, whole)
    if tile is None or not x.numel():
        dr, dw2, db2 = launch_backward(dy, s, stats2, weight2, bias2, ds, norm2, *needs[2:], whole)
        dx, dw, db = launch_backward(dr.to(norm.out_dtype), x, stats, weight, bias, None, norm, *needs[:2], whole)
        return dr, dx, dw, db, dw2, db2
    dr, dx = s.new_empty(s.shape), x.new_empty(x.shape)
    x, at = rows_of(x)
    rows = x.numel() // width
    steps, steps2 = roundings_of(x, weight, bias, norm), roundings_of(s, weight2, bias2, norm2)
    programs = tiles.programs(tile, -(-rows // tile.rows), device)
    partials = _partials(stats, programs, needs[0] + needs[1], width, True)
    partials2 = _partials(stats2, programs, needs[2] + needs[3], width, True)
    with on_device_of(x):
        sandwich_backward_kernel[(programs,)](
            dy.contiguous(), there(ds, x), s, stats2, there(weight2, x), x, stats, there(weight, x),
            dr, dx, partials, partials2, rows, *at,
            width, tile.block, tile.rows, tile.stages, ds is not None,
            TRITON_DTYPES[s.dtype], TRITON_DTYPES[norm.out_dtype], steps.acc,
            norm.layernorm, norm.gain, needs[0], needs[1], steps.step, steps.hat, steps.gained,
            norm2.layernorm, norm2.gain, needs[2], needs[3], steps2.step, steps2.hat, steps2.gained,
            num_warps=tile.warps,
        )  # fmt: skip
        wanted = [p if needed else None for p, needed in zip((weight, bias, weight2, bias2), needs, strict=True)]
        return dr, dx, *_summed(partials, *wanted[:2]), *_summed(partials2, *wanted[2:])


def _partials(stats: torch.Tensor, programs: int, sums: int, width: int, fits: bool) -> torch.Tensor:
    """Room for partial sums, `(programs, sums, width)`; zeros where programs add to them in memory."""
    return (stats.new_empty if fits else stats.new_zeros)((programs, sums, width))


def _summed(partials: torch.Tensor, weight: Optional, bias: Optional) -> tuple[Optional, Optional]:
    """Gradients of those that are given."""
    programs, sums, width = partials.shape
    dw, db = (None if p is None else torch.empty_like(p, memory_format=torch.contiguous_format) for p in (weight, bias))
    if sums:
        columns = tiles.reduce_columns(device_of(partials))
        reduce_kernel[(-(-width // columns), sums)](
            partials, there(dw, partials), there(db, partials), programs,
            width, dw is not None, db is not None, columns, 128, TRITON_DTYPES[partials.dtype],
            num_warps=8,
        )  # fmt: skip
    return dw, db


def _zeros(*parameters: Optional) -> tuple[Optional, ...]:
    """Of no rows."""
    return tuple(None if p is None else torch.zeros_like(p) for p in parameters)
