"""What a person reads of moved blocks: from where to where, with which constant, and where it hurts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from normswap.paths import folded
from normswap.planning.plans import MovedBlock, Plan

_BAR = 12
#: column -> what its numbers are
_LEGEND = {
    "scale": "the constant in the place of each token's scale, and how much that varies (coefficient of variation)",
    "error": "relative, of the normalised stream behind the block, with all blocks before it moved: before its writers "
    "were refitted, and after",
    "alone": "KL to the original in nats per token if this layer alone is moved, nothing refitted (the relative error "
    "of the output where there are no logits)",
}


def moved_table(plan: Plan) -> RenderableType:
    """The blocks that a plan moves, for a terminal: a row each where something was measured, else layers folded."""
    if not _measured(plan.moved):
        return _folded_table(plan.moved)
    table = _table()
    for name in ("scale", "spread", "error", "refitted", "alone"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    worst = max((block.kl or 0.0 for block in plan.moved), default=0.0)
    for block, first in _with_first(plan.moved):
        table.add_row(
            block.name,
            _layer(block) if first else "",
            _change(block),
            f"{block.scale:.4g}",
            _percent(block.spread),
            _percent(block.unfitted),
            _percent(block.error),
            f"{block.kl:.1e}" if first and block.kl is not None else "",
            Text(_bar(block.kl, worst) if first else "", style="yellow"),
        )
    legend = [Text(f"{name}: {what}", style="dim") for name, what in _LEGEND.items()]
    return Group(table, *legend, Text(_calibrated_on(plan)))


def moved_markdown(plan: Plan) -> list[str]:
    """Lines of Markdown: the same table, with what its columns mean."""
    if not _measured(plan.moved):
        return [f"- {shown}, layer {layers}: {change}" for shown, layers, change, _ in _fold(plan.moved)]
    rows = [
        "| block | layer | placement | scale | spread | error | refitted | alone |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for block, first in _with_first(plan.moved):
        alone = f"{block.kl:.1e}" if first and block.kl is not None else ""
        cells = (block.name, _layer(block), _change(block), f"{block.scale:.4g}", _percent(block.spread))
        rows.append(f"| {' | '.join((*cells, _percent(block.unfitted), _percent(block.error), alone))} |")
    return [*rows, "", *(f"- {name}: {what}" for name, what in _LEGEND.items()), "", _calibrated_on(plan)]


def _folded_table(moved: Sequence[MovedBlock]) -> Table:
    table = _table()
    table.add_column("count", justify="right")
    for shown, layers, change, count in _fold(moved):
        table.add_row(shown, layers, change, str(count))
    return table


def _table() -> Table:
    table = Table(
        title="moved blocks", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for name in ("block", "layer", "placement"):
        table.add_column(name, overflow="fold")
    return table


def _fold(moved: Sequence[MovedBlock]) -> Iterator[tuple[str, str, str, int]]:
    """Blocks, their layers, the change and how many they are; those that differ in numbers only are one."""
    for shown, paths in folded([(f"{block.name} {_layer(block)}", _change(block)) for block in moved]):
        name, _, layers = shown.rpartition(" ")
        change = next(_change(block) for block in moved if f"{block.name} {_layer(block)}" == paths[0])
        yield name, layers, change, len(paths)


def _with_first(moved: Sequence[MovedBlock]) -> Iterator[tuple[MovedBlock, bool]]:
    """Each block, and whether it is the first of its layer: what a layer costs alone is said once."""
    before = None
    for block in moved:
        at = block.name.rpartition("[")[0], block.layer
        yield block, at != before
        before = at


def _measured(moved: Sequence[MovedBlock]) -> bool:
    return any(value is not None for block in moved for value in (block.spread, block.error, block.kl))


def _layer(block: MovedBlock) -> str:
    return "-" if block.layer is None else str(block.layer)


def _change(block: MovedBlock) -> str:
    return f"{block.before} -> {block.after}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _bar(value: float | None, worst: float) -> str:
    return "\u2588" * max(1, round(_BAR * value / worst)) if value and worst else ""


def _calibrated_on(plan: Plan) -> str:
    return f"Calibrated on {plan.calibrated_on}." if plan.calibrated_on else "Calibrated on nothing."
