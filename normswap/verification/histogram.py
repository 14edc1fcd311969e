"""How values of many sizes are spread: a histogram over their logarithm, small enough to be kept in a record."""

from __future__ import annotations

import torch

from normswap.verification.record import Record

#: bins in a factor of ten
PER_DECADE = 4
# Values below are rounding of rounding; they are counted with the zeros.
_FLOOR = 1e-40


class Histogram(Record):
    """Counts of values by size. Bin `i` holds those from `10^(first + i / per_decade)` up to the next bin's edge.

    Attributes:
        first: decimal logarithm of the lowest edge.
        per_decade: bins in a factor of ten.
        counts: one number for each bin; the first and the last are not 0.
        zero: values that are 0, or below 1e-40.
        infinite: values without end.
    """

    first: float
    per_decade: int
    counts: tuple[int, ...]
    zero: int = 0
    infinite: int = 0

    @property
    def total(self) -> int:
        return sum(self.counts) + self.zero + self.infinite

    def edges(self) -> list[float]:
        """The edges of all bins, one more than there are bins."""
        return [10 ** (self.first + i / self.per_decade) for i in range(len(self.counts) + 1)]


def histogram(values: torch.Tensor) -> Histogram:
    """The histogram of `values`, `(n,)`, which are not negative and not NaN."""
    values = values.double()
    infinite, zero = values.isinf(), values < _FLOOR
    logs = values[~(infinite | zero)].log10()
    others = {"zero": int(zero.sum()), "infinite": int(infinite.sum())}
    if not len(logs):
        return Histogram(first=0.0, per_decade=PER_DECADE, counts=(), **others)
    bins = (logs * PER_DECADE).floor().long()
    first = int(bins.min())
    counts = torch.bincount(bins - first)
    return Histogram(first=first / PER_DECADE, per_decade=PER_DECADE, counts=tuple(counts.tolist()), **others)
