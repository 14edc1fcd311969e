"""What of a conversion is finished, so that one that was killed goes on where it was.

A folder inside the one that is being written, gone before that is published. Its first line says of what conversion it
is; each further one, of a file that is complete and on the disk.

    .resume/journal.jsonl           {"of": {...}}
                                    {"file": "model-00001-of-00004.safetensors", "size": .., "sha256": .., ..}
    .resume/<file>.kept             what undoing will need of that file's tensors
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from normswap.checkpoint.saving import sync

FOLDER = ".resume"
_LINES = "journal.jsonl"


class Finished(BaseModel):
    """One file that is complete.

    Attributes:
        file: its name.
        size: in bytes.
        sha256: of it.
        why_not: why undoing is impossible, as far as this file's tensors say; None while it is not.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str
    size: int
    sha256: str
    why_not: str | None = None


class Journal:
    """The journal of the conversion that is written into `folder`; of None: one that is forgotten with the process.

    Attributes:
        finished: by file name.
    """

    def __init__(self, folder: Path | None = None):
        self._folder = folder
        self._kept: dict[str, torch.Tensor] = {}
        self._why_not: str | None = None
        self.finished: dict[str, Finished] = {}

    @classmethod
    def resume(cls, folder: Path, of: Mapping[str, Any]) -> Journal:
        """Take up what was finished of the same conversion, and clear away all else that is in `folder`.

        Args:
            of: all that the files' content follows from, as JSON can hold it.
        """
        journal = cls(folder)
        journal.finished = {} if of != (lines := _lines(folder))[0] else _complete(folder, lines[1:])
        for path in folder.iterdir():
            if path.name not in (FOLDER, *journal.finished):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        if journal.finished:
            for name, done in journal.finished.items():
                journal.keep(_kept(folder, name), done.why_not)
            with open(folder / FOLDER / _LINES, "a", encoding="utf-8") as file:
                file.write("\n")  # ends a line that was torn
        else:
            shutil.rmtree(folder / FOLDER, ignore_errors=True)
            (folder / FOLDER).mkdir()
            journal._append({"of": of})
        return journal

    def finish(self, done: Finished, kept: Mapping[str, torch.Tensor]) -> None:
        """`done` is on the disk, and `kept` is what undoing will need of it."""
        if self._folder is not None:
            if kept:
                with open(_kept_path(self._folder, done.file), "wb") as file:
                    file.write(save({key: value.contiguous() for key, value in kept.items()}))
                    file.flush()
                    os.fsync(file.fileno())
            sync(self._folder)
            self._append(done.model_dump())
        self.keep(kept, done.why_not)
        self.finished[done.file] = done

    def keep(self, kept: Mapping[str, torch.Tensor], why_not: str | None = None) -> None:
        """What undoing will need of tensors that no file has any more, or why that is impossible."""
        self._kept |= kept
        self._why_not = self._why_not or why_not

    @property
    def kept(self) -> dict[str, torch.Tensor]:
        """What undoing will need, of all finished files."""
        return self._kept

    @property
    def why_not(self) -> str | None:
        """Why undoing is impossible; None where it is not."""
        return self._why_not

    @property
    def bytes_finished(self) -> int:
        return sum(done.size for done in self.finished.values())

    def _append(self, line: Mapping[str, Any]) -> None:
        with open(self._folder / FOLDER / _LINES, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        sync(self._folder / FOLDER)


def forget(folder: Path) -> None:
    """Take the journal out of a folder that is about to be published."""
    shutil.rmtree(folder / FOLDER, ignore_errors=True)


def _lines(folder: Path) -> list[Any]:
    """What the journal's lines say; the first is None where it is not to be read. Torn lines are left out."""
    found: list[Any] = []
    try:
        lines = (folder / FOLDER / _LINES).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    if not found or not isinstance(found[0], dict):
        return [None]
    return [found[0].get("of"), *found[1:]]


def _complete(folder: Path, lines: list[Any]) -> dict[str, Finished]:
    finished = {}
    for line in lines:
        try:
            done = Finished.model_validate(line)
            if (folder / done.file).stat().st_size == done.size:
                finished[done.file] = done
        except (ValidationError, OSError):
            continue
    return finished


def _kept_path(folder: Path, name: str) -> Path:
    return folder / FOLDER / f"{name}.kept"


def _kept(folder: Path, name: str) -> dict[str, torch.Tensor]:
    try:
        return load_file(_kept_path(folder, name))
    except (FileNotFoundError, SafetensorError):
        return {}
