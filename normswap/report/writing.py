"""What two models write after the same beginnings, for a terminal."""

from __future__ import annotations

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from normswap.verification.generation import Generation


def visible(text: str | None) -> str:
    """Text of a model with its line ends and tabs shown."""
    return (text or "").replace("\n", "\u21b5").replace("\t", "\u21e5")


def generation_view(found: Generation, names: tuple[str, str] = ("original", "this one")) -> RenderableType:
    """A row for each beginning: how many tokens are alike, and both texts, what differs in bold."""
    if found.why_not is not None:
        return Text(f"no text was generated: {found.why_not}", style="dim")
    table = Table(
        title="what they write", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for name in ("tokens alike", *names):
        table.add_column(name, overflow="fold")
    for sample in found.samples:
        alike = "all" if sample.first_difference is None else str(sample.first_difference)
        sides = (
            Text.assemble((visible(sample.same), "dim"), (visible(text), "bold"))
            for text in (sample.text_a, sample.text_b)
        )
        table.add_row(f"{alike} of {sample.tokens}", *sides)
    return table
