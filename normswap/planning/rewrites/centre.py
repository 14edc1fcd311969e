"""LayerNorm -> RMSNorm, exactly: centre every writer of the stream (Jiang et al., NeurIPS 2023).

A LayerNorm does not see the mean of its input: `LN(x) = LN(x - mean(x))`. When everything that reads a stream is such,
the mean can be taken out of all that is written to it, `W <- W - mean(W)` along the stream, and then

    LN(x) = g (x - 0) / sqrt(mean(x^2) - 0 + eps) + b = RMSNorm(x) + b,

since the variance of a vector without mean is its mean square. Gain, bias and eps stay as they are. A term that no
parameter controls (the output of an embedding norm, say) is centred where it comes out of its module instead.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from normswap.planning.edits import AnyEdit, Centre, CentreOutput
from normswap.planning.rewrites.untie import Ties
from normswap.understand.centring import Term, Uncentred, Writer
from normswap.understand.normmap import NormMap, Site

SOURCE, TARGET = "layernorm", "rmsnorm"


@dataclass
class Centred:
    """What centring asks for: edits, and the sites that cannot be had, with reasons."""

    edits: list[AnyEdit] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


def centre(normmap: NormMap, sites: Iterable[Site], ties: Ties, tied: str) -> Centred:
    """Plan the centring of everything that `sites` read.

    Args:
        tied: `keep` centres the output of a module whose parameter is tied; `untie` stores the parameter twice.
    """
    result = Centred()
    chosen: dict[Writer, AnyEdit] = {}
    for site in sites:
        reason = _obstacle(normmap, site)
        edits: dict[Writer, AnyEdit] = {}
        if reason is None:
            for writer in sorted(_terms(normmap, site), key=lambda w: (w.name, w.module)):
                edit = chosen.get(writer) or _edit(normmap, writer, site.spec.width, ties, tied)
                if isinstance(edit, str):
                    reason = edit
                    break
                edits[writer] = edit
        if reason is not None:
            result.refused[site.path] = reason
            continue
        chosen.update(edits)
        result.sites.append(site)
    order = {name: i for i, name in enumerate(normmap.parameters)}
    result.edits = sorted(dict.fromkeys(chosen.values()), key=lambda e: order.get(getattr(e, "tensor", ""), len(order)))
    return result


def _terms(normmap: NormMap, site: Site):
    return normmap.centrings[site.spec.width].inputs.get(site.path)


def _obstacle(normmap: NormMap, site: Site) -> str | None:
    """Why the input of `site` cannot be centred, None if it can."""
    if site.spec.axes != (-1,):
        return f"it normalises axis {site.spec.axes} of its input; only norms over the last axis can be swapped yet"
    if site.spec.weight and (shape := normmap.parameters[f"{site.path}.{site.spec.weight}"]) != (site.spec.width,):
        return f"it has a gain of shape {shape}; only norms with one gain per channel can be swapped yet"
    terms = _terms(normmap, site)
    if site.path not in normmap.centrings[site.spec.width].inputs:
        return "nothing that the model gives out depends on it"
    if terms is None:
        return "its input is not a sum of writers: what comes before it leaves nothing to centre"
    for term in sorted((t for t in terms if isinstance(t, Uncentred)), key=lambda t: t.reason):
        return term.reason
    blocked = normmap.centrings[site.spec.width].blocked
    for writer in sorted((t for t in terms if isinstance(t, Writer)), key=lambda w: (w.name, w.module)):
        if blocked[writer]:
            return f"{writer.name} writes to its input and cannot be centred: {blocked[writer][0]}"
    return None


def _edit(normmap: NormMap, writer: Writer, width: int, ties: Ties, tied: str) -> AnyEdit | str:
    """The edit that centres what `writer` adds, or the reason why there is none."""
    if writer.kind == "norm":
        if writer.axis != -1:
            return f"{writer.name} gives its output a mean along axis {writer.axis}; only the last can be centred yet"
        return CentreOutput(module=writer.name)
    if writer.kind == "buffer" and writer.name not in normmap.stored:
        return _at_output(normmap, writer, width) or f"{writer.name} is a buffer that checkpoints do not store"
    blocked = normmap.centrings[width].blocked
    alike = (writer.name, writer.axis, writer.groups)
    unnoticed = {w.module for w in blocked if (w.name, w.axis, w.groups) == alike and not blocked[w]}
    others = ties.users(writer.name, writer.module) - unnoticed
    if not others:
        return Centre(tensor=ties.name(writer.name, writer.module), axis=writer.axis, groups=writer.groups)
    ties.want(writer.name)
    edit = _at_output(normmap, writer, width) if tied == "keep" else None
    return edit or (
        f"{writer.name} writes to its input in {writer.module or 'the model'} and is used otherwise in "
        f"{', '.join(user or 'the model' for user in sorted(others))}; "
        f"it cannot be centred for the one without changing the other (try --tied "
        f"{'untie' if tied == 'keep' else 'keep'})"
    )


def _only_from(module: str, terms: frozenset[Term] | None) -> bool:
    return terms is not None and all(isinstance(term, Writer) and term.module == module for term in terms)


def _at_output(normmap: NormMap, writer: Writer, width: int) -> CentreOutput | None:
    """Centre the output of the module that uses the writer, if all of that output is what the writer makes of it."""
    terms = normmap.centrings[width].terms
    calls = [call for call in normmap.trace.calls if call.path == writer.module]
    for call in calls:
        if len(call.outputs) != 1:
            return None
        value = normmap.trace.values[call.outputs[0]]
        held = terms.get((value.index, len(value.shape) - 1))
        if value.shape[-1] != width or not _only_from(writer.module, held):
            return None
    return CentreOutput(module=writer.module) if calls else None
