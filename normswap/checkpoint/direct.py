"""Writing a file past the page cache, and the buffers that direct writes and reads need.

A write by way of the page cache costs a processor more than all else that a conversion does to the same bytes. A direct
write (`O_DIRECT`) goes from the process's memory to the disk. Its offset, length and address have to be multiples of a
block; the ends that are not go through the page cache.
"""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import numpy as np

from normswap.pages import huge

# What suits every disk and file system in use: 512 bytes on most disks, 4096 on the others.
BLOCK = 4096
# Read and written at once.
AT_ONCE = 4 * 2**20


class Buffer:
    """Memory for bytes of a file from one multiple of `AT_ONCE` up to the next."""

    def __init__(self):
        self._memory = huge(AT_ONCE)

    def at(self, offset: int, count: int) -> np.ndarray:
        """For `count` bytes from `offset` (bytes) on, which lie in it as they do in the file."""
        return self._memory[offset % AT_ONCE :][:count]


class Buffers:
    """Buffers for several threads, used again and again: new memory costs as much as what is done with it."""

    def __init__(self):
        self._free: list[Buffer] = []
        self._lock = threading.Lock()
        self.used = 0

    def take(self) -> Buffer:
        with self._lock:
            self.used += 1
            return self._free.pop() if self._free else Buffer()

    def give_back(self, buffer: Buffer) -> None:
        with self._lock:
            self.used -= 1
            self._free.append(buffer)

    def drop(self) -> None:
        """Give back the memory of those that nothing uses."""
        with self._lock:
            self._free.clear()


class DirectFile:
    """A new file of `size` bytes to be written at offsets, by several threads, each byte once.

    Attributes:
        fd: a descriptor that reads what was written.
    """

    def __init__(self, path: Path, size: int):
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        os.ftruncate(self.fd, size)
        try:
            self._direct = os.open(path, os.O_WRONLY | os.O_DIRECT)
        except (OSError, AttributeError):  # a file system, or a system, without
            self._direct = None

    def write(self, view: np.ndarray, offset: int) -> None:
        """Write the view that a `Buffer` gave for this `offset`. Raises OSError."""
        first = min(-offset % BLOCK, len(view))
        last = max(first, len(view) - (offset + len(view)) % BLOCK)
        last = first + self._past_the_cache(view[first:last], offset + first)
        for begin, end in ((0, first), (last, len(view))):
            while begin < end:
                # One call writes at most 2 GiB.
                begin += os.pwrite(self.fd, view[begin:end], offset + begin)

    def _past_the_cache(self, view: np.ndarray, offset: int) -> int:
        """How many bytes could be written so."""
        done = 0
        try:
            while self._direct is not None and done < len(view):
                done += os.pwrite(self._direct, view[done:], offset + done)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
        return done

    def sync(self) -> None:
        """Have all of it on the disk."""
        os.fsync(self.fd)

    def close(self) -> None:
        os.close(self.fd)
        if self._direct is not None:
            os.close(self._direct)
