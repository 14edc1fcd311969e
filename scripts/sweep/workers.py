"""Many tasks in a few processes, none of which can hang or kill the others.

A pool of the standard library waits for ever on a worker that was killed for its memory, and cannot stop one that
hangs. Here each process has a pipe of its own: its parent ends it when its time is over or the process is gone, notes
that for the task it had, and starts another.
"""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

# A process that has imported as many model types has grown; a new one costs some seconds.
_TASKS_PER_PROCESS = 80
# Starting a process means importing torch and transformers, which is no part of a task's time.
_START_SECONDS = 120

_SPAWN = multiprocessing.get_context("spawn")


@dataclass
class _Worker:
    process: multiprocessing.process.BaseProcess
    pipe: Connection
    deadline: float
    ready: bool = False
    done: int = 0
    task: str | None = None


def run_all(
    work: Callable[..., Any], tasks: Iterable[str], args: tuple[Any, ...], jobs: int, seconds: float, gibibytes: float
) -> Iterator[tuple[str, Any, str | None]]:
    """`(task, result, None)` of each task as it ends, or `(task, None, why)` for one that did not come to an end.

    Args:
        work: a function of a module that the child can import; called as `work(task, *args)`, its result is pickled.
        jobs: how many processes.
        seconds: the time that one task may take.
        gibibytes: the memory that one process may take; what asks for more gets a MemoryError or is ended.
    """
    waiting = list(tasks)[::-1]
    workers: list[_Worker] = []
    try:
        while waiting or any(worker.task for worker in workers):
            while len(workers) < min(jobs, len(waiting) + sum(worker.task is not None for worker in workers)):
                workers.append(_start(work, args, gibibytes))
            for worker in workers:
                if worker.ready and worker.task is None and waiting:
                    _give(worker, waiting.pop(), seconds)
            busy = [worker for worker in workers if worker.task or not worker.ready]
            arrived = wait([worker.pipe for worker in busy], timeout=1)
            for worker in busy:
                task, result, why, alive = worker.task, None, None, True
                if worker.pipe in arrived:
                    try:
                        result, why = worker.pipe.recv()
                        worker.done += worker.ready
                        worker.ready, worker.task = True, None
                    except (EOFError, OSError):
                        alive, why = False, "the process ended by itself"
                elif time.monotonic() > worker.deadline:
                    alive, why = False, f"it took more than {seconds:.0f} s"
                else:
                    continue
                if not alive or worker.done >= _TASKS_PER_PROCESS:
                    _end(worker)
                    workers.remove(worker)
                if not alive:
                    why = f"{why} (exit code {worker.process.exitcode})"
                if task is not None:
                    yield task, result, why
                elif not alive:
                    raise RuntimeError(f"a process could not be started: {why}")
    finally:
        for worker in workers:
            _end(worker)


def _start(work: Callable[..., Any], args: tuple[Any, ...], gibibytes: float) -> _Worker:
    ours, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(target=_serve, args=(theirs, work, args, gibibytes), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours, time.monotonic() + _START_SECONDS)


def _give(worker: _Worker, task: str, seconds: float) -> None:
    worker.task = task
    worker.deadline = time.monotonic() + seconds
    try:
        worker.pipe.send(task)
    except OSError:
        worker.deadline = 0.0  # it is gone, and found out so


def _end(worker: _Worker) -> None:
    worker.process.kill()
    worker.process.join()
    worker.pipe.close()


def _serve(pipe: Connection, work: Callable[..., Any], args: tuple[Any, ...], gibibytes: float) -> None:
    limit = int(gibibytes * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    pipe.send((None, None))  # what takes time to import is imported
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        try:
            done = work(task, *args), None
        except BaseException as error:
            done = None, f"{type(error).__name__}: {error}"
        pipe.send(done)
