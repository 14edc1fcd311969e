"""What reaches and leaves each norm: two models' sites compared in a form that folding does not change.

A site's input `x` is normalised by the site's own kind and eps, without gain and bias:

    layernorm: n = (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps)
    rmsnorm:   n = x / sqrt(mean(x^2) + eps)

For centred `x` the two are the same, so `n` agrees between a LayerNorm model and its exact RMSNorm form, and it does
not matter into which reader a gain or bias was folded. Its output `y` is what the module gives, with the gain `g` and
the bias `b` that the module has put back to those of the first model:

    y_a  against  g_a (y_b - b_b) / g_b + b_a

and without its mean where the second model takes the mean out of it (an explicit centring). Where the second model
carries the stream as `R x`, `n_b` and `(y_b - b_b) / g_b` are turned back by `R^T` first. Sites are compared and not
only the model's output because that is blind to some of them: a norm that feeds a top-k choice, an unused head.

Norms that no conversion rewrites (over a batch, over groups) are compared by their output alone.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from normswap.norms.formula import formula, placed
from normswap.norms.spec import NormSpec
from normswap.verification.basis import Turn
from normswap.verification.metrics import Record, all_finite, ratio
from normswap.verification.outputs import row_errors

SiteSpec = tuple[str, NormSpec]

_NORMALISED_KINDS = ("layernorm", "rmsnorm")
# Normalised inputs smaller than this (1 is usual) are rounding around a constant, and tell nothing.
_NO_POWER = 1e-6
# A mean smaller than this part of a row's root mean square is rounding, by the dtype of the run.
_NO_MEAN = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 2e-2}


class SiteMetrics(Record):
    """One norm in model B against model A, its input and output each in the form the module docstring gives.

    Attributes:
        site: module path.
        rows: rows (tokens) compared.
        error_mean, error_max: `||n_b - n_a||` of each row, relative to `||n_a||` of the row or to its root mean
            square over the batch, whichever is larger (a row without variance has nothing but rounding in `n`).
        power: root mean square of `n_a`; 1 when the input's variance is well above eps. Near 0 nothing but rounding
            is compared, and the site says nothing.
        mean_a, mean_b: largest `|mean(x)| / rms(x)` of a row in each model: 0 is centred, 1 is constant.
        mismatched: rows that are finite in one model only, of input or output; they count in nothing else.
        output_error_max: the largest error of a row of the output, measured as that of the input is.
    """

    site: str
    rows: int
    error_mean: float
    error_max: float
    power: float
    mean_a: float
    mean_b: float
    mismatched: int = 0
    output_error_max: float = 0.0

    @property
    def says_something(self) -> bool:
        """Whether more than rounding around a constant is compared."""
        return self.power > _NO_POWER


def alike(sites_a: Sequence[SiteSpec], sites_b: Sequence[SiteSpec]) -> tuple[list[SiteSpec], list[SiteSpec]]:
    """Both models' sites, so that what is compared by its output alone in one of them is so in the other."""
    specs_a, specs_b = dict(sites_a), dict(sites_b)

    def watched(specs: dict[str, NormSpec], others: dict[str, NormSpec]) -> list[SiteSpec]:
        coarse = {path: spec for path, spec in others.items() if spec.kind not in _NORMALISED_KINDS}
        return [(path, coarse.get(path, spec)) for path, spec in specs.items()]

    return watched(specs_a, specs_b), watched(specs_b, specs_a)


@dataclass
class Seen:
    """One call of one site, in rows of the normalised width.

    Attributes:
        normalised: the input `n`, `(rows, width)`; of kinds that are not normalised here (batch norms), the output.
        off_centre: each row's `|mean(x)| / rms(x)`, `(rows,)`.
        output: `y`, `(rows, width)`.
        gain, bias: as the module has them, of the output's shape; None where it has none.
        dtype: of the output as it came.
    """

    normalised: torch.Tensor
    off_centre: torch.Tensor
    output: torch.Tensor
    gain: torch.Tensor | None
    bias: torch.Tensor | None
    dtype: torch.dtype


