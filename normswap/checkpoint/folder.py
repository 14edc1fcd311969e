"""A folder that came from anyone: what its entries are and where its links lead, before anything of it is read.

A link in an archive may point at a file of this machine that is nobody else's business, and a conversion would publish
a copy of it. So links lead to places inside the folder, or, as the Hub's cache has them, from a snapshot to the blobs
of its own repository.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from normswap.checkpoint.documents import shown
from normswap.errors import SourceError

#: of one JSON file at the top, which transformers may read whole; a tokenizer of 256k tokens has 35 MB
MAX_JSON_BYTES = 200_000_000
_KINDS = {stat.S_ISFIFO: "a named pipe", stat.S_ISSOCK: "a socket", stat.S_ISCHR: "a device", stat.S_ISBLK: "a device"}


def check_folder(folder: Path) -> None:
    """Refuse a folder with entries that lead out of it, or that are neither files nor folders.

    Looked at is what transformers reads: the folder and those in it, but for hidden ones. What lies deeper is looked at
    when it is copied. Links that lead nowhere are let be: whoever needs the file misses it.

    Raises:
        SourceError: naming the entry, and what to do.
    """
    for parent, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(parent, name)
            check_inside(folder, path)
            try:
                found = path.stat()
            except OSError:
                continue  # a link that leads nowhere, or round in a circle
            kind = next((what for is_it, what in _KINDS.items() if is_it(found.st_mode)), None)
            if kind is not None:
                raise SourceError(f"{shown(path)} is {kind}, expected files and folders alone. Take it away.")
            if name.endswith(".json") and Path(parent) == Path(folder) and found.st_size > MAX_JSON_BYTES:
                raise SourceError(
                    f"{shown(path)} has {found.st_size} bytes, expected at most {MAX_JSON_BYTES}, more than any "
                    "configuration or tokenizer has. Fetch it again, or take it away."
                )
        below = Path(parent) == Path(folder)
        folders[:] = [name for name in folders if below and not name.startswith(".")]


def check_inside(folder: Path, path: Path) -> None:
    """Refuse a link out of the folder. Raises SourceError."""
    if not path.is_symlink():
        return
    target = os.path.realpath(path)
    if not any(Path(target).is_relative_to(place) for place in _allowed(folder)):
        raise SourceError(
            f"{shown(path)} is a link to {shown(target)}, out of the folder. If you want that file to be "
            "part of the checkpoint, put a copy of it in the link's place."
        )


def _allowed(folder: Path) -> list[Path]:
    """Where links of a folder may lead: into it; of `snapshots/REVISION`, to the `blobs` beside `snapshots`."""
    real = Path(os.path.realpath(folder))
    if real.parent.name == "snapshots":
        return [real, real.parent.parent / "blobs"]
    return [real]
