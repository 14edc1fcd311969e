"""What a person reads of a NormMap: its streams, blocks and sites, repeated layers folded into one line."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from normswap.paths import blurred, folded
from normswap.understand.centring import Writer
from normswap.understand.normmap import NormMap, Site, StreamInfo


def map_table(normmap: NormMap) -> RenderableType:
    """Everything in the map, for a terminal."""
    parts: list[RenderableType] = [Text(_headline(normmap), style="bold")]
    if normmap.converted is not None:
        parts.append(Text(normmap.converted, style="green"))
    if normmap.files is not None:
        dtypes = ", ".join(f"{n} {dtype}" for dtype, n in normmap.files["dtypes"].items())
        parts.append(Text(f"on disk: {normmap.files['bytes'] / 2**20:,.2f} MiB; tensors: {dtypes}", style="dim"))
    for stream in normmap.streams:
        parts.append(_stream_table(stream))
    parts.append(_site_table(normmap))
    if normmap.aliases:
        parts.append(Text("tied: " + ", ".join(f"{a} = {b}" for a, b in normmap.aliases.items()), style="dim"))
    for note in normmap.notes:
        parts.append(Text(f"note: {note}", style="yellow"))
    return Group(*parts)


def _headline(normmap: NormMap) -> str:
    counts: dict[str, int] = {}
    for site in normmap.sites.values():
        counts[site.spec.kind] = counts.get(site.spec.kind, 0) + 1
    norms = ", ".join(f"{n} {kind}" for kind, n in counts.items()) or "no norms"
    return f"{normmap.architecture}: {norms}; {len(normmap.streams)} stream{'s' * (len(normmap.streams) != 1)}"


def _stream_table(stream: StreamInfo) -> RenderableType:
    table = _table(f"stream {stream.name}, width {stream.width}")
    table.add_column("block")
    table.add_column("placement")
    table.add_column("norms: in / branch / out")
    table.add_column("skip, branch scale")
    rows = {}
    for block in stream.blocks:
        norms = tuple(tuple(blurred(path) for path in slot) for slot in (block.n_in, block.n_branch, block.n_out))
        key = (blurred(block.module), block.placement, norms, block.skip, block.branch)
        rows.setdefault(key, []).append(block)
    for blocks in rows.values():
        first = blocks[0]
        module = folded([(block.module, None) for block in blocks])[0][0]
        slots = [
            ", ".join(_last(path, first.module) for path in s) or "-" for s in (first.n_in, first.n_branch, first.n_out)
        ]
        scales = "1, 1" if first.skip == first.branch == 1 else f"{first.skip:g}, {first.branch:g}"
        table.add_row(module, first.placement, " / ".join(slots), scales)
    writers = folded([(f"{w.name}", (w.kind, w.axis)) for w in stream.writers])
    listed = ", ".join(f"{shown}\u00a0{_axis(stream.writers, paths)}" for shown, paths in writers)
    return Group(table, Padding(Text(f"writers: {listed}"), (0, 0, 1, 1)))


def _last(path: str, module: str) -> str:
    """The norm's path below the block's layer, where it stands inside."""
    common = 0
    for a, b in zip(path.split("."), module.split("."), strict=False):
        if a != b:
            break
        common += 1
    return ".".join(path.split(".")[common:])


def _axis(writers: list[Writer], paths: list[str]) -> str:
    writer = next(w for w in writers if w.name == paths[0])
    return f"({writer.kind})" if writer.kind in ("output", "input") else f"[{writer.axis}]"


def _site_table(normmap: NormMap) -> Table:
    table = _table("sites")
    for column in ("path", "kind", "gain", "bias", "eps", "axis", "width", "role", "read by"):
        table.add_column(column, overflow="fold", justify="right" if column in ("eps", "width") else "left")

    def likeness(site: Site) -> tuple:
        return site.spec, site.role, tuple(site.tensors.items()), tuple(blurred(text) for text in _read_by(site))

    for shown, paths in folded([(path, likeness(site)) for path, site in normmap.sites.items()]):
        site = normmap.sites[paths[0]]
        spec = site.spec
        table.add_row(
            shown,
            _kind(site),
            spec.gain or "none",
            "yes" if spec.bias else "no",
            f"{spec.eps:g}",
            ",".join(map(str, spec.axes)),
            str(spec.width),
            site.role,
            ", ".join(_shorten(text, site.path) for text in _read_by(site)) or "-",
        )
    return table


def _kind(site: Site) -> str:
    """The kind, and what it has besides gain, bias and running statistics."""
    more = [name for name in site.tensors if name not in site.spec.tensors.values()]
    return f"{site.spec.kind} ({', '.join(more)})" if more else site.spec.kind


def _read_by(site: Site) -> list[str]:
    readers = [f"{reader.name.removesuffix('.weight')}\u00a0[{reader.axis}]" for reader in site.readers]
    return readers + [f"({why})" for why in site.other_consumers]


def _shorten(text: str, path: str) -> str:
    parent = path.rpartition(".")[0]
    return text.removeprefix(f"{parent}.") if parent else text


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
