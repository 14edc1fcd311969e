"""What a person reads of a conversion's proof: the mathematics, the files, and what rounding cost."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.text import Text

from normswap.report.comparison import comparison_table, output_table
from normswap.report.writing import generation_view
from normswap.verification.proof import Proof
from normswap.verification.run import Report


def proof_view(proof: Proof) -> RenderableType:
    """Everything in a proof, for a terminal."""
    if proof.mathematics is None:
        return Text("NOT VERIFIED: nothing was measured (--verify none).", style="bold red")
    checked = f"The files hold this result bit for bit: {proof.tensors_checked} tensors, each rounded once."
    parts: list[RenderableType] = [
        Text(f"\nThe mathematics: original and plan in {proof.mathematics.comparison.dtype}", style="bold"),
        comparison_table(proof.mathematics),
        Text(checked, style="bold green"),
    ]
    if proof.stored is not None:
        found = proof.stored.comparison
        stored = " against ".join(dict.fromkeys(reversed(proof.stored.stored)))
        how = stored if stored == found.dtype else f"{stored}, computed in {found.dtype}"
        parts.append(Text(f"\nAs stored: the new folder against the original, {how}", style="bold"))
        parts.append(output_table(found))
        before, after = found.output.cross_entropy_a, found.output.cross_entropy_b
        if before is not None and after is not None:
            change = after.mean - before.mean
            what = "Rounding" if proof.claim == "exact" else "The conversion"
            parts.append(Text(f"{what} moved the mean cross-entropy by {change:+.1e} nats.", style="bold"))
    if proof.generation is not None and proof.generation.samples:
        parts.append(generation_view(proof.generation))
    return Group(*parts)


def proof_markdown(proof: Proof) -> list[str]:
    """Lines of Markdown: a table of what was measured, and on what."""
    if proof.mathematics is None:
        return ["**Not verified**: nothing was measured (`--verify none`)."]
    lines = reports_markdown({"mathematics": proof.mathematics, "as stored": proof.stored})
    return [*lines, f"- {proof.tensors_checked} tensors of the files checked bit for bit"]


def reports_markdown(reports: Mapping[str, Report | None]) -> list[str]:
    """Lines of Markdown: a table of what was measured under each name, and on what."""
    rows = ["| | mean | median | p99 | p99.9 | worst |", "|---|---|---|---|---|---|"]
    lines = []
    for what, report in reports.items():
        if report is None:
            continue
        output = report.comparison.output
        stored = " and ".join(dict.fromkeys(report.stored)) if what == "as stored" else report.comparison.dtype
        for name, stat in (
            ("relative error", output.error),
            ("KL, nats", output.kl),
            ("change of cross-entropy, nats", output.cross_entropy_change),
        ):
            if stat is not None:
                values = (stat.mean, stat.median, stat.p99, stat.p999, stat.max)
                numbers = " | ".join("" if n is None else f"{n:.1e}" for n in values)
                rows.append(f"| {name} ({what}, {stored}) | {numbers} |")
        if output.top1 is not None:
            lines.append(f"- {what}: the same token is most probable at {output.top1:.2%} of the positions")
        if output.cross_entropy_a is not None and output.cross_entropy_b is not None:
            change = output.cross_entropy_b.mean - output.cross_entropy_a.mean
            lines.append(
                f"- {what}: mean cross-entropy {output.cross_entropy_a.mean:.6f} before, "
                f"{output.cross_entropy_b.mean:.6f} after ({change:+.1e} nats)"
            )
    first = next(report for report in reports.values() if report is not None)
    sizes = " x ".join(map(str, first.inputs))
    lines.append(f"- measured on {first.text}, {sizes}")
    return [*rows, "", *lines]
