"""The bases that data choose for streams: principal axes, and the direction whose loss is felt least.

What counts of a stream is what its norms give, so that every token and every norm weighs the same. Per norm p over all
tokens, n its output without gain and bias:

    C_p = Cov(n),  m_p = mean(n),  G_p = sum of (W diag(g))^T (W diag(g)) over its readers W.

`pca`: the rows of R are the eigenvectors of `sum_p mean(n n^T)`, the largest first.

`reflected` (RMSNorm to LayerNorm): without `v^T n`, apart from its mean, the readers of p err by `Var(v^T n) |W v|^2 =
(v^T C_p v)(v^T G_p v)`. v minimises the sum of that over p, each relative to what the readers give, `tr(G_p mean(n
n^T))`. Then `v^T n` is regressed on the rest of n, which gives c (see `planning.rewrites.rotate`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from normswap.calibration.data import Data
from normswap.calibration.scales import normalised
from normswap.calibration.taps import rows
from normswap.planning.plans import Plan, RotatedStream
from normswap.planning.rewrites.rotate import lost_direction, restored
from normswap.understand.normmap import NormMap, Site
from normswap.verification.outputs import to_model

# of the mean variance of a channel, added to each: what the regression of one direction does not believe
_RIDGE = 1e-3
# the search for the direction begins at so many, since it may stand still at one that all norms and readers share
_STARTS = 4


@dataclass
class Moments:
    """Of vectors n: how many, their sum `(d,)`, and the sum of n n^T `(d, d)`, in float64."""

    count: int
    total: torch.Tensor
    square: torch.Tensor

    @property
    def mean(self) -> torch.Tensor:
        return self.total / self.count

    @property
    def second(self) -> torch.Tensor:
        return self.square / self.count

    @property
    def covariance(self) -> torch.Tensor:
        return self.second - torch.outer(self.mean, self.mean)


def fit_rotations(normmap: NormMap, plan: Plan, data: Data) -> Plan:
    """`plan` with the bases that it leaves to data. Memory: two matrices `(d, d)` per norm of the streams.

    The same model and batches give the same bases, bit for bit, on one machine.
    """
    open_ = {i: stream for i, stream in enumerate(plan.rotated) if stream.rotation.fitted in plan.lacks()}
    if not open_:
        return plan
    sites = [normmap.sites[path] for stream in open_.values() for path in stream.sites]
    moments = measure_moments(data, sites)
    tensors: dict[str, torch.Tensor] = {}
    asked = plan.asks_for()
    for number, stream in open_.items():
        if stream.rotation.by == "fitted":
            tensors[stream.rotation.fitted] = principal_axes([moments[path] for path in stream.sites])
        else:
            lowered = [normmap.sites[path] for path in stream.sites if restored(path) in asked]
            tensors |= _reflected(data, stream, number, lowered, moments)
        data.progress("choosing bases", len(tensors), len(asked))
    claim = "calibrated" if any(stream.rotation.by == "reflected" for stream in open_.values()) else plan.claim
    plan = plan.model_copy(update={"claim": claim, "calibrated_on": data.described})
    return plan.with_fitted(tensors)


@torch.no_grad()
def measure_moments(data: Data, sites: Iterable[Site]) -> dict[str, Moments]:
    """Moments of what each of `sites` gives, without gain and bias, over all tokens that are no padding."""
    found: dict[str, Moments] = {}
    batch: dict = {}

    def watch(site: Site):
        def hook(module, args, kwargs):
            x = next(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)).double()
            n = rows(normalised(x, site.spec).movedim(site.spec.axes[0], -1), batch)
            n = n[n.isfinite().all(-1)]
            own = found.setdefault(site.path, Moments(0, n.new_zeros(n.shape[-1]), n.new_zeros(n.shape[-1:] * 2)))
            own.count += len(n)
            own.total += n.sum(0)
            own.square += n.T @ n

        return data.model.get_submodule(site.path).register_forward_pre_hook(hook, with_kwargs=True)

    handles = [watch(site) for site in sites]
    parameter = next(p for p in data.model.parameters() if p.is_floating_point())
    try:
        for done, inputs in enumerate(data.batches):
            batch = {key: to_model(value, parameter) for key, value in inputs.items()}
            data.model(**batch)
            data.progress("measuring streams", done + 1, len(data.batches))
    finally:
        for handle in handles:
            handle.remove()
    return found


def principal_axes(moments: list[Moments]) -> torch.Tensor:
    """R with the principal axes as rows, each signed so that its largest entry is positive."""
    axes = torch.linalg.eigh(sum(own.second for own in moments)).eigenvectors.flip(-1).T
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    return (axes * largest.sign()).contiguous()


def _reflected(
    data: Data, stream: RotatedStream, number: int, sites: list[Site], moments: dict[str, Moments]
) -> dict[str, torch.Tensor]:
    """The fitted tensors of one stream whose RMSNorms become LayerNorms."""
    read = [(moments[site.path], _reading(data, site)) for site in sites]
    v = least_felt(read)
    ones = torch.full_like(v, len(v) ** -0.5)
    v = v if v @ ones <= 0 else -v  # far from where it is taken to, the reflection is well conditioned
    tensors = {stream.rotation.fitted: v - ones, lost_direction(number): v}
    for site in sites:
        c, m = told_by_rest(moments[site.path], v)
        tensors |= {restored(site.path): c, f"{site.path}.bias": m * ones}
    return tensors


def _reading(data: Data, site: Site) -> torch.Tensor:
    """G of a norm: what its readers make of each direction, `(d, d)`, its gain in them."""
    tensors, d = data.model.state_dict(), site.spec.width
    total = torch.zeros(d, d, dtype=torch.float64)
    for name, axis in dict.fromkeys((reader.name, reader.axis) for reader in site.readers):
        w = tensors[name].double().movedim(axis, -1).reshape(-1, d)
        total += w.T @ w
    if site.spec.weight is not None:
        g = tensors[f"{site.path}.{site.spec.weight}"].double() + (1 if site.spec.gain == "1 + w" else 0)
        total *= torch.outer(g, g)
    return total


def least_felt(read: list[tuple[Moments, torch.Tensor]]) -> torch.Tensor:
    """The unit vector v with the least `sum_p (v^T C_p v)(v^T G_p v) / tr(G_p mean(n n^T))`.

    By L-BFGS from each of the directions with the least variance, the best of what is found: no chance in it.
    """
    parts = [(own.covariance, g / (g * own.second).sum().clamp(min=1e-300)) for own, g in read]
    starts = torch.linalg.eigh(sum(c for c, _ in parts)).eigenvectors[:, :_STARTS].T
    found = [_descended(parts, start) for start in starts]
    return min(found, key=lambda v: _felt(parts, v).item())


def _felt(parts: list[tuple[torch.Tensor, torch.Tensor]], v: torch.Tensor) -> torch.Tensor:
    return sum((v @ c @ v) * (v @ g @ v) for c, g in parts)


def _descended(parts: list[tuple[torch.Tensor, torch.Tensor]], start: torch.Tensor) -> torch.Tensor:
    v = start.clone().requires_grad_(True)
    search = torch.optim.LBFGS([v], max_iter=200, line_search_fn="strong_wolfe", tolerance_change=1e-12)

    def felt() -> torch.Tensor:
        search.zero_grad()
        loss = _felt(parts, v / v.norm())
        loss.backward()
        return loss

    with torch.enable_grad():
        search.step(felt)
    return (v / v.norm()).detach()


def told_by_rest(moments: Moments, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """c and m of the regression `v^T n = c^T n + m` on the part of n that is orthogonal to v; c is orthogonal to it."""
    d = len(v)
    rest = torch.eye(d, dtype=v.dtype) - torch.outer(v, v)
    c_v = moments.covariance @ v
    covariance = rest @ moments.covariance @ rest
    ridge = _RIDGE * covariance.trace() / d
    c = rest @ torch.linalg.solve(covariance + ridge * torch.eye(d, dtype=v.dtype), rest @ c_v)
    return c, v @ moments.mean - c @ moments.mean
