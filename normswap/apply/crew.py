"""Threads that run tasks in the order they are given, as many at a time as their memory allows."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

# Tasks that wait for a thread, for each thread: enough that none idles.
_WAITING = 2


def default_workers() -> int:
    """As many as this process has processors, up to 8, since beyond disks are the limit; two more wait for them."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, processors) + 2


class Crew:
    """`with Crew(workers, memory) as crew: crew.give(cost, task, ...)`; the block ends when every task has.

    The first task that fails stops the rest: its exception is raised by the next `give`, or at the end.

    Args:
        workers: how many threads.
        memory: bytes that the tasks which run or wait may take together. One that alone takes more runs alone.
    """

    def __init__(self, workers: int, memory: int):
        self._pool = ThreadPoolExecutor(workers, "normswap")
        self._memory, self._most = memory, workers * (1 + _WAITING)
        self._taken = self._count = 0
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def give(self, cost: int, task: Callable[..., Any], *args: Any) -> None:
        """Have `task(*args)` run, which takes `cost` bytes; waits for its turn. Raises what an earlier task raised."""
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or self._fits(cost))
            if self._error is not None:
                raise self._error
            self._taken, self._count = self._taken + cost, self._count + 1
        self._pool.submit(self._run, task, *args).add_done_callback(lambda future: self._done(future, cost))

    def check(self) -> None:
        """Raise what a task raised, if one did."""
        if self._error is not None:
            raise self._error

    def _fits(self, cost: int) -> bool:
        return self._count < self._most and (self._taken == 0 or self._taken + cost <= self._memory)

    def _run(self, task: Callable[..., Any], *args: Any) -> None:
        if self._error is None:
            task(*args)

    def _done(self, future: Future, cost: int) -> None:
        with self._changed:
            self._taken, self._count = self._taken - cost, self._count - 1
            if self._error is None and not future.cancelled():
                self._error = future.exception()
            self._changed.notify_all()

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            with self._changed:
                self._error = self._error or error
        self._pool.shutdown(wait=True, cancel_futures=error is not None)
        if error is None and self._error is not None:
            raise self._error
