"""Whether it is still the same model: the numbers, how they are spread over tokens, and the worst of these."""

from __future__ import annotations

import math
from typing import Any

from normswap.report.card import SCORES
from normswap.report.findings.model import Findings
from normswap.report.findings.words import of_text
from normswap.report.page.chart import figure
from normswap.report.page.distribution import distribution_chart
from normswap.verification.metrics import Stat, TokenMetrics
from normswap.verification.run import Report

_TITLES = {
    "mathematics": "The mathematics: original and plan, without rounding",
    "as stored": "As stored: the new folder against the original",
    "compared": "One against the other",
}


def parts(found: Findings) -> dict[str, Any]:
    """Tables of what was measured, the distribution over tokens, and the worst tokens."""
    output = found.main.comparison.output if found.main else None
    spread, why = _distribution(found, output)
    return {
        "comparisons": [_comparison(name, report, found) for name, report in found.reports.items()],
        "distribution": spread,
        "not_spread": why,
        "worst": _worst(found, output),
    }


def _comparison(name: str, report: Report, found: Findings) -> dict[str, Any]:
    output = report.comparison.output
    names = ("first", "second") if found.kind == "comparison" else ("original", "this one")
    stats = {
        "relative error": output.error,
        "KL, nats": output.kl,
        f"cross-entropy, {names[0]}": output.cross_entropy_a,
        f"cross-entropy, {names[1]}": output.cross_entropy_b,
        "change of that": output.cross_entropy_change,
    }
    title = "The result against the source" if found.kind == "finetune" else _TITLES[name]
    return {
        "title": title,
        # what is not exact differs by its mathematics: that it also rounds is seen in no number
        "folded": name == "mathematics" and found.claim != "exact" and found.main is not report,
        "conditions": _conditions(report),
        "rows": [_row(words, stat) for words, stat in stats.items() if stat is not None],
        "facts": _facts(report, names),
    }


def _row(name: str, stat: Stat) -> dict[str, Any]:
    values = (stat.mean, stat.median, stat.p99, stat.p999, stat.max)
    words = (lambda value: f"{value:.4f}") if name.startswith("cross") else figure
    return {"name": name, "values": ["\u2013" if value is None else words(value) for value in values]}


def _conditions(report: Report) -> str:
    """What was run, in which precision."""
    stored = " and ".join(dict.fromkeys(report.stored))
    sizes = " \u00d7 ".join(map(str, report.inputs))
    weights = "" if stored == report.comparison.dtype else f", weights stored in {stored}"
    return f"{report.text}, {sizes}; computed in {report.comparison.dtype} on {report.device}{weights}"


def _facts(report: Report, names: tuple[str, str]) -> list[str]:
    output = report.comparison.output
    facts = []
    if output.top1 is not None:
        what, where = ("token", "positions") if of_text(report) else ("answer", "rows")
        facts.append(f"The most probable {what} is the same at {output.top1:.2%} of {output.rows:,} {where}.")
    if output.cross_entropy_a is not None and output.cross_entropy_b is not None:
        a, b = output.cross_entropy_a.mean, output.cross_entropy_b.mean
        perplexities = [f"{math.exp(min(value, 700)):.4g}" for value in (a, b)]
        change = f"{b - a:+.1e} nats per token" if b != a else "no change"
        facts.append(f"Perplexity {perplexities[0]} ({names[0]}), {perplexities[1]} ({names[1]}): {change}.")
    if output.mismatched:
        facts.append(f"{output.mismatched} rows are finite in one model only, and in no number.")
    if output.not_finite:
        facts.append(f"{output.not_finite} rows are not finite in either, and in no number.")
    return facts


def _distribution(found: Findings, output: TokenMetrics | None) -> tuple[dict[str, Any] | None, str]:
    if output is None:
        return None, ""
    stat, what = (output.kl, "KL, nats") if output.kl is not None else (output.error, "relative error")
    if stat is None:
        return None, "No row of the output could be compared."
    if stat.histogram is None:
        return None, "The distribution over tokens was not measured by the version of normswap that made this folder."
    if not stat.histogram.counts:
        return None, f"There is no distribution to draw: the {what.partition(',')[0]} of every token is 0."
    return {
        "title": f"How the {what.partition(',')[0]} is spread over {'tokens' if of_text(found.main) else 'rows'}",
        "svg": distribution_chart(stat, f"{what} per token" if "KL" in what and of_text(found.main) else what),
        "caption": _caption(stat),
    }, ""


def _caption(stat: Stat) -> str:
    tail = f"; one in a hundred is above {stat.p99:.2g}" if stat.p99 is not None else ""
    zero = f" {stat.histogram.zero} that are 0 are not shown." if stat.histogram.zero else ""
    return f"Half of them lie below {stat.median:.2g}{tail}, one in a thousand above {stat.p999:.2g}.{zero}"


def _worst(found: Findings, output: TokenMetrics | None) -> dict[str, Any] | None:
    if output is None or not output.worst_tokens:
        return None
    tokens = output.worst_tokens
    why = "" if of_text(found.main) else "There is no text to show."
    if of_text(found.main) and not found.main.text.startswith("random"):
        why = "Their text is not kept, as it was measured on a text of the user's."
    return {
        "tokens": tokens,
        "what": "KL" if output.kl is not None else "error",
        "text": any(token.token is not None for token in tokens),
        "chosen": any(token.chosen_a is not None for token in tokens),
        "why": why,
        "rounding": found.to_be_same and tokens[0].value < 1e-6,
    }


def scores(found: Findings) -> list[tuple[str, str, str, str]]:
    """Held-out scores of a fine-tune, beside the source's."""
    if found.training is None:
        return []
    kept = found.training.scores
    source = kept.get("source", {}).get("mean")
    made = []
    for key, label in SCORES.items():
        if key in kept:
            mean, tail = kept[key]["mean"], kept[key]["p99.9"]
            beside = "\u2013" if source is None or key == "source" else f"{mean - source:+.4f}"
            made.append((label, f"{mean:.4f}", beside, f"{tail:.2f}"))
    return made
