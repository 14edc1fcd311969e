"""What reaches each norm: the inputs of two models' sites, compared in a form that folding does not change.

A site's input `x` is normalised by the site's own kind and eps, without gain and bias:

    layernorm: n = (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps)
    rmsnorm:   n = x / sqrt(mean(x^2) + eps)

For centred `x` the two are the same, so `n` agrees between a LayerNorm model and its exact RMSNorm form, and it does
not matter into which reader a gain or bias was folded. Inputs are compared and not only the output because the output
is blind to some sites: a norm that feeds a top-k choice, an unused head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from normswap.norms.spec import NormSpec
from normswap.verification.metrics import Record, ratio

SiteSpec = tuple[str, NormSpec]

_COMPARED_KINDS = ("layernorm", "rmsnorm")


class SiteMetrics(Record):
    """The input of one norm in model B against model A, each normalised as the module docstring says.

    Attributes:
        site: module path.
        rows: rows (tokens) compared.
        error_mean, error_max: `||n_b - n_a||` of each row, relative to `||n_a||` of the row or to its root mean
            square over the batch, whichever is larger (a row without variance has nothing but rounding in `n`).
        power: root mean square of `n_a`; 1 when the input's variance is well above eps. Near 0 nothing but rounding
            is compared, and the site says nothing.
        mean_a, mean_b: largest `|mean(x)| / rms(x)` of a row in each model: 0 is centred, 1 is constant.
        mismatched: rows that are finite in one model only; they count in nothing else.
    """

    site: str
    rows: int
    error_mean: float
    error_max: float
    power: float
    mean_a: float
    mean_b: float
    mismatched: int = 0


@dataclass
class Seen:
    """One call of one site: its normalised input `(rows, width)` and each row's `|mean| / rms`, `(rows,)`."""

    normalised: torch.Tensor
    off_centre: torch.Tensor


Calls = dict[str, list[Seen]]


@contextmanager
def site_inputs(model: nn.Module, sites: Sequence[SiteSpec]) -> Iterator[Calls]:
    """While active, gather what each site of `model` receives: path -> calls, in execution order.

    Clear the dict between forward passes. Kinds other than layernorm and rmsnorm are skipped.
    """
    calls: Calls = {}

    def watch(path: str, spec: NormSpec):
        def hook(module, args, kwargs):
            x = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
            calls.setdefault(path, []).append(_normalise(x, spec))

        return model.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True)

    handles = [watch(path, spec) for path, spec in sites if spec.kind in _COMPARED_KINDS]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _normalise(x: torch.Tensor, spec: NormSpec) -> Seen:
    last = tuple(range(-len(spec.axes), 0))
    x = x.detach().double().movedim(spec.axes, last).reshape(-1, spec.width)
    mean = x.mean(-1)
    off_centre = ratio(mean.abs(), x.square().mean(-1).sqrt())
    if spec.kind == "layernorm":
        x = x - mean.unsqueeze(-1)
    return Seen(x * (x.square().mean(-1, keepdim=True) + spec.eps).rsqrt(), off_centre)


@dataclass
class _Totals:
    rows: int = 0
    error_sum: float = 0.0
    error_max: float = 0.0
    square_sum: float = 0.0
    mean_a: float = 0.0
    mean_b: float = 0.0
    mismatched: int = 0


class SiteComparison:
    """Gathers the measurements of all sites over batches; keeps a few numbers per site."""

    def __init__(self):
        self._totals: dict[str, _Totals] = {}
        self._unmatched: set[str] = set()

    def add(self, calls_a: Calls, calls_b: Calls) -> None:
        """Take in what the sites of both models received in one batch."""
        self._unmatched |= calls_a.keys() ^ calls_b.keys()
        for path in calls_a.keys() & calls_b.keys():
            seen_a, seen_b = calls_a[path], calls_b[path]
            if [s.normalised.shape for s in seen_a] != [s.normalised.shape for s in seen_b]:
                self._unmatched.add(path)
        for path in calls_a:  # in execution order
            if path not in self._unmatched:
                for a, b in zip(calls_a[path], calls_b[path], strict=True):
                    _accumulate(self._totals.setdefault(path, _Totals()), a, b)

    def metrics(self) -> tuple[SiteMetrics, ...]:
        """Measurements of every site that both models ran alike, in execution order."""
        return tuple(
            SiteMetrics(
                site=path,
                rows=t.rows,
                error_mean=t.error_sum / max(t.rows, 1),
                error_max=t.error_max,
                power=math.sqrt(t.square_sum / max(t.rows, 1)),
                mean_a=t.mean_a,
                mean_b=t.mean_b,
                mismatched=t.mismatched,
            )
            for path, t in self._totals.items()
            if path not in self._unmatched
        )

    def unmatched(self) -> tuple[str, ...]:
        """Sites that ran in one model only, a different number of times, or on inputs of another shape."""
        return tuple(sorted(self._unmatched))


def _accumulate(totals: _Totals, a: Seen, b: Seen) -> None:
    b = Seen(b.normalised.to(a.normalised.device), b.off_centre.to(a.normalised.device))
    finite_a, finite_b = a.normalised.isfinite().all(-1), b.normalised.isfinite().all(-1)
    totals.mismatched += int((finite_a != finite_b).sum())
    good = finite_a & finite_b
    if not good.any():
        return
    n_a, n_b = a.normalised[good], b.normalised[good]
    size = n_a.norm(dim=-1)
    typical = size.square().mean().sqrt()
    error = ratio((n_b - n_a).norm(dim=-1), size.clamp(min=typical))
    totals.rows += len(n_a)
    totals.error_sum += error.sum().item()
    totals.error_max = max(totals.error_max, error.max().item())
    totals.square_sum += n_a.square().mean(-1).sum().item()
    totals.mean_a = max(totals.mean_a, a.off_centre[good].max().item())
    totals.mean_b = max(totals.mean_b, b.off_centre[good].max().item())
