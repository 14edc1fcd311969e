"""What a person reads of kernels: which backend serves each norm, why, and what there is on this machine."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from normswap.kernels.choice import MODULE, Choice
from normswap.kernels.fusing import Fusing
from normswap.kernels.sites import SiteKernels
from normswap.kernels.swap import Kernels
from normswap.paths import blurred, folded


def kernels_table(found: Kernels) -> RenderableType:
    """Every norm of a model, repeated layers in one line, and what was measured of each call."""
    served = len(found.served)
    dtype = str(found.dtype).removeprefix("torch.")
    parts: list[RenderableType] = [
        Text(f"{served} of {len(found.sites)} norms have a kernel, in {dtype} on {found.device}", style="bold")
    ]
    table = _table()
    for column in ("norm", "backend", "why"):
        table.add_column(column)
    named = [(site.path, (site.backend, site.why)) for site in found.sites]
    for shown, paths in folded(named):
        backend, why = dict(named)[paths[0]]
        table.add_row(shown, backend or "its module", why)
    parts.append(table)
    if found.fusing is not None:
        parts.append(_sums(found.fusing))
    parts += [_call(choice) for choice in {c.call: c for c in (*_calls(found.sites), *found.forms)}.values()]
    if found.fusing is not None:
        parts += [Syntax(text, "python", background_color="default") for text in found.fusing.source().values()]
    return Group(*parts)


def _sums(fusing: Fusing) -> RenderableType:
    table = _table("residual sums")
    for column in ("block", "made by", "as"):
        table.add_column(column)
    named = [
        (pair.module, (tuple(map(blurred, pair.norms)), pair.form or blurred(pair.reason))) for pair in fusing.pairs
    ]
    kinds = dict.fromkeys((blurred(path), value) for path, value in named)
    for (shown, _), (_, (norms, words)) in zip(folded(named), kinds, strict=True):
        table.add_row(shown, ", ".join(norms) or "no norm", words)
    return table


def backends_table(backends: list[dict[str, Any]]) -> RenderableType:
    """The backends, and which are installed."""
    table = _table()
    for column in ("backend", "here", "norms", "forms", "castings", "rows up to", "under torch.compile"):
        table.add_column(column)
    for backend in backends:
        here = backend["missing"] or f"yes, {backend['version']}"
        lists = [", ".join(backend[name]) for name in ("kinds", "forms", "castings")]
        table.add_row(backend["name"], here, *lists, str(backend["max_width"]), backend["compile"])
    return table


def _calls(sites: list[SiteKernels]) -> list[Choice]:
    return list({choice.call: choice for site in sites for choice in site.choices.values()}.values())


def _call(choice: Choice) -> RenderableType:
    table = _table(choice.call.words())
    table.add_column("backend")
    table.add_column("forward + backward", justify="right")
    table.add_column("")
    for name, took in sorted(choice.times.items(), key=lambda item: item[1]):
        mark = "taken" if name == (choice.backend or MODULE) else ""
        table.add_row(name if name != MODULE else "its module", f"{took:,.0f} us", mark)
    if not choice.times and choice.backend:
        table.add_row(choice.backend, "", "taken")
    for name, why in choice.rejected.items():
        table.add_row(name, "", why, style="dim")
    return table


def _table(title: str | None = None) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
