"""Checkpoints of a training that are there whole or not at all, whatever moment the run was killed in.

One is written in `PARTIAL`, made durable, listed with the sizes of its files, and renamed.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from transformers.trainer_utils import rotate_checkpoints

from normswap.checkpoint.publish import sync_tree

#: where a checkpoint is until it is whole
PARTIAL = ".partial"
_SIZES = "sizes.json"


def keep(run: Path, name: str, limit: int | None) -> None:
    """Give the checkpoint `name` in `PARTIAL` its place in `run`, and remove the oldest ones beyond `limit`."""
    made, final = run / PARTIAL / name, run / name
    sizes = {str(path.relative_to(made)): path.stat().st_size for path in made.rglob("*") if path.is_file()}
    (made / _SIZES).write_text(json.dumps(sizes, indent=1), encoding="utf-8")
    sync_tree(made)
    shutil.rmtree(final, ignore_errors=True)
    os.rename(made, final)
    sync_tree(run, deep=False)
    shutil.rmtree(run / PARTIAL)
    rotate_checkpoints(str(run), limit)


def last(run: Path) -> Path | None:
    """The newest whole checkpoint of a run. What is newer, and not whole, is removed."""
    shutil.rmtree(run / PARTIAL, ignore_errors=True)
    for folder in sorted(run.glob("checkpoint-*"), key=step, reverse=True):
        if _whole(folder):
            return folder
        shutil.rmtree(folder)
    return None


def step(folder: Path) -> int:
    """The optimizer steps behind a checkpoint."""
    return int(folder.name.rpartition("-")[2])


def _whole(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / _SIZES).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False
