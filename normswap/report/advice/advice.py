"""All rules together, the worst that they find first."""

from __future__ import annotations

from collections.abc import Iterator

from normswap.report.advice import measurements, plans, training
from normswap.report.card import loading
from normswap.report.findings.model import Advice, Findings

_ORDER = ("bad", "warn", "note", "good")
_RULES = (*measurements.RULES, *plans.RULES, *training.RULES)


def advice(found: Findings) -> tuple[Advice, ...]:
    """Everything that a reader should know or do, the worst first."""
    said = [item for rule in _RULES for item in rule(found)]
    worst = {item.level for item in said} | ({found.verdict.level} if found.verdict is not None else set())
    if not worst & {"bad", "warn"}:
        said += _use(found)
    return tuple(sorted(said, key=lambda item: _ORDER.index(item.level)))


def _use(found: Findings) -> Iterator[Advice]:
    if found.kind == "comparison":
        if found.main is not None and found.main.comparison.first_divergence is None:
            yield Advice(level="good", what="Either checkpoint can stand for the other.")
    elif found.kind in ("conversion", "finetune"):
        how = f"`{loading(found.plan)}` loads it" if found.plan is not None else "The model card says how to load it"
        attempt = f"{how}; try it on your own task."
        yield Advice(level="good", what="Nothing here speaks against using it.", attempt=attempt)
