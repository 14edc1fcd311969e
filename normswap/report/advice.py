"""What to do next: rules that look at findings and say what is bad, and what to try. Each is a function of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from normswap.paths import folded
from normswap.report.findings.healing import recipe_for
from normswap.report.findings.model import Advice, Findings
from normswap.report.findings.words import CLOSE, CLOSE_ERROR, FAR, HEALED, made_worse

#: a tail is one where the 99.9th percentile lies so far above the median, and is felt at all
_TAIL_RATIO, _TAIL = 100, 0.1
#: KL or change of cross-entropy, nats per token, that rounding alone costs an exact conversion and people notice
_ROUNDING = 1e-3
#: part of a fitted norm's inputs at which it is flat, and its error, above which it stands badly for the old one
_FLAT, _MISFIT = 0.2, 0.3
_ORDER = ("bad", "warn", "note", "good")
HALVES = ("bfloat16", "float16")


def advice(found: Findings) -> tuple[Advice, ...]:
    """Everything that a reader should know or do, the worst first."""
    said = [item for rule in RULES for item in rule(found)]
    if not any(item.level in ("bad", "warn") for item in said):
        said += _use(found)
    return tuple(sorted(said, key=lambda item: _ORDER.index(item.level)))


def _use(found: Findings) -> Iterator[Advice]:
    if found.kind == "comparison":
        if found.main is not None and found.main.comparison.first_divergence is None:
            yield Advice(level="good", what="Either checkpoint can stand for the other.")
    elif found.kind in ("conversion", "finetune"):
        what = "Nothing here speaks against using it."
        yield Advice(level="good", what=what, attempt="Load it as the model card shows, and try it on your own task.")


def not_measured(found: Findings) -> Iterator[Advice]:
    if found.kind != "map" and found.main is None:
        yield Advice(
            level="bad",
            what="It was published without being measured (`--verify none`).",
            attempt="`normswap verify SOURCE OUT --report FILE` measures it now.",
        )


def not_calibrated(found: Findings) -> Iterator[Advice]:
    if found.claim == "untrained":
        yield Advice(
            level="bad",
            what="Nothing was fitted to data: every constant of the move is 1.",
            attempt="Convert with text (`--text FILE --tokens 32768`), or save a plan made with `--calibrate`.",
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
        yield Advice(level="bad" if bad else "warn", what=what, attempt=f"Before it is used: {_heal(found)}")
    else:
        yield Advice(
            level="note",
            what="It is close to the original, and not the same function.",
            attempt=f"Try it on your own task; what is left heals in a fine-tune: {_heal(found)}",
        )


def _heal(found: Findings) -> str:
    name = recipe_for(found.plan) if found.plan is not None else None
    if name is None:
        return (
            "fine-tune it (`normswap recipe list`), or calibrate on more text of yours (`--text FILE --tokens 32768`)."
        )
    return (
        f"`normswap finetune {name} model=SOURCE output=HEALED data.source=corpus.txt`. More calibration helps too: "
        f"`--text FILE --tokens 32768`."
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
    if found.claim != "exact" or report is None or report.stored[1] not in HALVES:
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


def shipped_text(found: Findings) -> Iterator[Advice]:
    plan = found.plan
    if plan is not None and plan.calibrated_on and "shipped" in plan.calibrated_on and found.kind == "conversion":
        yield Advice(
            level="note",
            what=f"It was calibrated on {plan.calibrated_on}, and fits that kind of text best.",
            attempt="Give text of what the model is for: `--text corpus.txt --tokens 32768`.",
        )


def sites_left_out(found: Findings) -> Iterator[Advice]:
    if found.plan is not None and found.plan.refused:
        shown = [name for name, _ in folded([(refusal.site, "") for refusal in found.plan.refused])]
        names = ", ".join(shown[:3]) + (" ..." if len(shown) > 3 else "")
        yield Advice(
            level="note",
            what=f"Not all that was asked for was done; as they were: {names}.",
            attempt="The plan below says why for each.",
        )
    if found.local is not None and (unmatched := found.local.comparison.unmatched):
        yield Advice(
            level="warn" if found.claim == "exact" else "note",
            what=f"{len(unmatched)} norms run in one model only, or not alike: {', '.join(unmatched[:3])}.",
            attempt="They are in no number here: compare the models' outputs on your own task.",
        )


def parting(found: Findings) -> Iterator[Advice]:
    """Where two checkpoints part that were to be the same."""
    if found.kind != "comparison" or found.main is None:
        return
    at = found.main.comparison.first_divergence
    if at is not None:
        known = found.plan is not None and found.claim != "exact"
        attempt = (
            f"The second is a conversion that is not exact. {_heal(found)}"
            if known
            else (
                "If they were to be the same: look at what was done to that site, or convert the source again. "
                "Half-precision weights are compared with `--dtype float32`."
            )
        )
        where = "at the output" if at == "output" else f"at {at}"
        level = found.verdict.level if found.verdict is not None and known else "warn"
        yield Advice(level=level, what=f"The two part first {where}.", attempt=attempt)


def misfits(found: Findings) -> Iterator[Advice]:
    fitted = found.plan.fitted_norms if found.plan is not None and found.kind == "conversion" else ()
    flat = [norm for norm in fitted if (norm.flat or 0) > _FLAT]
    poor = [norm for norm in fitted if norm.error > _MISFIT]
    if flat:
        worst = max(flat, key=lambda norm: norm.flat)
        yield Advice(
            level="warn",
            what=f"At {len(flat)} sites the new norm is flat for many inputs ({worst.flat:.0%} at {worst.site}): they "
            f"tell it nothing.",
            attempt="Leave these sites out (`--sites`), or take a kind that saturates nowhere (`--norm none`).",
        )
    if poor:
        worst = max(poor, key=lambda norm: norm.error)
        yield Advice(
            level="warn",
            what=f"{len(poor)} of {len(fitted)} new norms follow the old ones badly (an error of {worst.error:.0%} at "
            f"{worst.site}).",
            attempt="Calibrate on more tokens (`--tokens 32768`), leave them out (`--sites`), or heal it.",
        )


def costly_layers(found: Findings) -> Iterator[Advice]:
    """One or two layers that carry most of what a move costs."""
    layers = {(b.name.rpartition("[")[0], b.layer): b.kl for b in (found.plan.moved if found.plan else ()) if b.kl}
    total = sum(layers.values())
    if len(layers) < 4 or found.claim == "exact":
        return
    (stream, layer), worst = max(layers.items(), key=lambda item: item[1])
    if worst > 0.5 * total and worst > CLOSE[0] / 2:
        yield Advice(
            level="warn",
            what=f"Layer {layer} of {stream} costs {worst / total:.0%} of what all layers cost if each is moved alone.",
            attempt="Keep it where it is: `--layers` with the others, or `--layers auto:0.01`.",
        )


def writes_otherwise(found: Findings) -> Iterator[Advice]:
    samples = found.generation.samples if found.generation else ()
    differing = [s.first_difference for s in samples if s.first_difference is not None]
    if not differing:
        return
    exact = found.claim == "exact"
    what = f"{len(differing)} of {len(samples)} greedy texts differ, the first after {min(differing)} tokens."
    if exact:
        yield Advice(level="note", what=f"{what} Two tokens that are as probable may change places by rounding.")
    elif len(differing) == len(samples) and max(differing) < 4:
        yield Advice(level="warn", what=f"{what} It writes other things from the start.", attempt="Read them below.")


def training(found: Findings) -> Iterator[Advice]:
    if found.training is None:
        return
    scores = {name: values["mean"] for name, values in found.training.scores.items()}
    healed, start, control, source = (scores.get(name) for name in ("healed", "start", "control", "source"))
    if healed is None:
        return
    if control is None:
        yield Advice(
            level="note",
            what="There is no control, so what training alone would have done is not known.",
            attempt="`control: true` trains the unconverted model as much.",
        )
    elif healed > control + HEALED:
        yield Advice(
            level="warn",
            what=f"It ends {healed - control:.3f} nats above its control, the unconverted model trained as much.",
            attempt="Train for longer (`stages.0.tokens`), or with the original as a teacher (`objective: distill`).",
        )
    elif start is None or healed <= start:
        yield Advice(level="good", what=f"Its held-out loss is {healed - control:+.4f} nats beside its control.")
    if None not in (control, source) and control > source + HEALED / 2:
        yield Advice(
            level="warn",
            what=f"The control became worse by {control - source:.3f} nats as well: it is the training, not the norms.",
            attempt="A lower `stages.0.learning_rate`, or more text than so few tokens.",
        )
    if made_worse(found.training):
        yield Advice(
            level="warn",
            what=f"Training made it worse: {start:.4f} before, {healed:.4f} after.",
            attempt="Lower `stages.0.learning_rate`, a warmup, more text than a few passes, or a slower taper.",
        )


RULES: tuple[Callable[[Findings], Iterator[Advice]], ...] = (
    not_measured, not_calibrated, half_finite, far_away, long_tail, rounding, random_inputs, shipped_text,
    sites_left_out, parting, misfits, costly_layers, writes_otherwise, training,
)  # fmt: skip
