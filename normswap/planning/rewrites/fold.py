"""Fold a norm's gain and bias into its readers, leaving a weightless norm (FlashNorm; SliceGPT).

For a reader `y = W n + c` of `n = z diag(g) + b`:

    y = (W diag(g)) z + (c + W b),

with W in the second term as it was before the gain. For a `1 + w` norm g is `1 + w`. Every consumer of the norm must
be such a reader, and every reader must read this norm alone; a reader without a bias grows one if there is a b.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from normswap.planning.edits import AnyEdit, Drop, Fill, FoldBias, FoldGain, GrowBias
from normswap.planning.rewrites.untie import Ties
from normswap.understand.normmap import NormMap, Site
from normswap.understand.reading import Reader


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
        if (reason := _obstacle(normmap, reader.name, reader.module, site, ties, tied)) is not None:
            return reason
        name = ties.name(reader.name, reader.module)
        if spec.bias is not None:
            into = _bias_edits(normmap, reader, name, site, ties, tied)
            if isinstance(into, str):
                return into
            edits += into
        if spec.weight is not None:
            gain = f"{site.path}.{spec.weight}"
            edits.append(FoldGain(tensor=name, axis=reader.axis, weight=gain, form=spec.gain))
    return list(dict.fromkeys(edits))  # a module called twice reads twice and is changed once


def _obstacle(normmap: NormMap, parameter: str, module: str, site: Site, ties: Ties, tied: str) -> str | None:
    """Why the tensor that `module` reads as `parameter` cannot be changed for this site alone, None if it can."""
    uses = normmap.readings[site.spec.width].uses
    users = ties.users(parameter, module)
    if set().union(*(uses.get((parameter, user), {""}) for user in users)) == {site.path}:
        return None
    others = ", ".join(user or "the model" for user in sorted(users - {module}))
    module = module or "the model"
    if not others:
        return f"{parameter} in {module} reads other values too"
    ties.want(parameter)
    shared = len(normmap.names(parameter)) > 1
    way_out = (
        "untie them with --tied untie" if shared and tied == "keep" else "they read it by one name and cannot be untied"
    )
    return f"its reader {parameter} in {module} is used in {others} as well; {way_out}"


def _bias_edits(normmap: NormMap, reader: Reader, name: str, site: Site, ties: Ties, tied: str) -> list[AnyEdit] | str:
    bias = f"{site.path}.{site.spec.bias}"
    if reader.bias is not None:
        if (reason := _obstacle(normmap, reader.bias, reader.module, site, ties, tied)) is not None:
            return reason
        own = ties.name(reader.bias, reader.module)
        return [FoldBias(tensor=own, reader=name, axis=reader.axis, bias=bias)]
    if not reader.grows or reader.module not in normmap.biasless:
        return f"its reader {reader.name} has no bias to take the norm's and cannot grow one"
    shape = normmap.parameters[reader.name]
    grown = f"{reader.module}.bias"
    return [
        GrowBias(module=reader.module, size=shape[1 - reader.axis]),
        FoldBias(tensor=grown, reader=name, axis=reader.axis, bias=bias),
    ]
