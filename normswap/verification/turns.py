"""Two functions that run in turns, each in a thread of its own, so that what both come to can be compared at once.

As with coroutines only one of them runs at any time, and what the process holds for all goes with each: the state of
the random generators, so that both draw what they would draw alone, and the default dtype.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch


class _Over(BaseException):
    """The other one failed: there is nothing left to run for."""


class Turns:
    """`Turns(devices).run(a, b)`; inside of `a` and `b`, `give()` has the other go on.

    Args:
        devices: CUDA devices whose generators are kept apart as well.
    """

    def __init__(self, devices: tuple[torch.device, ...] = ()):
        self._devices = devices
        self._baton = threading.Condition()
        self._turn = 0
        self._done = [False, False]
        self._failed: BaseException | None = None
        self._names = threading.local()
        self._states: list[Any] = [None, None]

    def run(self, a: Callable[[], Any], b: Callable[[], Any]) -> tuple[Any, Any]:
        """What `a` and `b` return; the first exception of either."""
        results: list[Any] = [None, None]
        self._turn, self._done, self._failed = 0, [False, False], None
        before = self._state()
        self._states = [before, before]

        def part(number: int, function: Callable[[], Any]) -> None:
            self._names.number = number
            try:
                self._wait(number)
                results[number] = function()
            except _Over:
                pass
            except BaseException as error:
                self._failed = self._failed or error
            finally:
                with self._baton:
                    self._done[number] = True
                    self._pass(number)

        other = threading.Thread(target=part, args=(1, b), daemon=True)
        other.start()
        part(0, a)
        other.join()
        self._restore(before)
        if self._failed is not None:
            raise self._failed
        return results[0], results[1]

    @property
    def current(self) -> int:
        """0 inside of `a`, 1 inside of `b`."""
        return self._names.number

    def give(self) -> None:
        """Have the other go on until it gives back, or has ended."""
        number = self._names.number
        if self._failed is not None:
            raise _Over
        if self._done[1 - number]:
            return
        with self._baton:
            self._pass(number)
        self._wait(number)

    def _pass(self, number: int) -> None:
        self._states[number] = self._state()
        self._turn = 1 - number
        self._baton.notify_all()

    def _wait(self, number: int) -> None:
        with self._baton:
            self._baton.wait_for(lambda: self._turn == number or self._done[1 - number])
            self._turn = number
        if self._failed is not None:
            raise _Over
        self._restore(self._states[number])

    def _state(self) -> tuple[torch.dtype, list[torch.Tensor]]:
        states = [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self._devices)]
        return torch.get_default_dtype(), states

    def _restore(self, state: tuple[torch.dtype, list[torch.Tensor]]) -> None:
        dtype, (host, *others) = state
        torch.set_default_dtype(dtype)
        torch.set_rng_state(host)
        for device, generator in zip(self._devices, others, strict=True):
            torch.cuda.set_rng_state(generator, device)
