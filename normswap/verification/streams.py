"""What the norms of two models receive, each for itself: mean, scale, and how the scale differs from token to token.

Unlike the comparison of sites this takes no two vectors to be the same, so it says something of norms that moved too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from normswap.norms.spec import NormSpec
from normswap.verification.record import Record


class StreamStat(Record):
    """Of what one norm receives, over the rows (tokens) that are finite.

    Attributes:
        mean: the mean of all values.
        rms: the mean over rows of their root mean square.
        cv: the coefficient of variation of that: its deviation over rows, relative to its mean.
    """

    mean: float
    rms: float
    cv: float


class SiteStream(Record):
    """What one norm receives in model A and in model B; None where it is not, or does not run."""

    site: str
    a: StreamStat | None = None
    b: StreamStat | None = None


@dataclass
class Sums:
    """Sums over rows: their number, means, root mean squares, and the squares of these."""

    rows: int = 0
    mean: float = 0.0
    rms: float = 0.0
    square: float = 0.0

    def add(self, x: torch.Tensor) -> None:
        """Take in `x`, `(rows, width)`."""
        mean, rms = x.mean(-1).double(), torch.linalg.vector_norm(x, dim=-1).double() / math.sqrt(x.shape[-1])
        good = rms.isfinite() & mean.isfinite()
        if not good.all():
            mean, rms = mean[good], rms[good]
        self.rows += len(rms)
        self.mean += mean.sum().item()
        self.rms += rms.sum().item()
        self.square += rms.square().sum().item()

    def stat(self) -> StreamStat | None:
        if not self.rows:
            return None
        mean, rms = self.mean / self.rows, self.rms / self.rows
        deviation = math.sqrt(max(0.0, self.square / self.rows - rms**2))
        return StreamStat(mean=mean, rms=rms, cv=deviation / rms if rms else 0.0)


class Stats(dict[str, Sums]):
    """Sums by path, in execution order. While `paused`, nothing is taken in."""

    paused = False


@contextmanager
def received(model: nn.Module, sites: Sequence[tuple[str, NormSpec]]) -> Iterator[Stats]:
    """While active, gather what each norm of `sites` receives, over all passes: path -> sums, in execution order."""
    sums = Stats()
    modules = dict(model.named_modules())

    def watch(path: str, spec: NormSpec):
        def hook(module, args, kwargs):
            x = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
            if x is not None and x.ndim >= max(-axis for axis in spec.axes) and not sums.paused:
                sums.setdefault(path, Sums()).add(_rows(x.detach(), spec))

        return modules[path].register_forward_pre_hook(hook, with_kwargs=True)

    handles = [watch(path, spec) for path, spec in sites if path in modules]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def _rows(x: torch.Tensor, spec: NormSpec) -> torch.Tensor:
    """`x` as rows along the axes of the norm, in float32 at least."""
    x = x if x.dtype in (torch.float32, torch.float64) else x.float()
    x = x.movedim(spec.axes, tuple(range(-len(spec.axes), 0)))
    return x.reshape(-1, math.prod(x.shape[-len(spec.axes) :]))


def interleaved(a: Iterable[str], b: Iterable[str]) -> list[str]:
    """All of `a` in its order; what only `b` has follows what it follows there."""
    paths, at = list(a), 0
    for path in b:
        if path not in paths:
            paths.insert(at, path)
        at = paths.index(path) + 1
    return paths


def side_by_side(a: Stats, b: Stats) -> tuple[SiteStream, ...]:
    """The statistics of both models by site, in A's order of execution; what only B has stands where it runs there."""
    paths = interleaved(a, b)
    none = Sums()
    found = (SiteStream(site=path, a=a.get(path, none).stat(), b=b.get(path, none).stat()) for path in paths)
    return tuple(site for site in found if site.a or site.b)
