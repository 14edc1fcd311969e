"""SHA-256 of files, read in pieces that stay in a core's cache."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable

_PIECE = 2**20


def hash_from(fd: int, ends: Iterable[int]) -> str:
    """SHA-256 of an open file from its beginning, up to each of the growing `ends` (bytes) as they become known."""
    digest, buffer, at = hashlib.sha256(), bytearray(_PIECE), 0
    view = memoryview(buffer)
    for end in ends:
        while at < end:
            count = os.preadv(fd, [view[: min(_PIECE, end - at)]], at)
            if count == 0:
                break
            digest.update(view[:count])
            at += count
    return digest.hexdigest()
