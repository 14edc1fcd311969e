"""A file that several threads write in any order, and that is hashed from its beginning as far as it is complete."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from normswap.checkpoint.hashing import hash_from
from normswap.checkpoint.saving import begin_writeback

# Written bytes after which the disk is set to work, so that little is left for the sync at the end.
_BEHIND = 64 * 2**20


class Output:
    """A new file of `size` bytes.

    What is hashed is what the file holds, read back, rather than what was meant; just written, it comes from memory.

    Attributes:
        path: where it is.
        fd: its descriptor, to write to at offsets under `lock`; `written` has to be told.
        lock: one thread writes at a time. Others would wait for it in the kernel, which spins meanwhile.
    """

    def __init__(self, path: Path, size: int):
        self.path, self.size = path, size
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        os.ftruncate(self.fd, size)
        self.lock = threading.Lock()
        self._front, self._ahead, self._begun = 0, {}, 0
        self._closed = False
        self._changed = threading.Condition()
        self._hash: str | BaseException | None = None
        self._hasher = threading.Thread(target=self._follow, name=f"hash {path.name}", daemon=True)
        self._hasher.start()

    def write(self, data: bytes | np.ndarray, offset: int) -> None:
        """Put `data` at `offset`."""
        view, done = memoryview(data), 0
        with self.lock:
            while done < len(view):
                # One call writes at most 2 GiB.
                done += os.pwrite(self.fd, view[done:], offset + done)
        self.written(offset, len(view))

    def written(self, offset: int, count: int) -> None:
        """`count` bytes from `offset` on are there."""
        with self._changed:
            self._ahead[offset] = offset + count
            while self._front in self._ahead and self._ahead[self._front] > self._front:
                self._front = self._ahead.pop(self._front)
            self._changed.notify_all()
            begun, behind = self._begun, self._front - self._begun
            if behind < _BEHIND:
                return
            self._begun = self._front
        begin_writeback(self.fd, begun, behind)

    def finish(self) -> str:
        """Have all of it on the disk; its SHA-256. Only after everything was written."""
        self._hasher.join()
        if isinstance(self._hash, BaseException):
            raise self._hash
        os.fsync(self.fd)
        self.close()
        return self._hash

    def close(self) -> None:
        """Stop, finished or not; the file stays as it is."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        self._hasher.join()
        os.close(self.fd)

    def _follow(self) -> None:
        try:
            self._hash = hash_from(self.fd, self._fronts())
        except OSError as error:
            self._hash = error

    def _fronts(self) -> Iterator[int]:
        """How far the file is complete, each time that is further."""
        front = 0
        while front < self.size:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._front > front)  # noqa: B023
                if self._closed:
                    return
                front = self._front
            yield front