@contextmanager
def watched(
    model: nn.Module,
    sites: Sequence[SiteSpec],
    expected: Sequence[SiteSpec],
    told: Callable[[str, Seen], None],
) -> Iterator[None]:
    """While active, `told` gets what each site of `model` receives and gives, as it runs.

    Args:
        sites: the model's own norms.
        expected: norms of another model; a module that stands in the place of one and is none of `sites` is watched
            by that one's spec.
    """
    modules = dict(model.named_modules())
    specs = {path: spec for path, spec in expected if path in modules} | dict(sites)

    def watch(path: str, spec: NormSpec):
        def hook(module, args, kwargs, output):
            x = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
            y = output if isinstance(output, torch.Tensor) else next(t for t in output if isinstance(t, torch.Tensor))
            told(path, _seen(module, x, y, spec))

        return modules[path].register_forward_hook(hook, with_kwargs=True)

    handles = [watch(path, spec) for path, spec in specs.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _seen(module: nn.Module, x: torch.Tensor, y: torch.Tensor, spec: NormSpec) -> Seen:
    plain = y.detach().to(torch.float64, copy=True)  # what follows may write into it
    if spec.kind == "groupnorm":
        return _seen_on_maps(module, x, plain, spec, y.dtype)
    if spec.kind not in _NORMALISED_KINDS:
        # a channel's values do not lie along one axis of the input: rows are those of the output's last axis
        rows = plain.reshape(-1, plain.shape[-1])
        return Seen(rows, torch.zeros(len(rows)), rows, None, None, y.dtype)
    gain = _parameter(module, spec.weight, spec, plain)
    if gain is not None and spec.gain == "1 + w":
        gain = 1 + gain
    bias = _parameter(module, spec.bias, spec, plain)
    normalised, off_centre = _normalise(x, spec)
    return Seen(normalised, off_centre, _rows(plain, spec), gain, bias, y.dtype)


def _seen_on_maps(module: nn.Module, x: torch.Tensor, y: torch.Tensor, spec: NormSpec, dtype: torch.dtype) -> Seen:
    """Of a norm over positions; rows are those of the last axis."""
    bare = spec.model_copy(update={"gain": None, "weight": None, "bias": None})
    held = {name: getattr(module, name, None) for name in (spec.weight, spec.bias) if name is not None}
    parts = {
        name: None if p is None else placed(p.detach().double(), y.ndim, spec).expand(y.shape)
        for name, p in held.items()
    }
    normalised = formula(x.detach().double(), bare, {})
    normalised, plain, gain, bias = (
        None if t is None else t.reshape(-1, y.shape[-1])
        for t in (normalised, y, parts.get(spec.weight), parts.get(spec.bias))
    )
    gain = 1 + gain if gain is not None and spec.gain == "1 + w" else gain
    return Seen(normalised, torch.zeros(len(plain)), plain, gain, bias, dtype)


def _normalise(x: torch.Tensor, spec: NormSpec) -> tuple[torch.Tensor, torch.Tensor]:
    x = _rows(x.detach().double(), spec)
    mean = x.mean(-1)
    off_centre = ratio(mean.abs(), x.square().mean(-1).sqrt())
    if spec.kind == "layernorm":
        x = x - mean.unsqueeze(-1)
    return x * (x.square().mean(-1, keepdim=True) + spec.eps).rsqrt(), off_centre


def _rows(x: torch.Tensor, spec: NormSpec) -> torch.Tensor:
    last = tuple(range(-len(spec.axes), 0))
    return x.movedim(spec.axes, last).reshape(-1, spec.width)


def _parameter(module: nn.Module, name: str | None, spec: NormSpec, y: torch.Tensor) -> torch.Tensor | None:
    """A gain or bias in rows as those of the output `y`; None where the module has none."""
    parameter = getattr(module, name, None) if name else None
    if parameter is None:
        return None
    value = parameter.detach().double()
    if value.shape == (spec.width,):
        return value  # one value per normalised channel: the same in every row
    if value.ndim == 1 and value.numel() == y.shape[-1]:
        return _rows(value.expand(y.shape), spec)
    # one value per head and channel, or per channel of a map
    return _rows(torch.broadcast_to(value, y.shape), spec)


@dataclass
class _Totals:
    rows: int = 0
    error_sum: float = 0.0
    error_max: float = 0.0
    square_sum: float = 0.0
    mean_a: float = 0.0
    mean_b: float = 0.0
    mismatched: int = 0
    output_error_max: float = 0.0


class SiteComparison:
    """Gathers the measurements of all sites over batches; keeps a few numbers per site.

    What a site of one model received and gave is held until the same site of the other has run: where both run in
    turns, that is one site's.

    Args:
        turned_back: per site on a stream that B carries in another basis, what turns B's rows to A's.
    """

    def __init__(self, turned_back: Mapping[str, Turn] | None = None):
        self._turned_back = turned_back or {}
        self._totals: dict[str, _Totals] = {}
        self._unmatched: set[str] = set()
        self._waiting: tuple[dict[str, deque[Seen]], ...] = ({}, {})

    def add(self, of: Literal["a", "b"], path: str, seen: Seen) -> None:
        """Take in one call of a site of one model."""
        own, other = self._waiting if of == "a" else reversed(self._waiting)
        if of == "a":
            self._totals.setdefault(path, _Totals())  # in execution order
        if not other.get(path):
            own.setdefault(path, deque()).append(seen)
            return
        a, b = (seen, other[path].popleft()) if of == "a" else (other[path].popleft(), seen)
        if _shapes(a) != _shapes(b):
            self._unmatched.add(path)
        else:
            _accumulate(self._totals[path], a, b, self._turned_back.get(path))

    def end_batch(self) -> None:
        """Both models have run: what is left of either has no match."""
        for waiting in self._waiting:
            self._unmatched |= {path for path, seen in waiting.items() if seen}
            waiting.clear()

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
                output_error_max=t.output_error_max,
            )
            for path, t in self._totals.items()
            if path not in self._unmatched
        )

    def unmatched(self) -> tuple[str, ...]:
        """Sites that ran in one model only, a different number of times, or on inputs of another shape."""
        return tuple(sorted(self._unmatched))


