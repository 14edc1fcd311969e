"""Timing contenders fairly: in turns, with cold caches; and what the same device can copy."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version

import torch

from normswap.kernels.timing import hardware

#: bytes that are written between two runs: more than any L2 cache (H200: 50 MB), and than most last-level ones
FLUSHED = {"cuda": 1 << 28, "cpu": 1 << 26}
#: cycles that a GPU is kept waiting before a run, so that the host has launched all of it when it begins
AHEAD = 1_000_000


class Stopwatch:
    """Seconds of what runs on one device; on a GPU those of the device, not of the host."""

    def __init__(self, device: str):
        self.device = device
        self.other = torch.empty(FLUSHED[device], dtype=torch.int8, device=device)
        self.source, self.target = torch.ones_like(self.other), torch.zeros_like(self.other)

    def in_turns(self, contenders: Mapping[str, Callable[[], object]], turns: int) -> dict[str, float]:
        """Of each over `turns`, after one run that is not counted: the median on a GPU, the least on a CPU."""
        for run in contenders.values():
            run()
        took: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(turns):
            for name, run in contenders.items():
                took[name].append(self.once(run))
        counts = statistics.median if self.device == "cuda" else min
        return {name: counts(seconds) for name, seconds in took.items()}

    def once(self, run: Callable[[], object]) -> float:
        """Of one run, with cold caches."""
        self.other.zero_()
        if self.device != "cuda":
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(AHEAD)
        before.record()
        run()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1e3

    def on_host(self, run: Callable[[], object], times: int = 200) -> float:
        """Of the host, for one run of so many that are launched without waiting."""
        for _ in range(10):
            run()
        self.wait()
        start = time.perf_counter()
        for _ in range(times):
            run()
        took = time.perf_counter() - start
        self.wait()
        return took / times

    def wait(self) -> None:
        """Until the device has done all that it was told."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def copy(self) -> None:
        """Copies a tensor much larger than the caches: the speed that all is held against."""
        self.target.copy_(self.source)

    @property
    def copied(self) -> int:
        """Bytes that `copy` reads and writes."""
        return 2 * self.source.numel()


def machine(device: str) -> dict[str, object]:
    """Hardware and versions that a timing is of."""
    told: dict[str, object] = {"device": device, "hardware": hardware(), "python": platform.python_version()}
    if device == "cpu":
        told["threads"] = torch.get_num_threads()
    for package in ("torch", "triton", "liger-kernel", "quack-kernels", "kernels", "transformers"):
        try:
            told[package] = version(package)
        except PackageNotFoundError:
            told[package] = None
    return told


def in_words(told: Mapping[str, object]) -> str:
    """A line of it."""
    return ", ".join(
        str(value) if key == "hardware" else f"{key} {value}"
        for key, value in told.items()
        if value is not None and key != "device"
    )
