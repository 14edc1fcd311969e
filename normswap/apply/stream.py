"""A plan applied to a checkpoint's files, shard by shard, in memory that does not grow with the model.

Each shard becomes a file of the same name with its tensors in the same order. What no edit touches shares the source's
blocks where the file system can have that, and is copied elsewhere. What an edit touches is read, changed in float64,
rounded once to the stored dtype and written in its place, a few rows at a time where rows do not meet, by several
threads. Otherwise memory holds groups of tensors (a parameter, or the few, all experts of one projection, that
transformers merges into one), no more at a time than the largest takes. A group whose tensors lie in several shards is
computed once for each of them, so that nothing waits for a later shard.
"""

from __future__ import annotations

import gc
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from normswap.apply.crew import Crew, default_workers
from normswap.apply.keeper import Keeper
from normswap.apply.layout import Job, Layout, WriteSummary, lay_out
from normswap.apply.shard import Common, ShardFile, check_written, cost_of
from normswap.apply.values import Values
from normswap.checkpoint.files import INDEX, Checkpoint
from normswap.checkpoint.journal import Journal
from normswap.checkpoint.keymap import KeyMap
from normswap.errors import SourceError
from normswap.pages import give_back
from normswap.planning.plans import Plan

Progress = Callable[[int, int], None]

# What tasks may take together even where no single one needs it.
_MEMORY = 128 * 2**20
# Bytes of the source that stay in memory: of a weight that is edited, the bias beside it is made as well.
_KEPT = 128 * 2**20
# Written bytes after which holes in the heap are given back: that is to look through it, and costs new pages.
_TRIM = 2**30


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
    journal: Journal | None = None,
    workers: int | None = None,
) -> WriteSummary:
    """Write the shards and the index of the edited checkpoint into the existing folder `destination`.

    Args:
        source: the checkpoint to read.
        keymap: its mapping onto the unedited model.
        plan: the edits; only those of tensors matter here.
        destination: a folder without weights, but for those files that the journal calls finished.
        dtype: stored dtype of all real tensors; None keeps each one's own. Integers, booleans and 8-bit floats stay.
        progress: called with (bytes written, bytes in all), from several threads, one at a time.
        journal: what is finished already; is told of each file, and of what undoing the plan will need.
        workers: threads that read, compute and write; one more per file hashes it. None: `default_workers()`.

    Raises:
        PlanError: the plan does not fit the checkpoint (before anything is written), or a value does not fit `dtype`.
        DestinationError: a file exists, cannot be written, or does not read back as planned.
        SourceError: a file of the source changed meanwhile.
    """
    plan.check_complete()
    journal = journal or Journal()
    layout = lay_out(source, keymap, plan, dtype)
    values = Values(source, keymap, plan)
    for names in layout.copies:
        values.check_copies(names)
    before, written = source.states(), _Progress(layout.summary.bytes_after, progress)
    _write_shards(source, layout, values, destination, journal, written, workers or default_workers())
    if source.states() != before:
        raise SourceError(
            f"{source.folder}: the weights changed while they were read. Something else is writing to them: wait for "
            "that to end and run again."
        )
    removed = Keeper()
    values.keeping(removed).keep_removed(layout)
    journal.keep(removed.tensors(), removed.why_not)
    if source.index is not None:
        _write_index(destination / INDEX, source.index, layout)
    return replace(layout.summary, hashes={shard.name: journal.finished[shard.name].sha256 for shard in source.shards})


def _write_shards(
    source: Checkpoint,
    layout: Layout,
    values: Values,
    destination: Path,
    journal: Journal,
    written: _Progress,
    workers: int,
) -> None:
    jobs = _jobs_by_shard(layout)
    costs = [cost_of(job, source, layout.shards[name]) for name, listed in jobs.items() for job in listed]
    begun: list[ShardFile] = []
    common = Common(source, values, destination, journal, written, source.can_share(destination))
    try:
        with source.keeping(_KEPT), _one_thread_each(), Crew(workers, max([_MEMORY, *costs])) as crew:
            for shard in source.shards:
                entries, path = layout.shards[shard.name], destination / shard.name
                if shard.name in journal.finished:
                    check_written(path, entries)
                    written(sum(entry.bytes_after for entry in entries))
                    continue
                file = ShardFile(common, shard, entries, jobs[shard.name])
                begun.append(file)
                for task in file.open():
                    while not file.is_near(task, seconds=0.1):
                        crew.check()
                    crew.give(task.cost, task.run)
    finally:
        for file in begun:
            file.close()
        give_back()  # before anything else takes memory


def _jobs_by_shard(layout: Layout) -> dict[str, list[Job]]:
    """What is computed for each file."""
    found: dict[str, list[Job]] = {name: [] for name in layout.shards}
    for job in layout.jobs:
        for name in dict.fromkeys(layout.summary.tensors[key].shard for key in job.keys):
            found[name].append(job)
    return found


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Tasks run beside each other as it is: torch is not to share each out among threads again.

    Nor is Python to look through all that transformers has imported for garbage each time some thousand buffers went.
    """
    threads, collects = torch.get_num_threads(), gc.isenabled()
    torch.set_num_threads(1)
    gc.disable()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if collects:
            gc.enable()


class _Progress:
    """Adds up what threads have written, and keeps their memory from growing with it."""

    def __init__(self, total: int, report: Progress | None):
        self._done, self._total, self._report = 0, total, report
        self._lock = threading.Lock()

    def __call__(self, count: int) -> None:
        with self._lock:
            if self._done // _TRIM < (self._done + count) // _TRIM:
                give_back()
            self._done += count
            if self._report is not None:
                self._report(self._done, self._total)


def _write_index(path: Path, index: dict[str, Any], layout: Layout) -> None:
    """The source's index with the new places and sizes, in the form that save_pretrained writes."""
    summary = layout.summary
    metadata = {**index.get("metadata", {}), "total_size": summary.bytes_after}
    if isinstance(metadata.get("total_parameters"), int):
        metadata["total_parameters"] += summary.parameters_added - summary.parameters_removed
    weight_map = {entry.key: name for name, entries in layout.shards.items() for entry in entries}
    text = json.dumps({**index, "metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"
    path.write_text(text, encoding="utf-8")
