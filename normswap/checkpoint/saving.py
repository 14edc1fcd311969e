"""Files that are on the disk, and safetensors files with the permissions that any other new file would have."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write `tensors` to `path`. The library leaves a file that its owner alone can read; here the umask decides.

    Raises:
        OSError, SafetensorError: it cannot be written.
    """
    with open(path, "wb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    save_file(dict(tensors), path, metadata=metadata)
    os.chmod(path, mode)


def sync(path: Path) -> None:
    """Have a file, or a folder's own entries, on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