def _shapes(seen: Seen) -> tuple[torch.Size, torch.Size]:
    return seen.normalised.shape, seen.output.shape


def _accumulate(totals: _Totals, a: Seen, b: Seen, turn: Turn | None) -> None:
    device = a.normalised.device
    n_a, n_b = a.normalised, b.normalised.to(device)
    mean_a, mean_b = a.off_centre, b.off_centre.to(device)
    odd = 0
    if not (all_finite(n_a) and all_finite(n_b)):
        finite_a, finite_b = n_a.isfinite().all(-1), n_b.isfinite().all(-1)
        odd, good = int((finite_a != finite_b).sum()), finite_a & finite_b
        n_a, n_b, mean_a, mean_b = n_a[good], n_b[good], mean_a[good], mean_b[good]
    if turn is not None:
        n_b = turn(n_b)
    odd_output, output_error = row_errors(*_outputs(a, b, turn))
    totals.mismatched += max(odd, int(odd_output.sum()))
    totals.output_error_max = max(totals.output_error_max, output_error.max().item() if len(output_error) else 0.0)
    if not len(n_a):
        return
    _, error = row_errors(n_a, n_b)
    totals.rows += len(n_a)
    totals.error_sum += error.sum().item()
    totals.error_max = max(totals.error_max, error.max().item())
    totals.square_sum += n_a.square().mean(-1).sum().item()
    totals.mean_a = max(totals.mean_a, mean_a.max().item())
    totals.mean_b = max(totals.mean_b, mean_b.max().item())


def _outputs(a: Seen, b: Seen, turn: Turn | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The two outputs, B's with A's gain and bias, both without their means where B's has none."""
    y_a, y_b = a.output, b.output.to(a.output.device)
    if turn is not None:
        y_b = y_b - (0 if b.bias is None else b.bias.to(y_b.device))
        y_b = turn(y_b / (1 if b.gain is None else b.gain.to(y_b.device)))
        return y_a, y_b * (1 if a.gain is None else a.gain) + (0 if a.bias is None else a.bias)
    if _has_no_mean(y_b, b.dtype) and not _has_no_mean(y_a, a.dtype) and _same(a.gain, b.gain):
        return _centred(y_a), _centred(y_b)
    if not _same(a.bias, b.bias):
        y_b = y_b - (0 if b.bias is None else b.bias.to(y_b.device))
    if not _same(a.gain, b.gain):
        y_b = y_b / (1 if b.gain is None else b.gain.to(y_b.device)) * (1 if a.gain is None else a.gain)
    if not _same(a.bias, b.bias):
        y_b = y_b + (0 if a.bias is None else a.bias)
    return y_a, y_b


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b.to(a.device)))


def _has_no_mean(y: torch.Tensor, dtype: torch.dtype) -> bool:
    off_centre = ratio(y.mean(-1).abs(), y.square().mean(-1).sqrt())
    return bool((off_centre[off_centre.isfinite()] < _NO_MEAN.get(dtype, 0.0)).all())


def _centred(y: torch.Tensor) -> torch.Tensor:
    return y - y.mean(-1, keepdim=True)
