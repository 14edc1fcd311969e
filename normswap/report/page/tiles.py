"""The numbers that stand at the top."""

from __future__ import annotations

import math
from dataclasses import dataclass

from normswap.report.findings.costs import size
from normswap.report.findings.model import Findings
from normswap.report.findings.words import answer, of_text


@dataclass(frozen=True)
class Tile:
    name: str
    value: str
    more: str = ""


def tiles(found: Findings) -> list[Tile]:
    """Four or five numbers: how far apart the outputs are, what that means for predictions, what it costs."""
    made = _measured(found)
    if found.training and (healed := found.training.scores.get("healed")):
        beside = found.training.scores.get("control") or found.training.scores["source"]
        whose = "control" if "control" in found.training.scores else "source"
        made.insert(
            0,
            Tile(
                "held-out loss", f"{healed['mean']:.4f}", f"{healed['mean'] - beside['mean']:+.4f} beside the {whose}"
            ),
        )
    before, after = found.sizes.bytes_before, found.sizes.bytes_after
    if after is not None:
        made.append(Tile("size on disk", size(after), f"was {size(before)}" if before is not None else ""))
    elif before is not None:
        made.append(Tile("size on disk", size(before)))
    if found.kind == "map" and found.sizes.parameters_before is not None:
        made.insert(0, Tile("parameters", f"{found.sizes.parameters_before:,}"))
    return made


def _measured(found: Findings) -> list[Tile]:
    made: list[Tile] = []
    if (exact := found.reports.get("mathematics")) is not None and exact.comparison.output.error is not None:
        error = exact.comparison.output.error
        if found.claim == "exact":
            made.append(
                Tile("worst token, mathematics", f"{error.max:.1e}", f"relative error in {exact.comparison.dtype}")
            )
    if found.main is None:
        return made
    output = found.main.comparison.output
    if output.top1 is not None:
        what = f"same {answer(found.main)}"
        made.append(Tile(what, f"{output.top1:.2%}", f"the most probable one, of {output.rows:,}"))
    if output.kl is not None:
        name = "KL per token" if of_text(found.main) else "KL"
        made.append(Tile(name, f"{output.kl.mean:.2g}", f"nats; 1 in 1000 above {output.kl.p999:.2g}"))
    elif output.error is not None:
        made.append(Tile("mean error", f"{output.error.mean:.2g}", "relative, of the output"))
    if output.cross_entropy_a is not None and output.cross_entropy_b is not None:
        a, b = (math.exp(min(stat.mean, 700)) for stat in (output.cross_entropy_a, output.cross_entropy_b))
        made.append(Tile("perplexity", f"{b:.4g}", f"was {a:.4g}"))
    return made
