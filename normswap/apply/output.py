"""A file that several threads write in any order, and that is hashed from its beginning as far as it is complete."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from normswap.checkpoint.direct import AT_ONCE, Buffer, Buffers, DirectFile
from normswap.checkpoint.sharing import share, whole_blocks

# Buffers in use, of all files, beyond which what waits longest for its turn to be hashed is read back from the file.
_MOST = 32
# Bytes that are read back at once: they stay in a core's cache.
_PIECE = 2**20
# Bytes behind what was hashed that are written while it goes on: less than those buffers hold.
_NEAR = 96 * 2**20


class _Written(NamedTuple):
    """A span that was written: where it ends, and the buffer that still holds it."""

    end: int
    buffer: Buffer | None


class Output:
    """A new file of `size` bytes, at `path`; `buffers` are shared with others."""

    def __init__(self, path: Path, size: int, buffers: Buffers):
        self.path, self.size = path, size
        self._file, self._buffers = DirectFile(path, size), buffers
        # not hashed yet, by where each begins
        self._ahead: dict[int, _Written] = {}
        self._closed, self._hashed = False, 0
        self._changed = threading.Condition()
        self._hash: str | None = None
        self._failed: OSError | None = None
        self._hasher = threading.Thread(target=self._follow, name=f"hash {path.name}", daemon=True)
        self._hasher.start()

    def write(self, data: bytes | np.ndarray, offset: int) -> None:
        """Put `data` at `offset`."""
        data = np.frombuffer(data, np.uint8)

        def fill(view: np.ndarray, at: int) -> None:
            # unlike a memoryview's, numpy's copy lets other threads run
            np.copyto(view, data[at - offset :][: len(view)])

        self.fill(range(offset, offset + len(data)), fill)

    def fill(self, span: range, fill: Callable[[np.ndarray, int], None]) -> None:
        """Write the bytes in `span`: `fill(view, at)` is to fill `view` with those from the offset `at` on."""
        begin = span.start
        while begin < span.stop:
            end = min(span.stop, begin - begin % AT_ONCE + AT_ONCE)
            buffer = self._buffers.take()
            view = buffer.at(begin, end - begin)
            fill(view, begin)
            self._file.write(view, begin)
            self._note(begin, _Written(end, buffer))
            begin = end

    def share(self, span: range, fd: int, start: int) -> range:
        """Have the bytes in `span` be those of another file from `start` on, without a copy; those that can be.

        Returns:
            Which ones: a part of `span`, perhaps none.
        """
        whole = whole_blocks(span, start)
        behind = start + whole.start - span.start
        if not whole or not share(self._file.fd, whole.start, len(whole), fd, behind):
            return range(span.start, span.start)
        self._note(whole.start, _Written(whole.stop, None))
        return whole

    def _note(self, begin: int, written: _Written) -> None:
        with self._changed:
            self._ahead[begin] = written
            if self._buffers.used > _MOST:
                held = [at for at, span in self._ahead.items() if span.buffer is not None]
                if held:
                    end, buffer = self._ahead[max(held)]
                    self._ahead[max(held)] = _Written(end, None)
                    self._buffers.give_back(buffer)
            self._changed.notify_all()

    def is_near(self, begin: int, seconds: float) -> bool:
        """Whether an offset lies so little behind what is hashed that a buffer can wait for its turn.

        Waits that long for it to be. It is where hashing failed, too, of which `finish` tells.
        """
        with self._changed:
            return self._changed.wait_for(lambda: self._failed is not None or begin - self._hashed <= _NEAR, seconds)

    def finish(self) -> str:
        """Have all of it on the disk; its SHA-256. Only after everything was written."""
        self._hasher.join()
        if self._failed is not None:
            raise self._failed
        self._file.sync()
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
        self._file.close()

    def _follow(self) -> None:
        digest, front = hashlib.sha256(), 0
        try:
            while front < self.size:
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or front in self._ahead)  # noqa: B023
                    if self._closed:
                        return
                    end, buffer = self._ahead.pop(front)
                if buffer is None:
                    for piece in pieces_of(self._file.fd, front, end):
                        digest.update(piece)
                else:
                    digest.update(buffer.at(front, end - front))
                    self._buffers.give_back(buffer)
                with self._changed:
                    self._hashed = front = end
                    self._changed.notify_all()
            self._hash = digest.hexdigest()
        except OSError as error:
            with self._changed:
                self._failed = error
                self._changed.notify_all()


def pieces_of(fd: int, start: int, end: int) -> Iterator[memoryview]:
    """The bytes of an open file from `start` to `end`, or to where it ends; each piece is gone with the next."""
    view = memoryview(bytearray(_PIECE))
    while start < end:
        count = os.preadv(fd, [view[: min(_PIECE, end - start)]], start)
        if count == 0:
            return
        yield view[:count]
        start += count
