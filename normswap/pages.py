"""Memory that does not grow with what passes through it.

What stays must not lie among the large buffers that come and go while tensors are edited: each would leave a hole just
too small for the next one. So it lies in pages of its own, and what holes there are go back to the system.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap

import numpy as np
import torch

_HUGE = 2 * 2**20  # what the page tables of x86-64 and arm64 can map at once


def huge(count: int) -> np.ndarray:
    """`count` bytes that begin at a multiple of 2 MiB, in pages of that size where the system has them.

    A disk is asked for what lies together in memory in one request: of small pages, which lie anywhere, it takes eight
    for 4 MiB. And a large page is mapped once.
    """
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory = mmap.mmap(-1, count + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel built without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    else:
        memory = mmap.mmap(-1, count + _HUGE)
    found = np.frombuffer(memory, np.uint8)
    return found[-found.ctypes.data % _HUGE :][:count]


def empty_apart(shape: torch.Size | list[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of zeros."""
    size = torch.Size(shape).numel()
    if not size:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(mmap.mmap(-1, size * dtype.itemsize), dtype=dtype).reshape(shape)


def apart(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A copy in `dtype`."""
    return empty_apart(tensor.shape, dtype).copy_(tensor)


def give_back() -> None:
    """Return what is free inside the heap to the system, where the C library can (glibc's `malloc_trim`)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return
