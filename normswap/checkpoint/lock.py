"""A file that one process holds at a time."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


class Lock:
    """Held from `acquire` to `release`, or to the end of the process; then the file is gone, or means nothing."""

    def __init__(self, path: Path):
        self.path = path

    def acquire(self) -> bool:
        """Whether it is ours now; another process has it otherwise. Raises OSError where no file can be made."""
        while True:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self._descriptor)
                return False
            # The one before may have removed the file between our opening and locking it; then the lock is of nothing.
            if self.path.exists() and os.path.samestat(os.fstat(self._descriptor), self.path.stat()):
                return True
            os.close(self._descriptor)

    def release(self) -> None:
        self.path.unlink(missing_ok=True)
        os.close(self._descriptor)
