"""A plan applied to a checkpoint's files, shard by shard, in memory that does not grow with the model.

Each shard becomes a file of the same name with its tensors in the same order. What no edit touches is copied by the
kernel. What an edit touches is read, changed in float64, rounded once to the stored dtype and written in its place.
Memory holds one group of tensors at a time: a parameter, or the few (all experts of one projection) that transformers
merges into one. A group whose tensors lie in several shards is computed once for each of them, so that nothing waits in
memory for a later shard.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from normswap.apply.keeper import Keeper
from normswap.apply.layout import Layout, TensorChange, WriteSummary, lay_out
from normswap.apply.values import Values
from normswap.checkpoint.files import INDEX, Checkpoint, Shard
from normswap.checkpoint.header import CODES, render_header
from normswap.checkpoint.keymap import KeyMap
from normswap.errors import DestinationError, PlanError
from normswap.planning.plans import Plan

Progress = Callable[[int, int], None]


def preview(source: Checkpoint, keymap: KeyMap, plan: Plan, dtype: torch.dtype | None = None) -> WriteSummary:
    """What `write_tensors` would do, from headers alone. Raises PlanError as it would."""
    return lay_out(source, keymap, plan, dtype).summary


def write_tensors(
    source: Checkpoint,
    keymap: KeyMap,
    plan: Plan,
    destination: Path,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    keeper: Keeper | None = None,
) -> WriteSummary:
    """Write the shards and the index of the edited checkpoint into the existing folder `destination`.

    Args:
        source: the checkpoint to read.
        keymap: its mapping onto the unedited model.
        plan: the edits; only those of tensors matter here.
        destination: a folder without weights.
        dtype: stored dtype of all real tensors; None keeps each one's own. Integers, booleans and 8-bit floats stay.
        progress: called with (bytes written, bytes in all) after each tensor.
        keeper: collects what undoing the plan will need.

    Raises:
        PlanError: the plan does not fit the checkpoint (before anything is written), or a value does not fit `dtype`.
        DestinationError: a file exists, cannot be written, or does not read back as planned.
    """
    plan.check_complete()
    layout = lay_out(source, keymap, plan, dtype)
    values = Values(source, keymap, plan, keeper)
    for names in layout.copies:
        values.check_copies(names)
    written = _Progress(layout.summary.bytes_after, progress)
    hashes = {}
    for shard in source.shards:
        path = destination / shard.name
        try:
            with open(path, "xb+") as file:
                _write_shard(file.fileno(), source, shard, layout, values, written)
                os.fsync(file.fileno())
                file.seek(0)
                # What the file holds rather than what was meant; it comes from the page cache.
                hashes[shard.name] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DestinationError(
                f"{path}: cannot be written: {error.strerror}. Free the name or the space."
            ) from error
        _check_written(path, layout.shards[shard.name])
    if keeper is not None:
        values.keep_removed(layout)
    if source.index is not None:
        _write_index(destination / INDEX, source.index, layout)
    return replace(layout.summary, hashes=hashes)


class _Progress:
    def __init__(self, total: int, report: Progress | None):
        self._done, self._total, self._report = 0, total, report

    def add(self, count: int) -> None:
        self._done += count
        if self._report is not None:
            self._report(self._done, self._total)


def _write_shard(fd: int, source: Checkpoint, shard: Shard, layout: Layout, values: Values, written: _Progress) -> None:
    entries = layout.shards[shard.name]
    header = render_header(((entry.key, entry.dtype, entry.shape) for entry in entries), shard.metadata)
    _write(fd, header, 0)
    end = len(header)
    computed: dict[str, tuple[TensorChange, int]] = {}
    for entry in entries:
        if entry.what == "copied":
            source.copy_bytes(entry.key, fd, end)
            written.add(entry.bytes_after)
        elif entry.what == "cast":
            _put(fd, values.cast(entry.key, entry.dtype), entry, end, written)
        else:
            computed[entry.key] = entry, end
        end += entry.bytes_after
    for job in layout.jobs:
        here = [computed[key] for key in job.keys if key in computed]
        made = values.edited(job, here[0][0].dtype) if here else {}
        for entry, offset in here:
            _put(fd, made.pop(entry.key), entry, offset, written)


def _put(fd: int, tensor: torch.Tensor, entry: TensorChange, offset: int, written: _Progress) -> None:
    if (tuple(tensor.shape), tensor.dtype) != (entry.shape, entry.dtype):
        raise PlanError(
            f"{entry.key}: expected {entry.dtype} of shape {entry.shape} from its edits, found {tensor.dtype} of shape "
            f"{tuple(tensor.shape)}: an edit's shape depends on values. Leave it out of the plan."
        )
    _write(fd, tensor.contiguous().reshape(-1).view(torch.uint8).numpy(), offset)
    written.add(entry.bytes_after)


def _write(fd: int, data: bytes | np.ndarray, offset: int) -> None:
    # One call writes at most 2 GiB.
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)


def _check_written(path: Path, entries: list[TensorChange]) -> None:
    """Open the file as any reader would and compare it with the plan."""
    with safe_open(path, "pt") as file:
        found = {key: (file.get_slice(key).get_dtype(), tuple(file.get_slice(key).get_shape())) for key in file.keys()}
    expected = {entry.key: (CODES[entry.dtype], entry.shape) for entry in entries}
    for key in sorted(found.keys() | expected.keys()):
        if found.get(key) != expected.get(key):
            raise DestinationError(
                f"{path}: tensor {key}: expected {expected.get(key, 'nothing')}, found {found.get(key, 'nothing')} on "
                "reading back. Is something else writing there? Run again."
            )


def _write_index(path: Path, index: dict[str, Any], layout: Layout) -> None:
    """The source's index with the new places and sizes, in the form that save_pretrained writes."""
    summary = layout.summary
    metadata = {**index.get("metadata", {}), "total_size": summary.bytes_after}
    if isinstance(metadata.get("total_parameters"), int):
        metadata["total_parameters"] += summary.parameters_added - summary.parameters_removed
    weight_map = {entry.key: name for name, entries in layout.shards.items() for entry in entries}
    text = json.dumps({**index, "metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"
    path.write_text(text, encoding="utf-8")
