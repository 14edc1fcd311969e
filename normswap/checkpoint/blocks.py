"""Files read past the page cache, 4 MiB at a time, of which the last are kept.

A direct read (`O_DIRECT`) goes from the disk to the process's memory. Beside one by way of the page cache it spares a
processor the copy and the new pages, and a disk is asked for as much at once as it takes. What the page cache holds
anyhow, and what is small, is read from there.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from normswap.checkpoint.direct import AT_ONCE, BLOCK, Buffer, Buffers

# Bytes below which a read is not worth a whole block.
_SMALL = 256 * 2**10
# Blocks that stay: the next read begins where the last one ended.
_KEPT = 4


class Blocks:
    """The blocks of files that were read last; several threads may use it."""

    def __init__(self):
        self._most, self._buffers = _KEPT, Buffers()
        self._blocks: OrderedDict[tuple[int, int], _Block] = OrderedDict()  # by file and number, longest unused first
        self._files: dict[int, int | None] = {}
        self._lock = threading.Lock()

    def read_into(self, view: np.ndarray, fd: int, start: int) -> int:
        """Fill `view` with the bytes of an open file from `start` on.

        Returns:
            How many there were: fewer than asked for where the file ends.

        Raises:
            OSError: the disk cannot be read.
        """
        done, large = 0, len(view) >= _SMALL
        while done < len(view):
            number, first = divmod(start + done, AT_ONCE)
            part = view[done:][: AT_ONCE - first]
            with self._block(fd, number, large) as block:
                count = os.preadv(fd, [part], start + done) if block is None else block.copy_to(part, first)
            if count == 0:
                break
            done += count
        return done

    @contextmanager
    def keeping(self, most: int) -> Iterator[None]:
        """Within, keep that many blocks."""
        before, self._most = self._most, most
        try:
            yield
        finally:
            with self._lock:
                self._most = before
                self._make_room()
                self._buffers.drop()

    def close(self) -> None:
        """Let go of all blocks. The files that were read stay open."""
        for direct in self._files.values():
            if direct is not None:
                os.close(direct)
        self._files.clear()
        self._blocks.clear()

    @contextmanager
    def _block(self, fd: int, number: int, read: bool) -> Iterator[_Block | None]:
        """A block, if it is there or is to be read; None: the file is to be read as any other."""
        with self._lock:
            if fd not in self._files:
                self._files[fd] = _reopened(fd)
            direct, key = self._files[fd], (fd, number)
            block = self._blocks.get(key)
            new = block is None and read and direct is not None
            if new:
                block = self._blocks[key] = _Block(self._buffers.take())
            if block is not None:
                block.users += 1
                self._blocks.move_to_end(key)
        if block is None:
            yield None
            return
        try:
            if new:
                block.read(direct, number)
            yield block
        finally:
            with self._lock:
                block.users -= 1
                self._make_room()

    def _make_room(self) -> None:
        unused = [key for key, block in self._blocks.items() if not block.users]
        for key in unused[: max(0, len(self._blocks) - self._most)]:
            self._buffers.give_back(self._blocks.pop(key).buffer)


class _Block:
    """`AT_ONCE` bytes of a file, or those up to its end."""

    def __init__(self, buffer: Buffer):
        self.buffer, self.users = buffer, 0
        self._count, self._error = 0, None
        self._read = threading.Event()

    def read(self, direct: int, number: int) -> None:
        """Read them; whoever asks for them meanwhile waits."""
        try:
            view = self.buffer.at(0, AT_ONCE)
            while count := os.preadv(direct, [view[self._count :]], number * AT_ONCE + self._count):
                self._count += count
                if self._count == AT_ONCE or self._count % BLOCK:  # all, or where the file ends
                    break
        except OSError as error:
            self._error = error
        finally:
            self._read.set()

    def copy_to(self, view: np.ndarray, first: int) -> int:
        """Fill `view` with the bytes from `first` on; how many there were. Raises OSError."""
        self._read.wait()
        if self._error is not None:
            raise self._error
        count = max(0, min(len(view), self._count - first))
        # unlike a memoryview's, numpy's copy lets other threads run
        np.copyto(view[:count], self.buffer.at(first, count))
        return count


def _reopened(fd: int) -> int | None:
    """The same file, open for direct reads; None where the page cache has it, or the system no such thing."""
    if not hasattr(os, "O_DIRECT") or mostly_cached(fd, os.fstat(fd).st_size):
        return None
    try:
        direct = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return None
    try:
        os.preadv(direct, [Buffer().at(0, BLOCK)], 0)
    except OSError:
        os.close(direct)
        return None
    return direct


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
