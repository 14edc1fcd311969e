"""How far two outputs differ, token by token: numbers whose mean cannot hide their tail."""

from __future__ import annotations

from collections.abc import Callable

import torch

from normswap.verification.histogram import Histogram, histogram
from normswap.verification.record import Record

# Float64 copies of logits are made for this many values at a time (8 MiB).
_CHUNK = 2**20
# Tokens shown before and after the worst one.
_BEFORE, _AFTER = 6, 3
# How many of the worst tokens are kept.
_WORST = 8


class Worst(Record):
    """Where a measurement is worst.

    Attributes:
        sequence, position: of the row, counted over everything that was run; position 0 for one row per sequence.
        before, token, after: the input around it as text, None without a tokenizer.
    """

    sequence: int
    position: int
    before: str | None = None
    token: str | None = None
    after: str | None = None


class WorstToken(Worst):
    """One of the tokens that are worst.

    Attributes:
        value: what was measured there.
        chosen_a, chosen_b: the token that each model holds most probable there, None without a tokenizer.
    """

    value: float
    chosen_a: str | None = None
    chosen_b: str | None = None


class Stat(Record):
    """One measurement over all tokens. `p99`, `p999`: 99% and 99.9% of the tokens lie at or below it.

    `p99` and `histogram` are None in reports of versions that did not measure them; the histogram is kept of `error`
    and `kl` alone.
    """

    mean: float
    median: float
    p99: float | None = None
    p999: float
    max: float
    worst: Worst
    histogram: Histogram | None = None


class TokenMetrics(Record):
    """Output B against output A. Each row is one token (or one example, for outputs without positions).

    Attributes:
        rows: rows compared.
        error: `||b - a|| / ||a||` of each row, over finite values.
        kl: `KL(A || B)` of each row's softmax, nats; None where rows are no distributions.
        top1: share of rows whose largest entry is the same; None likewise.
        cross_entropy_a, cross_entropy_b: `-log p(target)`, nats; None without targets.
        cross_entropy_change: `|b's - a's|` of each row, nats; None without targets.
        mismatched: rows in which one output is not finite where the other is, or is another kind of not finite.
            They count in nothing else.
        not_finite: rows with NaN or inf, or nothing finite, in both outputs alike. They count in nothing else.
        worst_tokens: those of the largest `kl`, or `error` where there is none, the worst first.
    """

    rows: int
    error: Stat | None
    kl: Stat | None = None
    top1: float | None = None
    cross_entropy_a: Stat | None = None
    cross_entropy_b: Stat | None = None
    cross_entropy_change: Stat | None = None
    mismatched: int = 0
    not_finite: int = 0
    worst_tokens: tuple[WorstToken, ...] = ()


def compare_logits(a: torch.Tensor, b: torch.Tensor, targets: torch.Tensor | None = None) -> TokenMetrics:
    """Compare logits `a` and `b`, each `(.., vocab)`; `targets`, `(..)`, are the ids to be predicted, -100: none."""
    comparison = TokenComparison()
    comparison.add(a, b, targets)
    return comparison.metrics()


