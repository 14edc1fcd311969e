"""How long each backend takes for a call on this machine: measured once, kept in the user's cache."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

from normswap.kernels.call import Call

ROWS = {"cuda": 8192}
"""Rows of the measured input, by device; others: 512."""


TURNS = 5


class Timings:
    """The table of one machine: per call, microseconds of forward and backward by backend.

    It is one JSON file. A change of the processor, of torch, of the number of threads or of a backend's version begins
    a new one.
    """

    def __init__(self, versions: Mapping[str, str], folder: Path | None = None):
        threads = torch.get_num_threads()
        self.machine = {"hardware": hardware(), "torch": torch.__version__, "threads": threads, **versions}
        key = hashlib.sha256(json.dumps(self.machine, sort_keys=True).encode()).hexdigest()[:16]
        self.path = (folder or cache_folder()) / f"timings-{key}.json"
        self.known: dict[str, dict[str, float]] = {}
        try:
            self.known = json.loads(self.path.read_text(encoding="utf-8"))["calls"]
        except (OSError, ValueError, KeyError):
            pass  # none yet, or none that can be read: they are measured anew

    def of(self, call: Call, contenders: Mapping[str, Callable[[], None]]) -> dict[str, float]:
        """Microseconds of each contender. Those that are not known are measured now, in turns, and the least counts."""
        known = self.known.setdefault(call.words(), {})
        wanting = {name: run for name, run in contenders.items() if name not in known}
        if wanting:
            for run in wanting.values():
                run()  # compilers, caches
            for _ in range(TURNS):
                for name, run in wanting.items():
                    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
                    took = timer.blocked_autorange(min_run_time=0.02).median * 1e6
                    known[name] = min(took, known.get(name, took))
            self._save()
        return {name: known[name] for name in contenders}

    def _save(self) -> None:
        """Whole or not at all: several processes may write."""
        text = json.dumps({"machine": self.machine, "calls": self.known}, indent=1, sort_keys=True)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=self.path.parent, delete=False) as file:
                file.write(text)
            os.replace(file.name, self.path)
        except OSError:
            pass  # a read-only home: they are measured again next time


def cache_folder() -> Path:
    """`NORMSWAP_CACHE`, or `normswap` in the user's cache folder."""
    if "NORMSWAP_CACHE" in os.environ:
        return Path(os.environ["NORMSWAP_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "normswap"


def hardware() -> str:
    """The GPU's name, or the processor's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
