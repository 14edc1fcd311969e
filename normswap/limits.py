"""Bounds on work whose size a file from anyone may say: time, memory, and how many modules are made.

A configuration with a billion layers, or labels, is read in no time and would be built for days. What is being built
cannot be asked beforehand how large it will be, so it is watched, and stopped from outside.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch.nn.modules.module import register_module_module_registration_hook

#: of building a model without weights; one of 671B parameters took 0.05 s and 0.01 GiB
SECONDS, BYTES = 5.0, 2**30
_EVERY = 0.05


class TooMuch(Exception):
    """Work was stopped at a bound; the message says which."""


class _Stop(BaseException):
    """Raised within the work, where nobody takes it for an error of his own."""


@contextmanager
def limited(modules: int | None = None, seconds: float = SECONDS, nbytes: int = BYTES) -> Iterator[None]:
    """Do the block within bounds.

    Args:
        modules: how many may be made.
        seconds: of this thread's time on the processor.
        nbytes: by which the process may grow.

    Raises:
        TooMuch: the block was stopped.
    """
    watch = _Watch(seconds, nbytes)
    counted = 0

    def count(module, name, submodule) -> None:
        nonlocal counted
        counted += 1
        if modules is not None and counted > modules and threading.get_ident() == watch.caller:
            raise _Stop(f"more than {modules} modules")

    hook = register_module_module_registration_hook(count)
    try:
        watch.begin()
        yield
    except _Stop as stop:
        raise TooMuch(watch.why or str(stop)) from None
    finally:
        try:
            watch.end()
        except _Stop:  # it came just as the end began; the next one is `_EVERY` away
            watch.end()
        hook.remove()


class _Watch:
    """A thread that looks at another one's use of time and memory, and raises `_Stop` there."""

    def __init__(self, seconds: float, nbytes: int):
        self.caller = threading.get_ident()
        self.why: str | None = None
        self._now = _clock_of(self.caller)
        self._seconds, self._nbytes = seconds, nbytes
        self._until, self._size = self._now() + seconds, _resident() + nbytes
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def begin(self) -> None:
        self._thread.start()

    def end(self) -> None:
        """Nothing is raised any more once this is done."""
        while True:
            try:
                self._done.set()
                if self._thread.ident is not None:
                    self._thread.join()
                for _ in range(100):  # what was raised last comes here
                    pass
                return
            except _Stop:
                continue

    def _run(self) -> None:
        while not self._done.wait(_EVERY):
            if self._now() > self._until:
                self._raise(f"more than {self._seconds:g} seconds")
            elif _resident() > self._size:
                self._raise(f"more than {self._nbytes / 2**30:g} GiB of memory")

    def _raise(self, why: str) -> None:
        # again and again, as what runs may have taken the last one for something else
        self.why = self.why or why
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.caller), ctypes.py_object(_Stop))


def _clock_of(thread: int) -> Callable[[], float]:
    """The time on the processor of a thread; where the system does not tell, that of the clock."""
    if not hasattr(time, "pthread_getcpuclockid"):
        return time.monotonic
    clock = time.pthread_getcpuclockid(thread)
    return lambda: time.clock_gettime(clock)


def _resident() -> int:
    """Bytes of memory that this process has now; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
