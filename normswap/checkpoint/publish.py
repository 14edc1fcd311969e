"""A destination folder that appears whole or not at all.

Everything is written into a hidden folder beside the destination, made durable, and renamed. A lock keeps a second run
off the same destination. What a killed run left behind the next one takes up, if it is the same, or clears.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from normswap.checkpoint.files import CONFIG, Checkpoint
from normswap.checkpoint.folder import check_inside
from normswap.checkpoint.journal import Journal, forget
from normswap.checkpoint.lock import Lock
from normswap.checkpoint.saving import sync
from normswap.errors import DestinationError

README = "README.md"
# transformers loads the base that it names, and not the weights beside it.
ADAPTER = "adapter_config.json"
# Weights in whatever form: they hold the unconverted model, and loaders would find them.
WEIGHT_SUFFIXES = frozenset(
    ".bin .ckpt .gguf .ggml .h5 .msgpack .npz .onnx .onnx_data .ot .pkl .pt .pth .safetensors .tflite".split()
)


class Staging:
    """`with Staging(destination, source) as folder:` publishes `folder` as `destination` when the block ends well.

    On any exception the destination is as it was. What was finished of the partial folder stays where the run was
    interrupted (killed, Ctrl-C, a full disk), for the same run to go on from; after a refusal nothing stays.

    Args:
        destination: the folder to make; missing parents are made too.
        source: the folder that is read; the destination may not be it, hold it or lie in it.
        overwrite: replace a model folder that stands at the destination, after the new one is complete.

    Attributes:
        journal: what was finished before of the run that `resuming` named, and to be told what is.

    Raises:
        DestinationError: on entry, when the destination may not or cannot be written; on exit, when publishing fails.
    """

    def __init__(self, destination: str | Path, source: str | Path, overwrite: bool = False):
        # Resolved, so that replacing a link replaces what it leads to and the checks below see real places.
        self.destination = Path(destination).resolve()
        self._source = Path(source).resolve()
        self._overwrite = overwrite
        self._of: Mapping[str, Any] | None = None
        self.journal = Journal()

    def resuming(self, of: Mapping[str, Any]) -> Staging:
        """The same, taking up what an earlier run left whose files follow from the same: `of`, as JSON has it."""
        self._of = of
        return self

    def __enter__(self) -> Path:
        self.check()
        self._made_parents = [p for p in self.destination.parents if not p.exists()]
        try:
            self.destination.parent.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(self.destination.with_name(f".{self.destination.name}.normswap-lock"))
            if not self._lock.acquire():
                raise DestinationError(
                    f"{self.destination}: another run is writing it. Wait for that to end, or give another destination."
                )
        except BaseException as error:
            self._remove_parents()
            if isinstance(error, OSError):
                raise DestinationError(
                    f"{self.destination.parent}: expected a folder that can be written to: {error.strerror}."
                ) from error
            raise
        try:
            self._clear_leftovers()
            self.check()
            self._folder = self._hidden("partial")
            if self._of is None:
                shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(exist_ok=True)
            if self._of is not None:
                self.journal = Journal.resume(self._folder, self._of)
        except BaseException:
            self._lock.release()
            self._remove_parents()
            raise
        return self._folder

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                self.publish()
        except BaseException as failed:
            error = failed
            raise
        finally:
            if self._of is not None and self.journal.finished and _interrupted(error):
                error.add_note(
                    f"{len(self.journal.finished)} finished files ({self.journal.bytes_finished / 2**30:.2f} GiB) are "
                    f"kept in {self._folder}: the same command goes on from there. Remove that folder to give them up."
                )
            else:
                # Gone by now if it was published.
                shutil.rmtree(self._folder, ignore_errors=True)
            self._lock.release()
            self._remove_parents()

    def publish(self) -> None:
        """Make the partial folder durable and give it its name; the end of the `with` block calls this."""
        try:
            forget(self._folder)
            sync_tree(self._folder)
            old = self._set_aside()
            try:
                os.rename(self._folder, self.destination)
            except BaseException:
                if old is not None:
                    os.rename(old, self.destination)
                raise
            sync(self.destination.parent)
        except OSError as error:
            raise DestinationError(
                f"{self.destination}: cannot be published: {error.strerror}. It is as it was; free the name or the "
                "space and run again."
            ) from error
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)

    def check(self) -> None:
        """Raise DestinationError where the destination may not be written."""
        there, source = self.destination, self._source
        if there == source or there.is_relative_to(source) or source.is_relative_to(there):
            raise DestinationError(
                f"{there}: expected a folder apart from the source {source}, found the same or one inside the other; "
                "the source is never written to. Give another destination."
            )
        if not os.path.lexists(there):
            return
        if not self._overwrite:
            raise DestinationError(f"{there}: exists. Give another destination, or overwrite it explicitly.")
        if not there.is_dir() or (any(there.iterdir()) and not (there / CONFIG).is_file()):
            raise DestinationError(
                f"{there}: expected a model folder with {CONFIG} to overwrite, found something else. Move it away "
                "yourself, or give another destination."
            )

    def _hidden(self, what: str) -> Path:
        return self.destination.with_name(f".{self.destination.name}.normswap-{what}")

    def _set_aside(self) -> Path | None:
        if not (self._overwrite and self.destination.exists()):
            return None
        old = self._hidden("old")
        os.rename(self.destination, old)
        return old

    def _clear_leftovers(self) -> None:
        """An old destination that a run set aside which was killed then."""
        old = self._hidden("old")
        if old.exists() and not self.destination.exists():
            os.rename(old, self.destination)
        shutil.rmtree(old, ignore_errors=True)

    def _remove_parents(self) -> None:
        """Take away the parents that were made, if nothing came to stand in them."""
        for parent in self._made_parents:
            try:
                parent.rmdir()
            except OSError:
                return


def _interrupted(error: BaseException | None) -> bool:
    """Whether a run that ended so could be gone on with: it was stopped, or the disk was full or failed."""
    return isinstance(error, KeyboardInterrupt | SystemExit | MemoryError | OSError | DestinationError)


def check_space(folder: Path, bytes_needed: int) -> None:
    """Raise DestinationError when the file system of `folder` has less than `bytes_needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < bytes_needed:
        raise DestinationError(
            f"{folder}: the result needs {bytes_needed / 2**30:.2f} GiB ({bytes_needed} bytes), {free / 2**30:.2f} GiB "
            f"({free} bytes) are free. Free some, or give a destination on another disk."
        )


def copy_side_files(source: Checkpoint, folder: Path) -> list[str]:
    """Copy all that belongs to a model beside its weights, byte for byte: tokenizer, settings, code, licence.

    Written elsewhere and not copied: `config.json`, the weights and index that were read, and the model card.
    Subfolders are copied with the same rules, except hidden ones. Raises SourceError for a link out of the source.

    Returns:
        Paths relative to the source of what was left behind: weights of another form, settings of an adapter that is
        among them, and links that lead nowhere.
    """
    elsewhere = {CONFIG, README, *source.read_files}
    skipped: list[str] = []
    for path in sorted(source.folder.rglob("*")):
        relative = path.relative_to(source.folder)
        if path.is_dir() and not path.is_symlink() or str(relative) in elsewhere:
            continue
        if any(part.startswith(".") for part in relative.parent.parts):
            continue
        if not path.is_file() or _holds_weights(path) or path.name == ADAPTER:
            skipped.append(str(relative))
            continue
        check_inside(source.folder, path)
        (folder / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / relative)
    return skipped


def _holds_weights(path: Path) -> bool:
    return path.suffix in WEIGHT_SUFFIXES or any(path.name.endswith(f"{s}.index.json") for s in WEIGHT_SUFFIXES)


def sync_tree(folder: Path, deep: bool = True) -> None:
    """Have a folder on the disk, with all that is in it (`deep`) or its own entries alone."""
    for path in folder.rglob("*") if deep else ():
        sync(path)
    sync(folder)
