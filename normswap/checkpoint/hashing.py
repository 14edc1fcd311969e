"""SHA-256 of files, read in pieces that stay in a core's cache."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator

_PIECE = 2**20


def pieces_of(fd: int, start: int, end: int) -> Iterator[memoryview]:
    """The bytes of an open file from `start` to `end`, or to where it ends; each piece is gone with the next."""
    view = memoryview(bytearray(_PIECE))
    while start < end:
        count = os.preadv(fd, [view[: min(_PIECE, end - start)]], start)
        if count == 0:
            return
        yield view[:count]
        start += count


def hash_of(fd: int) -> str:
    """SHA-256 of an open file."""
    digest = hashlib.sha256()
    for piece in pieces_of(fd, 0, os.fstat(fd).st_size):
        digest.update(piece)
    return digest.hexdigest()
