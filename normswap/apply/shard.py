"""One file of the result, as tasks that may run in any order; the last of them finishes the file."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open

from normswap.apply.keeper import Keeper
from normswap.apply.layout import Job, TensorChange
from normswap.apply.output import Output
from normswap.apply.values import Values
from normswap.checkpoint.direct import AT_ONCE, BLOCK, Buffers
from normswap.checkpoint.files import Checkpoint, Shard
from normswap.checkpoint.header import ALIGNMENT, CODES, render_header
from normswap.checkpoint.journal import Finished, Journal
from normswap.errors import DestinationError, PlanError

# A group that transformers merges is there as stored, merged, and taken apart again; any other, before and after.
_COPIES_MERGED, _COPIES = 3, 2


class Task(NamedTuple):
    """One step of making a file.

    Attributes:
        cost: bytes of memory that it takes.
        begin: the offset in the file at which it writes first.
        run: does it.
    """

    cost: int
    begin: int
    run: Callable[[], None]


@dataclass(frozen=True)
class Common:
    """What the files of one run have in common.

    Attributes:
        source: the checkpoint to read.
        values: computes its tensors' values.
        folder: where the files go.
        journal: is told of each file that is complete.
        written: called with the number of bytes that were written.
        shares: whether the files can share blocks with the source's.
        buffers: to read and write with.
    """

    source: Checkpoint
    values: Values
    folder: Path
    journal: Journal
    written: Callable[[int], None]
    shares: bool
    buffers: Buffers = field(default_factory=Buffers)


class ShardFile:
    """The file that is made of `shard`.

    Args:
        entries: its tensors, in the order of their data.
        jobs: what is computed for it.
    """

    def __init__(self, common: Common, shard: Shard, entries: Sequence[TensorChange], jobs: Sequence[Job]):
        self._common, self._shard, self._entries, self._jobs = common, shard, entries, jobs
        self._source, self._written = common.source, common.written
        self._keeper = Keeper()
        self._values = common.values.keeping(self._keeper)
        self._path = common.folder / shard.name
        self._output: Output | None = None
        self._left, self._lock = 0, threading.Lock()

    def open(self) -> list[Task]:
        """Make the file and write its header; what is to be done for the rest. `close` has to follow."""
        header = header_of(self._shard, self._entries, self._common.shares)
        with self._named():
            size = len(header) + sum(entry.bytes_after for entry in self._entries)
            self._output = Output(self._path, size, self._common.buffers)
            self._output.write(header, 0)
        steps = [*self._steps(len(header))] or [Task(0, 0, lambda: None)]
        self._left = len(steps)
        return [step._replace(run=lambda step=step: self._do(step)) for step in steps]

    def is_near(self, task: Task, seconds: float) -> bool:
        """Whether what the task makes is soon to be hashed; waits that long for it to be."""
        return self._output.is_near(task.begin, seconds)

    def close(self) -> None:
        """Where it was not finished: stop what runs on its own, and leave the file as it is."""
        if self._output is not None:
            self._output.close()

    def _do(self, step: Task) -> None:
        with self._named():
            step.run()
            with self._lock:
                self._left -= 1
                last = self._left == 0
            if last:
                self._finish()

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DestinationError(
                f"{self._path}: cannot be written: {error.strerror}. Free the name or the space."
            ) from error

    def _finish(self) -> None:
        digest = self._output.finish()
        check_written(self._path, self._entries)
        done = Finished(
            file=self._shard.name,
            size=self._output.size,
            sha256=digest,
            why_not=self._keeper.why_not,
        )
        self._common.journal.finish(done, self._keeper.tensors())

    def _steps(self, start: int) -> Iterator[Task]:
        """In the order of the file, as far as may be: what is made together, where the first of it stands."""
        jobs = {key: job for job in self._jobs for key in job.keys}
        starts = accumulate((entry.bytes_after for entry in self._entries), initial=start)
        places = {entry.key: (entry, at) for entry, at in zip(self._entries, starts, strict=False)}
        made = set()
        for entry, start in places.values():
            if entry.what == "copied":
                yield from self._copies(entry, start)
            elif entry.what == "cast":
                yield from self._casts(entry, start)
            elif (pieces := self._values.pieces(jobs[entry.key])) is not None:
                yield from self._pieces(jobs[entry.key], pieces, entry, start)
            elif entry.key not in made:
                job = jobs[entry.key]
                here = [places[key] for key in job.keys if key in places]
                made.update(job.keys)
                yield Task(self._cost(job), start, lambda job=job, here=here: self._whole(job, here))

    def _copies(self, entry: TensorChange, start: int) -> Iterator[Task]:
        end = start + entry.bytes_after
        for begin in (start, *range(start - start % AT_ONCE + AT_ONCE, end, AT_ONCE)):
            span = range(begin, min(begin - begin % AT_ONCE + AT_ONCE, end))
            yield Task(0, begin, lambda span=span: self._copy(entry, start, span))

    def _copy(self, entry: TensorChange, start: int, span: range) -> None:
        """The bytes of the file in `span`, of a tensor whose data begin at `start`; no more is read than has to be."""
        shared, place = range(span.start, span.start), self._source.place(entry.key)
        if self._common.shares and place is not None:
            shared = self._output.share(span, place.fd, place.offset + span.start - start)
        for left in (range(span.start, shared.start), range(shared.stop, span.stop)):
            self._output.fill(left, lambda view, at: self._source.read_into(view, entry.key, at - start))
        self._written(len(span))

    def _casts(self, entry: TensorChange, start: int) -> Iterator[Task]:
        pieces = self._values.rows_of(entry.key)
        cost = (entry.bytes_before + entry.bytes_after) // len(pieces)
        for rows in pieces:

            def run(rows=rows) -> None:
                self._put(self._values.cast(entry.key, entry.dtype, rows), entry, start, rows)

            yield Task(cost, start + self._row(entry, rows), run)

    def _pieces(self, job: Job, pieces: list[range | None], entry: TensorChange, start: int) -> Iterator[Task]:
        cost = _COPIES * entry.bytes_after // len(pieces)
        for rows in pieces:

            def run(rows=rows) -> None:
                made = self._values.edited(job, entry.dtype, rows)
                self._put(made[entry.key], entry, start, rows)

            yield Task(cost, start + self._row(entry, rows), run)

    def _whole(self, job: Job, here: list[tuple[TensorChange, int]]) -> None:
        made = self._values.edited(job, here[0][0].dtype)
        for entry, start in here:
            self._put(made.pop(entry.key), entry, start)

    def _put(self, tensor: torch.Tensor, entry: TensorChange, start: int, rows: range | None = None) -> None:
        """Write a tensor whose data begin at `start`, or some rows of it."""
        expected = entry.shape if rows is None else (len(rows), *entry.shape[1:])
        if (tuple(tensor.shape), tensor.dtype) != (expected, entry.dtype):
            raise PlanError(
                f"{entry.key}: expected {entry.dtype} of shape {expected} from its edits, found {tensor.dtype} of "
                f"shape {tuple(tensor.shape)}: an edit's shape depends on values. Leave it out of the plan."
            )
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        self._output.write(data, start + self._row(entry, rows))
        self._written(len(data))

    @staticmethod
    def _row(entry: TensorChange, rows: range | None) -> int:
        """Where in the tensor's data some rows of it begin (bytes)."""
        return 0 if rows is None else rows.start * (entry.bytes_after // entry.shape[0])

    def _cost(self, job: Job) -> int:
        return cost_of(job, self._source, self._entries)


def header_of(shard: Shard, entries: Sequence[TensorChange], shares: bool) -> bytes:
    """The header of the file that is made of `shard`, with these tensors.

    Where blocks can be shared, it is of a length that puts the data where they lie in the source's blocks.
    """
    described = [(entry.key, entry.dtype, entry.shape) for entry in entries]
    first = min((info.offset for info in shard.tensors), default=0)
    if not shares or first % ALIGNMENT:
        return render_header(described, shard.metadata)
    return render_header(described, shard.metadata, BLOCK, first)


def cost_of(job: Job, source: Checkpoint, entries: Sequence[TensorChange]) -> int:
    """Bytes of memory that making all of a job's tensors takes."""
    after = sum(entry.bytes_after for entry in entries if entry.key in job.keys)
    if job.group is None:
        return _COPIES * after
    before = sum(source.tensors[key].nbytes for key in job.group.sources)
    return (_COPIES if job.group.converter is None else _COPIES_MERGED) * max(before, after)


def check_written(path: Path, entries: Sequence[TensorChange]) -> None:
    """Open the file as any reader would and compare it with the plan. Raises DestinationError."""
    with safe_open(path, "pt") as file:
        found = {key: (file.get_slice(key).get_dtype(), tuple(file.get_slice(key).get_shape())) for key in file.keys()}
    expected = {entry.key: (CODES[entry.dtype], entry.shape) for entry in entries}
    for key in sorted(found.keys() | expected.keys()):
        if found.get(key) != expected.get(key):
            raise DestinationError(
                f"{path}: tensor {key}: expected {expected.get(key, 'nothing')}, found {found.get(key, 'nothing')} on "
                "reading back. Is something else writing there? Run again."
            )
