"""Reading a checkpoint's files into the page cache, while Python imports what it takes to understand them."""

from __future__ import annotations

import os
import threading
from pathlib import Path

# As much as a fast disk reads meanwhile; and of what memory is free, a part that nothing else will miss.
_MOST = 4 * 2**30
_PART = 4
_AT_ONCE = 16 * 2**20


def read_ahead(folder: str | Path) -> None:
    """Have the kernel begin to read the weights in `folder`, in the order of their names, as far as it is a folder.

    A hint: it returns at once, and nothing depends on it. Imports no torch.
    """
    if hasattr(os, "posix_fadvise"):
        threading.Thread(target=_read, args=(Path(folder),), name="read ahead", daemon=True).start()


def _read(folder: Path) -> None:
    left = min(_MOST, _free_memory() // _PART)
    try:
        files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
        for path in files:
            if left <= 0 or not path.is_file():
                continue
            with path.open("rb") as file:
                size = min(left, os.fstat(file.fileno()).st_size)
                for start in range(0, size, _AT_ONCE):
                    os.posix_fadvise(file.fileno(), start, _AT_ONCE, os.POSIX_FADV_WILLNEED)
            left -= size
    except OSError:  # whoever opens the checkpoint will say what is wrong with it
        return


def _free_memory() -> int:
    """Bytes that are free, or that other files' pages would make room for; 0 where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)
