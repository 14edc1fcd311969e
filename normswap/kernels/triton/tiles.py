"""How much of a tensor a program takes at once: a plain rule of width and dtype instead of tuning at run time.

The numbers come from what the compiler makes of the kernels for compute capability 9.0 (registers per thread, none
spilled below the widest rows) and from Little's law: some 25 KB per multiprocessor must be on their way from memory to
keep an H200 busy, which two tiles of 4096 bfloat16 values of two tensors are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton

FORWARD_WHOLE = 32768  # values of a row that one program of 32 warps holds
BACKWARD_WHOLE = 16384  # the gradients' sums, and two tensors, are held as well
SANDWICH_WHOLE = 8192  # twice as much of either
FORWARD_TILE, BACKWARD_TILE = 2048, 4096  # values of narrower rows that are taken together
FORWARD_LOOP, BACKWARD_LOOP = 16384, 8192  # of wider rows that are taken at once
INTERPRETED_TILE = 1 << 13  # in the interpreter a program costs tens of milliseconds, however few values it has
MAX_WIDTH = 1 << 20  # beyond, not one row per program fits the L2 cache


@dataclass(frozen=True)
class Tile:
    """`rows` rows of `block` columns, all of them where `block >= width`, in a program of `warps` warps.

    In a kernel that walks, `stages` tiles are on their way from memory at once, and the gain stays in registers or is
    read for each.
    """

    block: int
    rows: int
    warps: int
    stages: int = 1
    keeps_gain: bool = True


@cache
def forward_tile(width: int, device: int | None, whole: int = FORWARD_WHOLE) -> Tile:
    """16 or 32 values per thread; rows wider than `whole` are looped over.

    Args:
        device: index of the GPU, None in the interpreter.
    """
    block = triton.next_power_of_2(width)
    if block > whole:
        block = min(FORWARD_LOOP, whole)
        return Tile(block, 1, _warps(block, 512))
    rows = max(1, (INTERPRETED_TILE if device is None else FORWARD_TILE) // block)
    return Tile(block, rows, _warps(rows * block, 1024))


@cache
def backward_tile(width: int, read: int, gain: int, device: int | None, whole: int = BACKWARD_WHOLE) -> Tile:
    """16 values per thread, 32 of the widest; the next tile is fetched where it fits into shared memory.

    Args:
        read, gain: bytes per column of the tensors that are read, and of the gain.
    """
    block = triton.next_power_of_2(width)
    if block > whole:
        block = min(BACKWARD_LOOP, whole)
        return Tile(block, 1, _warps(block, 512))
    rows = max(1, (INTERPRETED_TILE if device is None else BACKWARD_TILE) // block)
    keeps_gain = block <= BACKWARD_WHOLE // 2
    fetched = rows * block * read + (0 if keeps_gain else block * gain) + 1024
    stages = 2 if fetched <= _shared_memory(device) else 1
    return Tile(block, rows, _warps(rows * block, 512, most=16), stages, keeps_gain)


@cache
def sandwich_backward_tile(width: int, read: int, device: int | None, whole: int = SANDWICH_WHOLE) -> Tile | None:
    """8 values per thread of each tensor, 16 of the widest; None where a row does not fit."""
    block = triton.next_power_of_2(width)
    if block > whole:
        return None
    rows = max(1, (INTERPRETED_TILE if device is None else BACKWARD_TILE) // block)
    stages = 2 if rows * block * read + 1024 <= _shared_memory(device) else 1
    return Tile(block, rows, _warps(rows * block, 256, most=16), stages)


def reduce_columns(device: int | None) -> int:
    """How many columns of partial sums a program sums: few, so that there are many programs."""
    return 2048 if device is None else 32


def programs(tile: Tile, tiles: int, device: int | None) -> int:
    """Of a kernel that walks over `tiles`: what a GPU runs at once, two of 8 warps or one of 16 per multiprocessor."""
    return min(tiles, _multiprocessors(device) * max(1, 16 // tile.warps))


def _warps(values: int, per_warp: int, most: int = 32) -> int:
    return min(most, max(4, values // per_warp))


@cache
def _multiprocessors(device: int | None) -> int:
    """Three in the interpreter, so that programs walk there too."""
    return 3 if device is None else torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _shared_memory(device: int | None) -> int:
    """Bytes that one program may have, all that is in its reach if it is alone on its multiprocessor."""
    return 1 << 16 if device is None else torch.cuda.get_device_properties(device).shared_memory_per_block_optin
