"""What was changed, and whether it is the same model, each in a sentence."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from normswap.planning.plans import Plan
from normswap.report.findings.model import Level, SiteRow, Training, Verdict
from normswap.report.kinds import kind_name
from normswap.verification.run import Report

#: KL in nats per token, and the share of tokens whose most probable successor stays, up to which a model is close to
#: another, and behind which it is far from it. Norms fitted by closed forms reach 0.01 and 91% on the small GPT-2 and
#: 0.07 and 81% on the small Llama; a sandwich without a fine-tune 0.25 and 59%.
CLOSE, FAR = (0.02, 0.9), (0.15, 0.65)
#: the same in relative errors, for outputs that are no distributions
CLOSE_ERROR, FAR_ERROR = 0.05, 0.3


def changed(plan: Plan, rows: Sequence[SiteRow]) -> str:
    """What a plan changed, in a sentence."""
    # where norms move, the kinds that some become on the way are part of that
    parts = [*_moved(plan), *(_exchanged(rows) if plan.request.norms or not plan.moved else ()), *_folded(plan)]
    if plan.request.qk_norm:
        parts.append(f"norms ({kind_name(plan.request.qk_norm)}) were put on the heads of queries and keys")
    if plan.rotated:
        parts.append(f"{len(plan.rotated)} stream{'s'[: len(plan.rotated) > 1]} carried in another basis")
    if not parts:
        return "No norm was changed." if not plan.edits else f"{plan.request.words()} at {len(plan.converted)} sites."
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def _exchanged(rows: Sequence[SiteRow]) -> list[str]:
    total = sum(row.count for row in rows if row.before is not None)
    kinds: Counter[tuple[str, str]] = Counter()
    for row in rows:
        if row.before is not None and row.after is not None and row.before.kind != row.after.kind:
            kinds[row.before.kind, row.after.kind] += row.count
    return [f"{n} of {total} norms changed from {kind_name(a)} to {kind_name(b)}" for (a, b), n in kinds.items()]


def _folded(plan: Plan) -> list[str]:
    if not plan.request.fold:
        return []
    return [f"gains and biases of {len(plan.converted)} norms were folded into the weights that read them"]


def _moved(plan: Plan) -> list[str]:
    moves = Counter((block.before, block.after) for block in plan.moved)
    chosen = any(placement.layers for placement in plan.request.placements)
    where = f" (layers {', '.join(p.layers or 'all' for p in plan.request.placements)})" if chosen else ""
    return [f"{n} residual blocks moved from {a} to {b} placement{where}" for (a, b), n in moves.items()]


def verdict(claim: str | None, reports: dict[str, Report], main: Report | None) -> Verdict:
    """The answer at a glance: is it still the same model?

    Args:
        claim: what the conversion promises; None for a comparison of two checkpoints.
        main: the measurement as the result is used.
    """
    if main is None:
        return Verdict(
            level="bad",
            headline="Not verified",
            sentence="Nothing was measured: whether this is the same model is not known.",
        )
    same = (reports.get("mathematics") or main).comparison
    if main.comparison.output.mismatched:
        return Verdict(
            level="bad",
            headline="Broken in places",
            sentence=f"{main.comparison.output.mismatched} of the outputs are finite in one of the two models only.",
        )
    if same.first_divergence is None and claim in (None, "exact"):
        return Verdict(level="good", headline="The same function", sentence=_same(reports, main))
    return _distance(main, _APART if claim is None else _FAR)


#: how far above its control a healed model may end, nats per token
HEALED = 0.03


def trained_verdict(found: Training) -> Verdict:
    """The answer of a fine-tune: how it does beside the unconverted model, trained as much if there is one."""
    scores = {name: values["mean"] for name, values in found.scores.items()}
    healed, beside = scores["healed"], scores.get("control", scores["source"])
    whose = "the unconverted model, trained as much" if "control" in scores else "the unconverted model"
    off = healed - beside
    text = f"On held-out data it scores {healed:.4f}, {abs(off):.4f} {'above' if off > 0 else 'below'} {whose}"
    if "start" in scores:
        text += f"; before training {scores['start']:.4f}"
    if off <= HEALED:
        headline = f"As good as {'its control' if 'control' in scores else 'the original'}"
        return Verdict(level="good", headline=headline, sentence=f"{text}.")
    worse = made_worse(found)
    headline = "Training made it worse" if worse else "Not healed yet"
    return Verdict(level="bad" if worse else "warn", headline=headline, sentence=f"{text}.")


def made_worse(found: Training) -> bool:
    """Whether training led away from held-out data.

    A taper starts at the original's own function, and what it leads away from there is the conversion's, not its own.
    """
    source, start, healed = (found.scores.get(name, {}).get("mean") for name in ("source", "start", "healed"))
    tapered = start is None or (source is not None and abs(start - source) < _SAME_SCORE)
    return not tapered and healed > start + _SAME_SCORE


_SAME_SCORE = 1e-3


def _same(reports: dict[str, Report], main: Report) -> str:
    found = (reports.get("mathematics") or main).comparison
    worst = found.output.error.max if found.output.error else 0.0
    sites = f" and what reaches {len(found.sites)} norms" if found.sites else ""
    text = f"The output{sites} agree to rounding: the worst of {tokens(main)} is off by {worst:.1e} in {found.dtype}"
    if "as stored" in reports and main.comparison.output.error:
        text += f", and by {main.comparison.output.error.max:.1e} with weights as stored"
    return f"{text}."


def of_text(report: Report) -> bool:
    """Whether rows of the output are predictions of tokens of a text."""
    return (
        report.comparison.output.top1 is not None
        and len(report.inputs) == 2
        and report.comparison.output.rows > 1
        and (report.comparison.output.rows >= report.inputs[0] * (report.inputs[1] - 1))
    )


def answer(report: Report) -> str:
    """What an output says first: the `next token` of a causal model, a `token` of another, else an `answer`."""
    if not of_text(report):
        return "answer"
    return "token" if report.comparison.output.cross_entropy_a is None else "next token"


def tokens(report: Report) -> str:
    """How many rows were compared, in words."""
    rows = report.comparison.output.rows
    return f"{rows:,} {'tokens' if of_text(report) else 'rows of the output'}"


_FAR: tuple[tuple[Level, str], ...] = (
    ("note", "Close to the original, not the same"),
    ("warn", "Near the original, and noticeably another"),
    ("bad", "Far from the original"),
)
#: the same of two checkpoints, of which neither need be the original
_APART: tuple[tuple[Level, str], ...] = (
    ("note", "Close, and not the same"),
    ("warn", "Alike, and noticeably different"),
    ("bad", "Far apart"),
)


def _distance(report: Report, words: tuple[tuple[Level, str], ...]) -> Verdict:
    """How far a model that is not the same is from the original."""
    output = report.comparison.output
    if output.kl is None or output.top1 is None:
        error = output.error.mean if output.error else math.inf
        far = (error > CLOSE_ERROR) + (error > FAR_ERROR)
        measured = f"outputs differ by {error:.1%} on average"
    else:
        far = max(_beyond(output.kl.mean, output.top1, CLOSE), 2 * _beyond(output.kl.mean, output.top1, FAR))
        what, each = answer(report), "token" if of_text(report) else "row"
        measured = (
            f"the most probable {what} is the same in {output.top1:.1%} of all cases, and the predictions differ by "
            f"{output.kl.mean:.2g} nats (KL) per {each} on average"
        )
    level, headline = words[far]
    return Verdict(
        level=level,
        headline=headline,
        sentence=f"It is not the same function: {measured}, over {tokens(report)}.",
    )


def _beyond(kl: float, top1: float, limits: tuple[float, float]) -> bool:
    return not (kl <= limits[0] and top1 >= limits[1])
