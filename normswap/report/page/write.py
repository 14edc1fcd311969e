"""Pages as files: where one may be written, and how."""

from __future__ import annotations

from pathlib import Path

from normswap.errors import DestinationError
from normswap.report.findings.gather import of_folder
from normswap.report.findings.model import Findings
from normswap.report.page.page import page


def write_report(folder: str | Path, path: str | Path) -> Path:
    """Write the report of a folder that `convert` or `finetune` made to `path`, as one HTML file.

    Raises:
        SourceError: the folder is none that normswap wrote, or its record is damaged.
        DestinationError: `path` lies in it, or cannot be written.
    """
    check_place(path, folder)
    return write_page(of_folder(folder), path)


def check_place(path: str | Path, *folders: str | Path) -> None:
    """Raise DestinationError where a page cannot be written to `path`, or would become part of one of `folders`."""
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():
        found = "it is a folder" if path.is_dir() else f"{path.parent} is no folder"
        raise DestinationError(f"the report cannot be written to {path}: {found}. Name a file in a folder that exists.")
    for folder in folders:
        if Path(folder).resolve() in path.resolve().parents:
            raise DestinationError(
                f"the report cannot be written to {path}: {folder} is the checkpoint, which stays as it is. Name "
                f"a file outside of it."
            )


def write_page(found: Findings, path: str | Path) -> Path:
    """Write the page of `found` to `path`. Raises DestinationError where that is not possible."""
    text = page(found)
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise DestinationError(
            f"the report cannot be written to {path}: {error.strerror}. Name another file."
        ) from error
    return Path(path)
