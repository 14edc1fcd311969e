"""Weighted ridge regression in closed form."""

from __future__ import annotations

import torch

# Sums over this many rows are exact enough in float32; they are added up in float64.
_CHUNK = 8192


class Ridge:
    """`min over A, b of sum_t w_t |T_t - h_t A - b|^2 + ridge lambda_0 |A|^2`, for several `T` and ridges in turn.

    `lambda_0` is the mean square of a feature times the number of rows, so that a ridge has no unit. The bias is not
    penalised: it is taken out by centring. The system is of the features, or of the rows if those are fewer.
    """

    def __init__(self, features: torch.Tensor, weights: torch.Tensor, bias: bool):
        """
        Args:
            features: `h`, `(rows, features)`.
            weights: `w`, `(rows,)`.
            bias: whether there is a `b`.
        """
        self.weights = weights / weights.mean()
        self.centre = self._mean(features) if bias else None
        self.root = self.weights.sqrt()[:, None].to(features.dtype)
        self.scaled = self.root * (features - self.centre.to(features.dtype) if bias else features)
        self.by_rows = len(features) < features.shape[1]
        rows = self.scaled.mT if self.by_rows else self.scaled
        self.gram = _product(rows, rows)
        self.unit = float(self.gram.diagonal().sum()) / features.shape[1]
        self.factors: dict[float, torch.Tensor] = {}

    def solve(self, targets: torch.Tensor, *ridges: float) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Per ridge `A`, `(features, channels)`, and `b`, `(channels,)`, in float64; `T` is `(rows, channels)`."""
        mean = self._mean(targets) if self.centre is not None else torch.zeros_like(targets[0], dtype=torch.float64)
        scaled = self.root * (targets - mean.to(targets.dtype))
        right = scaled.double() if self.by_rows else _product(self.scaled, scaled)
        found = []
        for ridge in ridges:
            solution = torch.cholesky_solve(right, self._factor(ridge))
            if self.by_rows:
                solution = self.scaled.mT.double() @ solution
            found.append((solution, mean if self.centre is None else mean - self.centre @ solution))
        return found

    def _factor(self, ridge: float) -> torch.Tensor:
        if ridge not in self.factors:
            system = self.gram.clone()
            system.diagonal().add_(ridge * self.unit)
            self.factors[ridge] = torch.linalg.cholesky(system)
        return self.factors[ridge]

    def _mean(self, rows: torch.Tensor) -> torch.Tensor:
        return (self.weights.double() @ rows.double()) / len(rows)


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a^T b` in float64."""
    total = torch.zeros(a.shape[1], b.shape[1], dtype=torch.float64, device=a.device)
    for rows, others in zip(a.split(_CHUNK), b.split(_CHUNK), strict=True):
        total += (rows.mT @ others).double()
    return total
