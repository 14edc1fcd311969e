"""Rules on the plan: what it was fitted to, how well, and what it leaves out."""

from __future__ import annotations

from collections.abc import Iterator

from normswap.paths import folded
from normswap.report.findings.model import Advice, Findings
from normswap.report.findings.words import CLOSE

#: part of a fitted norm's inputs at which it is flat, and its error, above which it stands badly for the old one
_FLAT, _MISFIT = 0.2, 0.3


def not_calibrated(found: Findings) -> Iterator[Advice]:
    if found.claim == "untrained":
        yield Advice(
            level="bad",
            what="Nothing was fitted to data: every constant of the move is 1.",
            attempt="Convert with text (`--text FILE --tokens 32768`), or save a plan made with `--calibrate`.",
        )


def shipped_text(found: Findings) -> Iterator[Advice]:
    plan = found.plan
    fitted = plan is not None and plan.calibrated_on and found.claim != "exact" and found.kind == "conversion"
    if fitted and "shipped" in plan.calibrated_on:
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
            level="warn" if found.to_be_same else "note",
            what=f"{len(unmatched)} norms run in one model only, or not alike: {', '.join(unmatched[:3])}.",
            attempt="They are in no number here: compare the models' outputs on your own task.",
        )


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


RULES = (not_calibrated, shipped_text, sites_left_out, misfits, costly_layers)