class TokenComparison:
    """Gathers per-row measurements of outputs that come batch by batch; keeps a few numbers per row, no logits.

    Args:
        distributions: whether rows are logits, so that KL and top-1 mean something.
        decode: ids -> text, to show the worst token; None: no text.
    """

    def __init__(self, distributions: bool = True, decode: Callable[[list[int]], str] | None = None):
        self._distributions = distributions
        self._decode = decode
        self._scores: dict[str, list[torch.Tensor]] = {}
        self._ids: list[torch.Tensor] = []
        self._sequences = self._width = 0

    def add(
        self, a: torch.Tensor, b: torch.Tensor, targets: torch.Tensor | None = None, ids: torch.Tensor | None = None
    ) -> None:
        """Take in one batch.

        Args:
            a, b: outputs of the same shape `(batch, .., width)`.
            targets: `(batch, ..)`, ids to be predicted at each row, -100 where there is none.
            ids: `(batch, length)`, the input, if row `i` of a sequence belongs to its token `i`.

        Raises:
            ValueError: the shapes differ.
        """
        if a.shape != b.shape:
            raise ValueError(f"outputs to compare must have one shape, found {tuple(a.shape)} and {tuple(b.shape)}")
        batch, width = a.shape[0], a.shape[-1]
        self._width = width
        a, b = a.reshape(-1, width), b.reshape(-1, width)
        positions = len(a) // batch
        row = torch.arange(len(a))
        self._keep("sequence", self._sequences + row // positions)
        self._keep("position", row % positions)
        self._sequences += batch
        if ids is not None:
            self._ids.extend(ids.cpu())
        targets = None if targets is None else targets.reshape(-1)
        step = max(1, _CHUNK // width)
        for start in range(0, len(a), step):
            part = slice(start, start + step)
            wanted = None if targets is None else targets[part]
            for name, values in _row_scores(a[part], b[part], wanted, self._distributions).items():
                self._keep(name, values)

    def _keep(self, name: str, values: torch.Tensor) -> None:
        self._scores.setdefault(name, []).append(values.cpu())

    def metrics(self) -> TokenMetrics:
        """Aggregate what was added so far."""
        scores = {name: torch.cat(parts) for name, parts in self._scores.items()}
        good = ~(scores["mismatched"] | scores["not_finite"])
        top1 = scores["top1"][good].double() if "top1" in scores else torch.empty(0)

        def stat(name: str) -> Stat | None:
            return self._stat(scores, name, good) if name in scores else None

        return TokenMetrics(
            rows=int(good.sum()),
            error=stat("error"),
            kl=stat("kl"),
            top1=top1.mean().item() if len(top1) else None,
            cross_entropy_a=stat("cross_entropy_a"),
            cross_entropy_b=stat("cross_entropy_b"),
            cross_entropy_change=stat("cross_entropy_change"),
            mismatched=int(scores["mismatched"].sum()),
            not_finite=int(scores["not_finite"].sum()),
            worst_tokens=self._worst_tokens(scores, "kl" if "kl" in scores else "error", good),
        )

    def _worst_tokens(self, scores: dict[str, torch.Tensor], name: str, good: torch.Tensor) -> tuple[WorstToken, ...]:
        counted = torch.nonzero(good & ~scores[name].isnan()).flatten()
        values = scores[name][counted]
        worst = counted[values.argsort(descending=True, stable=True)[:_WORST]].tolist()
        return tuple(self._worst_token(scores, row, scores[name][row].item()) for row in worst)

    def _worst_token(self, scores: dict[str, torch.Tensor], row: int, value: float) -> WorstToken:
        at = self._locate(int(scores["sequence"][row]), int(scores["position"][row]))
        chosen = {}
        # rows are of the vocabulary, and not of labels, where every token of the input has a place in them
        if at.token is not None and "chosen_a" in scores and max(int(ids.max()) for ids in self._ids) < self._width:
            chosen = {name: self._decode([int(scores[name][row])]) for name in ("chosen_a", "chosen_b")}
        return WorstToken(**at.model_dump(), value=value, **chosen)

    def _stat(self, scores: dict[str, torch.Tensor], name: str, good: torch.Tensor) -> Stat | None:
        counted = torch.nonzero(good & ~scores[name].isnan()).flatten()
        if len(counted) == 0:
            return None
        values = scores[name][counted]
        worst = counted[values.argmax()]
        return Stat(
            mean=values.mean().item(),
            # an order statistic, not an interpolation: an infinity stays one
            median=values.quantile(0.5, interpolation="lower").item(),
            p99=values.quantile(0.99, interpolation="higher").item(),
            p999=values.quantile(0.999, interpolation="higher").item(),
            max=values.max().item(),
            worst=self._locate(int(scores["sequence"][worst]), int(scores["position"][worst])),
            histogram=histogram(values) if name in ("error", "kl") else None,
        )

    def _locate(self, sequence: int, position: int) -> Worst:
        if self._decode is None or not self._ids:
            return Worst(sequence=sequence, position=position)
        ids = self._ids[sequence].tolist()
        return Worst(
            sequence=sequence,
            position=position,
            before=self._decode(ids[max(0, position - _BEFORE) : position]),
            token=self._decode(ids[position : position + 1]),
            after=self._decode(ids[position + 1 : position + 1 + _AFTER]),
        )


def _row_scores(
    a: torch.Tensor, b: torch.Tensor, targets: torch.Tensor | None, distributions: bool
) -> dict[str, torch.Tensor]:
    """Measurements of each row of `a` and `b`, `(rows, width)`, in float64. NaN: not measured in that row.

    Entries that are -inf in both (a masked part of the vocabulary) have probability 0 in both and are left out.
    """
    a, b = a.double(), b.double()
    if all_finite(a) and all_finite(b):
        finite = None
        mismatched = not_finite = torch.zeros(len(a), dtype=torch.bool, device=a.device)
        whole, change = a, b - a
    else:
        finite = a.isfinite() & b.isfinite()
        mismatched = ~(finite | (a == b) | (a.isnan() & b.isnan())).all(-1)
        # -inf in places is a masked vocabulary; NaN, +inf, or nothing but -inf is no distribution
        not_finite = ~mismatched & (~(a < torch.inf).all(-1) | ~finite.any(-1))
        whole, change = torch.where(finite, a, 0.0), torch.where(finite, b - a, 0.0)
    scores = {
        "mismatched": mismatched,
        "not_finite": not_finite,
        "error": ratio(change.norm(dim=-1), whole.norm(dim=-1)),
    }
    if distributions:
        log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
        scores["kl"] = _kl(log_p, log_q, finite)
        # the entry B likes best must be (one of) the best of A: a tie in A decides nothing
        best, scores["chosen_a"] = a.max(-1)
        scores["chosen_b"] = b.argmax(-1)
        scores["top1"] = a.gather(-1, scores["chosen_b"].unsqueeze(-1)).squeeze(-1) == best
        if targets is not None:
            scores["cross_entropy_a"] = _cross_entropy(log_p, targets)
            scores["cross_entropy_b"] = _cross_entropy(log_q, targets)
            scores["cross_entropy_change"] = (scores["cross_entropy_b"] - scores["cross_entropy_a"]).abs()
    return scores


def _kl(log_p: torch.Tensor, log_q: torch.Tensor, finite: torch.Tensor | None) -> torch.Tensor:
    """`KL = sum p (log p - log q) = sum p (e^d - 1 - d)` with `d = log q - log p`, as p and q both sum to one.

    The second form has no cancellation: every term is positive, so a KL of 1e-25 is not lost in roundings of 1e-16.

    Args:
        finite: which entries count; None: all.
    """
    d = log_q - log_p if finite is None else torch.where(finite, log_q - log_p, 0.0)
    p = log_p.exp()
    # near 0 the difference expm1(d) - d cancels too: there its series, exact to 1e-9 for |d| < 1e-4
    near = d.abs() < 1e-4
    terms = p * d * d * (0.5 + d / 6)
    if not near.all():
        # for large d, e^d may overflow where p underflows: p e^d is q
        far = log_q.exp() - p - p * d
        terms = torch.where(near, terms, torch.where(d < 1, p * (torch.expm1(d) - d), far))
    return terms.sum(-1) if finite is None else torch.where(finite, terms, 0.0).sum(-1)


def _cross_entropy(log_p: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """`-log p(target)` of each row; NaN where the target is -100."""
    wanted = targets.clamp(min=0).unsqueeze(-1)
    found = -log_p.gather(-1, wanted).squeeze(-1)
    return torch.where(targets >= 0, found, torch.nan)


def all_finite(values: torch.Tensor) -> bool:
    """Whether no value is infinite or NaN, in one pass and without memory of the values' size."""
    return not values.numel() or bool(torch.stack(values.aminmax()).isfinite().all())


def ratio(part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """`part / whole`, 0 where `part` is 0."""
    return torch.where(part == 0, 0.0, part / whole)
