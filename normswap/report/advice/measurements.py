"""Rules on what was measured: how far the result is from the original, in what, and what that may come from."""

from __future__ import annotations

from collections.abc import Iterator

from normswap.report.advice.heal import heal
from normswap.report.findings.model import Advice, Findings
from normswap.report.findings.words import CLOSE, CLOSE_ERROR, FAR

#: a tail is one where the 99.9th percentile lies so far above the median, and is felt at all
_TAIL_RATIO, _TAIL = 100, 0.1
#: KL, nats per token, that rounding alone costs an exact conversion and people notice
_ROUNDING = 1e-3
_HALVES = ("bfloat16", "float16")


def not_measured(found: Findings) -> Iterator[Advice]:
    if found.kind != "map" and found.main is None:
        yield Advice(
            level="bad",
            what="It was published without being measured (`--verify none`).",
            attempt="`normswap verify SOURCE OUT --report FILE` measures it now.",
        )


def measured_little(found: Findings) -> Iterator[Advice]:
    if found.kind == "conversion" and set(found.reports) == {"mathematics"}:
        yield Advice(
            level="note",
            what="It was measured on few tokens, without rounding (`--verify fast`): not as it is stored.",
            attempt="`--verify full` measures that too, on more tokens, and lets both models write.",
        )


def half_finite(found: Findings) -> Iterator[Advice]:
    if found.main is not None and (count := found.main.comparison.output.mismatched):
        stored = found.main.stored[1]
        wider = "bfloat16 or float32" if stored == "float16" else "float32"
        yield Advice(
            level="bad",
            what=f"{count} rows of the output are finite in one of the two models only; they are in no number here.",
            attempt=f"Weights are stored in {stored}: store and run them in {wider} (`--dtype`).",
        )


def far_away(found: Findings) -> Iterator[Advice]:
    """A result that is another function, and noticeably so."""
    if found.main is None or found.claim == "exact" or found.kind != "conversion":
        return
    output = found.main.comparison.output
    if output.kl is None or output.top1 is None:
        close, bad = output.error is None or output.error.mean <= CLOSE_ERROR, False
        what = "" if output.error is None else f"Outputs differ by {output.error.mean:.1%} on average."
    else:
        close = output.kl.mean <= CLOSE[0] and output.top1 >= CLOSE[1]
        bad = output.kl.mean > FAR[0] or output.top1 < FAR[1]
        what = f"In {100 * (1 - output.top1):.0f} of 100 cases the most probable answer is another one."
    if not close:
        yield Advice(level="bad" if bad else "warn", what=what, attempt=f"Before it is used: {heal(found)}")
    else:
        yield Advice(
            level="note",
            what="It is close to the original, and not the same function.",
            attempt=f"Try it on your own task; what is left heals in a fine-tune: {heal(found)}",
        )


def long_tail(found: Findings) -> Iterator[Advice]:
    if found.main is None or (kl := found.main.comparison.output.kl) is None:
        return
    if kl.p999 > _TAIL and kl.p999 > _TAIL_RATIO * max(kl.median, 1e-12):
        first = sum(token.position == 0 for token in found.main.comparison.output.worst_tokens)
        where = " Most of the worst stand at position 0." if first > 4 else ""
        yield Advice(
            level="warn",
            what=f"A few tokens are far worse than the rest: the median KL is {kl.median:.1g}, and one token in a "
            f"thousand is above {kl.p999:.2g} nats.{where}",
            attempt="Look at the worst tokens below. A constant cannot follow tokens whose scale is far from all "
            "others': leave out the layers where it hurts (`--layers auto:0.01`), or heal with distillation.",
        )


def rounding(found: Findings) -> Iterator[Advice]:
    """What storing in half precision costs a conversion that is exact."""
    report = found.reports.get("as stored")
    if found.claim != "exact" or report is None or report.stored[1] not in _HALVES:
        return
    output = report.comparison.output
    cost = max(output.kl.mean if output.kl else 0.0, 0.0)
    level = "warn" if cost > _ROUNDING else "note"
    size = (
        f"{cost:.1g} nats per token" if output.kl else f"{output.error.mean:.1g} of the output" if output.error else "?"
    )
    yield Advice(
        level=level,
        what=f"The mathematics is exact; rounding the new weights to {report.stored[1]} costs {size}.",
        attempt="`--dtype float32` stores them without that.",
    )


def random_inputs(found: Findings) -> Iterator[Advice]:
    if found.main is not None and found.main.text.startswith("random"):
        yield Advice(
            level="note",
            what=f"It was measured on {found.main.text}, which says little of real inputs.",
            attempt="Put the tokenizer's files beside the weights, or compare outputs on inputs of your own.",
        )


def parting(found: Findings) -> Iterator[Advice]:
    """Where two checkpoints part that were to be the same."""
    if found.kind != "comparison" or found.main is None:
        return
    at = found.main.comparison.first_divergence
    if at is not None:
        known = found.plan is not None and found.claim != "exact"
        attempt = (
            f"The second is a conversion that is not exact. {heal(found)}"
            if known
            else (
                "If they were to be the same: look at what was done to that site, or convert the source again. "
                "Half-precision weights are compared with `--dtype float32`."
            )
        )
        where = "at the output" if at == "output" else f"at {at}"
        level = found.verdict.level if found.verdict is not None and known else "warn"
        yield Advice(level=level, what=f"The two part first {where}.", attempt=attempt)


def writes_otherwise(found: Findings) -> Iterator[Advice]:
    samples = found.generation.samples if found.generation else ()
    differing = [s.first_difference for s in samples if s.first_difference is not None]
    if not differing or found.kind == "finetune":  # which is to write something else
        return
    exact = found.claim == "exact"
    what = f"{len(differing)} of {len(samples)} greedy texts differ, the first after {min(differing)} tokens."
    if exact:
        yield Advice(level="note", what=f"{what} Two tokens that are as probable may change places by rounding.")
    elif len(differing) == len(samples) and max(differing) < 4:
        yield Advice(level="warn", what=f"{what} It writes other things from the start.", attempt="Read them below.")


RULES = (
    not_measured,
    measured_little,
    half_finite,
    far_away,
    long_tail,
    rounding,
    random_inputs,
    parting,
    writes_otherwise,
)
