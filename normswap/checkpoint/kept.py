"""`normswap.undo`: what a conversion loses, kept beside the weights so that it can be undone.

A safetensors file under another name: loaders that read every `*.safetensors` of a folder pass it by.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from normswap.checkpoint.saving import save_tensors
from normswap.errors import DestinationError, SourceError

KEPT = "normswap.undo"


def save_kept(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, object]:
    """Write the file; what the record says of it. Raises DestinationError."""
    path = folder / KEPT
    try:
        save_tensors({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    except (OSError, SafetensorError) as error:
        raise DestinationError(f"{path}: cannot be written: {error}. Free the space and run again.") from error
    with open(path, "rb") as file:
        return {"file": KEPT, "bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def load_kept(folder: Path) -> dict[str, torch.Tensor]:
    """What was kept, in float64. Raises SourceError where the file is missing or damaged."""
    path = folder / KEPT
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise SourceError(
            f"{path} holds what undoing takes and cannot be read: {error}. Fetch it again, or convert the source again."
        ) from error
