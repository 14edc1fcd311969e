"""What a person reads of a fine-tune: before it, and after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from normswap.report.card import SCORES
from normswap.report.plan import plan_view

if TYPE_CHECKING:
    from normswap.tune.dry_run import Foreseen
    from normswap.tune.recipe import Recipe


def scores_table(scores: Mapping[str, Mapping[str, float]], tokens: int, minutes: float) -> RenderableType:
    """Held-out scores of each model, beside the source's."""
    table = Table(title=f"held out, after {tokens} tokens in {minutes:.1f} minutes", title_justify="left")
    for name in ("model", "mean", "beside the source", "p99.9"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for key, label in SCORES.items():
        if key in scores:
            found = scores[key]
            beside = found["mean"] - scores["source"]["mean"]
            table.add_row(label, f"{found['mean']:.4f}", f"{beside:+.4f}", f"{found['p99.9']:.2f}")
    return table


def dry_run_view(found: Foreseen, recipe: Recipe) -> RenderableType:
    """The plan, the stages, the budget and the resolved recipe."""
    parts: list[RenderableType] = [] if found.plan is None else [plan_view(found.plan, None)]
    table = Table(title="stages", title_justify="left")
    for name in found.stages[0]:
        table.add_column(name.replace("_", " "), justify="left" if name in ("name", "train", "taper") else "right")
    for stage in found.stages:
        table.add_row(*(f"{value:g}" if isinstance(value, float) else str(value) for value in stage.values()))
    parts.append(table)
    passes = found.tokens / max(1, found.data_tokens)
    parts.append(Text(f"{found.tokens} tokens, {passes:.1f} passes over {found.data}"))
    sizes = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in found.memory.items())
    total = sum(found.memory.values()) / 2**20
    parts.append(Text(f"memory on each device, activations not counted: {sizes}; {total:.0f} MiB in all"))
    if found.tapered:
        parts.append(Text(f"{len(found.tapered)} sites are tapered, from {found.tapered[0]} to {found.tapered[-1]}"))
    parts += [Text(f"Warning: {warning}", style="bold yellow") for warning in found.warnings]
    parts += [Text("\nThe recipe, with all that was left out:", style="bold"), Text(recipe.to_yaml())]
    return Group(*parts)
