"""What a person reads of a conversion's proof: the mathematics, the files, and what rounding cost."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from normswap.report.comparison import comparison_table, output_table
from normswap.verification.proof import Proof


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
            parts.append(Text(f"Rounding moved the mean cross-entropy by {change:+.1e} nats.", style="bold"))
    return Group(*parts)
