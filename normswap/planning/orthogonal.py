"""Orthogonal matrices R as data, and their products with tensors.

`hadamard`: R = (H_1 kron H_2 ..) diag(s) with random signs s, all entries of R +-1/sqrt(width) where the width is a
power of two times the order of a Paley matrix (12, 20, 28, 36, ..). For other widths the odd part m of the width gets
an orthonormal DCT-II of size m in place of a Hadamard matrix. Kept in factors, of at most 64 rows but for the one of
the odd part, so that a product costs the sum of their sizes per value, and not the width.

`random`: Q of the QR decomposition of a Gaussian matrix, its columns signed as if R had a positive diagonal (uniform
over the orthogonal group; Mezzadri, 2007).

`fitted`: a matrix that calibration found (the principal axes of the stream). `reflected`: `I - 2 u u^T / (u^T u)` for a
vector u that it found (Householder).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict

_SYLVESTER = 64  # rows of one factor at most


class Rotation(BaseModel):
    """An orthogonal matrix of `width` rows.

    Attributes:
        by: how it is made, see above.
        seed: of its signs or of the Gaussian.
        fitted: name of the matrix or vector that calibration found.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    by: Literal["hadamard", "random", "fitted", "reflected"]
    width: int
    seed: int = 0
    fitted: str | None = None

    def words(self) -> str:
        match self.by:
            case "hadamard" | "random":
                return f"{self.by}, seed {self.seed}"
            case "reflected":
                return "a reflection found on data"
        return "principal axes found on data"

    def turn(self, x: torch.Tensor, axis: int, read: Callable[[str], torch.Tensor], back: bool = False) -> torch.Tensor:
        """`R x`, or `R^T x` where `back`, along each run of `width` values of `axis`.

        Args:
            x: in float64; without values (on the meta device) it comes back as it is.
            read: gives the fitted tensor by its name.

        Raises:
            ValueError: the axis does not hold whole runs.
        """
        if x.shape[axis] % self.width:
            raise ValueError(f"expected an axis that holds runs of {self.width} values, found {x.shape[axis]}")
        if x.is_meta:
            return x
        axis %= x.ndim
        split = x.unflatten(axis, (-1, self.width)).movedim(axis + 1, -1)
        match self.by:
            case "hadamard":
                split = _by_factors(split, hadamard_factors(self.width), _signs(self.width, self.seed), back)
            case "reflected":
                u = read(self.fitted)
                u = u / u.norm()
                split = split - 2 * (split @ u).unsqueeze(-1) * u
            case _:
                r = random_rotation(self.width, self.seed) if self.by == "random" else read(self.fitted)
                split = split @ (r if back else r.T)
        return split.movedim(-1, axis + 1).flatten(axis, axis + 1)


def _by_factors(x: torch.Tensor, factors: tuple[torch.Tensor, ...], signs: torch.Tensor, back: bool) -> torch.Tensor:
    """The product of the last axis with `(H_1 kron H_2 ..) diag(s)`, or with its transpose."""
    split = (x if back else x * signs).unflatten(-1, [len(factor) for factor in factors])
    for dim, factor in enumerate(factors, start=-len(factors)):
        split = (split.movedim(dim, -1) @ (factor if back else factor.T)).movedim(-1, dim)
    made = split.flatten(-len(factors))
    return made * signs if back else made


@lru_cache(maxsize=8)
def hadamard_factors(width: int) -> tuple[torch.Tensor, ...]:
    """Orthogonal matrices in float64 whose Kronecker product has `width` rows."""
    odd = width // (width & -width)
    orders = (m for m in (odd << k for k in range(12)) if m > 2 and width % m == 0)
    found = next((h for m in orders if (h := _paley(m)) is not None), None) if odd > 1 else None
    core = [] if odd == 1 else [_dct(odd) if found is None else found / math.sqrt(len(found))]
    rest = width // math.prod(len(factor) for factor in core)
    sizes = []
    while rest > 1:
        sizes.append(min(rest, _SYLVESTER))
        rest //= sizes[-1]
    return (*(_sylvester(n) / math.sqrt(n) for n in sizes), *core) or (torch.ones(1, 1, dtype=torch.float64),)


@lru_cache(maxsize=2)
def random_rotation(width: int, seed: int) -> torch.Tensor:
    """A random orthogonal matrix in float64."""
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def _signs(width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2.0 * torch.randint(0, 2, (width,), generator=generator).double() - 1


def _sylvester(n: int) -> torch.Tensor:
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


def _paley(order: int) -> torch.Tensor | None:
    """A Hadamard matrix by the quadratic residues of a prime (Paley, 1933): order q + 1 or 2 (q + 1). None: no such."""
    if order % 4:
        return None
    for q, doubled in ((order - 1, False), (order // 2 - 1, True)):
        if not _is_prime(q) or q % 4 != (1 if doubled else 3):
            continue
        squares = {i * i % q for i in range(1, q)}
        residue = torch.tensor([0.0, *(1.0 if i in squares else -1.0 for i in range(1, q))], dtype=torch.float64)
        conference = torch.zeros(q + 1, q + 1, dtype=torch.float64)
        index = torch.arange(q)
        conference[1:, 1:] = residue[(index.unsqueeze(1) - index) % q]
        conference[0, 1:] = 1
        conference[1:, 0] = 1 if doubled else -1
        one = torch.eye(q + 1, dtype=torch.float64)
        if not doubled:
            return conference + one
        pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        turned_pair = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(conference, pair) + torch.kron(one, turned_pair)
    return None


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % i for i in range(2, math.isqrt(n) + 1))


def _dct(n: int) -> torch.Tensor:
    """The orthonormal DCT-II."""
    k = torch.arange(n, dtype=torch.float64)
    rows = torch.cos(math.pi / n * (k + 0.5) * k.unsqueeze(1)) * math.sqrt(2 / n)
    rows[0] /= math.sqrt(2)
    return rows
