"""Whether the weights in a folder are still those that were measured."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from normswap.checkpoint.record import Record
from normswap.report.findings.model import Advice

# Reading so many bytes takes some seconds.
_MOST = 2**31


def changed_since(folder: Path, record: Record) -> Iterator[Advice]:
    """What to know where files are others than those whose hashes the record holds."""
    hashes = record.raw.get("files", {})
    # a record may say anything; files of a checkpoint lie in its folder
    paths = {name: folder / name for name in hashes if Path(name).name == name}
    odd = [name for name, path in paths.items() if not path.is_file()]
    present = [path for path in paths.values() if path.is_file()]
    if sum(path.stat().st_size for path in present) > _MOST:
        what = "The weights were not compared with their recorded hashes, as reading them takes long."
        yield Advice(level="note", what=what, attempt="`sha256sum` compares them with the hashes below.")
    else:
        odd += [path.name for path in present if _digest(path) != hashes[path.name]]
    if odd:
        yield Advice(
            level="bad",
            what=f"{', '.join(odd)}: not what was measured: nothing here is of the weights as they are now.",
            attempt="If it was trained or edited since, `normswap verify SOURCE OUT --report FILE` measures it; "
            "if not, convert the source again.",
        )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
