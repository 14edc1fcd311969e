"""Fold a norm's gain and bias into its readers, leaving a weightless norm (FlashNorm; SliceGPT).

For a reader `y = W n + c` of `n = z diag(g) + b`:

    y = (W diag(g)) z + (c + W b),

with W in the second term as it was before the gain. For a `1 + w` norm g is `1 + w`. Every consumer of the norm must
be such a reader, and every reader must read this norm alone; a reader without a bias grows one if there is a b.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from normswap.edits import AnyEdit, Drop, Fill, FoldBias, FoldGain, GrowBias
from normswap.flow import Reader
from normswap.normmap import NormMap, Site
from normswap.rewrites.untie import Ties


@dataclass
class Folding:
    """What folding asks for: edits, and the sites that cannot be had, with reasons."""

    edits: list[AnyEdit] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    outside: list[str] = field(default_factory=list)  # modules of all readers


def fold(normmap: NormMap, sites: Iterable[Site], ties: Ties, tied: str, swapped: set[str]) -> Folding:
    """Plan the folding of the gains and biases of `sites` into their readers.

    Args:
        swapped: sites whose module is replaced anyway and so loses its parameters; others keep neutral ones, so that
            the stock class still loads them.
    """
    result = Folding()
    for site in sites:
        if site.spec.weight is None and site.spec.bias is None:
            continue
        edits = _site_edits(normmap, site, ties, tied)
        if isinstance(edits, str):
            result.refused[site.path] = edits
            continue
        result.edits += edits
        neutral = {site.spec.weight: 0.0 if site.spec.gain == "1 + w" else 1.0, site.spec.bias: 0.0}
        for parameter, value in neutral.items():
            if parameter is not None:
                name = f"{site.path}.{parameter}"
                result.edits.append(Drop(tensor=name) if site.path in swapped else Fill(tensor=name, value=value))
        result.sites.append(site)
        result.outside += [reader.module for reader in site.readers]
    return result


def _site_edits(normmap: NormMap, site: Site, ties: Ties, tied: str) -> list[AnyEdit] | str:
    """Edits of the site's readers, or the reason why it cannot be folded."""
    spec = site.spec
    if site.other_consumers:
        return f"its gain cannot move into its readers: {site.other_consumers[0]}"
    if not site.readers:
        return "nothing that reads it can take its gain"
    reads = normmap.readings[spec.width]
    if spec.bias is not None and not reads.translates[site.path]:
        return "its bias does not reach its readers unchanged (a mask or a router stands between)"
    edits: list[AnyEdit] = []
    for reader in site.readers:
        name = _own_name(normmap, reader, site, ties, tied)
        if isinstance(name, tuple):
            return name[0]
        if spec.bias is not None:
            into = _bias_edits(normmap, reader, name, site)
            if isinstance(into, str):
                return into
            edits += into
        if spec.weight is not None:
            gain = f"{site.path}.{spec.weight}"
            edits.append(FoldGain(tensor=name, axis=reader.axis, weight=gain, form=spec.gain))
    return edits


def _own_name(normmap: NormMap, reader: Reader, site: Site, ties: Ties, tied: str) -> str | tuple[str]:
    """The name of the reader's parameter that this site alone reads; a one-tuple holds a refusal."""
    uses = normmap.readings[site.spec.width].uses
    users = normmap.users(reader.name)
    if uses[reader.name] == {site.path}:
        return reader.name
    if users == {reader.module}:
        return (f"{reader.name} in {reader.module} reads other values too",)
    if tied == "keep":
        return (
            f"its reader {reader.name} in {reader.module} is tied to {', '.join(sorted(users - {reader.module}))}: "
            f"untie it (--tied untie) to fold into it",
        )
    own = ties.separate(reader.name, reader.module)
    if own is None:
        return (f"{reader.name} is shared by {', '.join(sorted(users))} under one name and cannot be untied",)
    return own


def _bias_edits(normmap: NormMap, reader: Reader, name: str, site: Site) -> list[AnyEdit] | str:
    bias = f"{site.path}.{site.spec.bias}"
    if reader.bias is not None:
        if normmap.readings[site.spec.width].uses[reader.bias] != {site.path}:
            return f"{reader.bias} takes part in more than {reader.module}"
        return [FoldBias(tensor=reader.bias, reader=name, axis=reader.axis, bias=bias)]
    if not reader.grows or reader.module not in normmap.biasless or name.rpartition(".")[0] != reader.module:
        return f"its reader {reader.name} has no bias to take the norm's and cannot grow one"
    shape = normmap.parameters[reader.name]
    grown = f"{reader.module}.bias"
    return [
        GrowBias(module=reader.module, size=shape[1 - reader.axis]),
        FoldBias(tensor=grown, reader=name, axis=reader.axis, bias=bias),
    ]
