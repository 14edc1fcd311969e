"""Files read into the page cache a little before they are needed, which is left as it was found.

What was not in it before goes again behind the reader. Pages that stay would be of no use to a checkpoint that is
larger than memory, and new memory takes a processor longer to fill than the same again.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np

_STEP = 16 * 2**20
# Bytes that stay, from the last that was read ahead backwards: what is read twice, is so soon after.
_BEHIND = 384 * 2**20


def read_ahead(fds: Iterable[int]) -> Iterator[int]:
    """Have the kernel read open files into memory, some bytes with each step, where it takes such hints.

    Yields:
        How many bytes that was so far.
    """
    done, behind = 0, deque()
    for fd in fds if hasattr(os, "posix_fadvise") else ():
        size = os.fstat(fd).st_size
        stays = mostly_cached(fd, size)
        for start in range(0, size, _STEP):
            os.posix_fadvise(fd, start, _STEP, os.POSIX_FADV_WILLNEED)
            done += _STEP
            yield done
            if not stays:
                behind.append((fd, start))
            if len(behind) > _BEHIND // _STEP:
                old, at = behind.popleft()
                os.posix_fadvise(old, at, _STEP, os.POSIX_FADV_DONTNEED)


def mostly_cached(fd: int, size: int) -> bool:
    """Whether most of an open file is in the page cache; where the system does not say, it is taken to be."""
    try:
        with mmap.mmap(fd, size, prot=mmap.PROT_READ) as mapped:
            data, pages = np.frombuffer(mapped, np.uint8), np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
            at, found = ctypes.c_void_p(data.ctypes.data), ctypes.c_void_p(pages.ctypes.data)
            failed = ctypes.CDLL(None).mincore(at, ctypes.c_size_t(size), found)  # mincore(2): bit 0 of each page
            del data  # or the file could not be unmapped
    except (OSError, ValueError, AttributeError):
        return True
    return failed != 0 or bool((pages & 1).mean() > 0.5)
