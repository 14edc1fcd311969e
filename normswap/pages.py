"""Memory that does not grow with what passes through it.

What stays must not lie among the large buffers that come and go while tensors are edited: each would leave a hole just
too small for the next one. So it lies in pages of its own, and what holes there are go back to the system.
"""

from __future__ import annotations

import ctypes
import mmap

import torch


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
