"""The norms of two models as one list: what stands at each site before and after, layers folded."""

from __future__ import annotations

from collections.abc import Iterable

from normswap.paths import blurred, folded
from normswap.report.findings.model import SiteForm, SiteRow
from normswap.understand.normmap import NormMap, Site
from normswap.verification.sites import SiteMetrics
from normswap.verification.streams import interleaved


def site_rows(before: NormMap | None, after: NormMap | None, measured: Iterable[SiteMetrics] = ()) -> list[SiteRow]:
    """Every site of the two maps; with `before` alone, those of one model.

    Args:
        measured: errors of what reaches them.
    """
    paths = interleaved(before.sites if before else (), after.sites if after else ())
    sites = {path: tuple(m.sites.get(path) if m else None for m in (before, after)) for path in paths}
    slots = [_slots(m) if m else {} for m in (before, after)]
    errors = {m.site: m for m in measured if m.says_something}
    named = []
    for path, pair in sites.items():
        site = pair[0] or pair[1]
        stands = tuple(held.get(path) for held in slots)
        named.append((path, (tuple(map(_form, pair)), site.role, blurred(site.stream or ""), stands)))
    rows = []
    for shown, paths in folded(named):
        found = [errors[path] for path in paths if path in errors]
        pair = sites[paths[0]]
        site = pair[0] or pair[1]
        rows.append(
            SiteRow(
                shown=shown,
                count=len(paths),
                role=site.role,
                stream=site.stream,
                width=site.spec.width,
                slot_before=slots[0].get(paths[0]),
                slot_after=slots[1].get(paths[0]),
                before=_form(pair[0]),
                after=_form(pair[1]),
                read_by=tuple(_readers(site)),
                error_mean=sum(m.error_mean for m in found) / len(found) if found else None,
                error_max=max((m.error_max for m in found), default=None),
            )
        )
    return rows


def _slots(normmap: NormMap) -> dict[str, str]:
    """By path of a norm the slot of the block that it stands in."""
    found: dict[str, str] = {}
    for stream in normmap.streams:
        for block in stream.blocks:
            for slot, paths in (("N_in", block.n_in), ("N_branch", block.n_branch), ("N_out", block.n_out)):
                found |= dict.fromkeys(paths, slot)
    return found


def _form(site: Site | None) -> SiteForm | None:
    if site is None:
        return None
    spec = site.spec
    return SiteForm(kind=spec.kind, gain=spec.gain, bias=spec.bias is not None, eps=spec.eps)


def _readers(site: Site) -> list[str]:
    """What reads a norm, from within its layer."""
    parent = site.path.rpartition(".")[0]
    names = [reader.name.removesuffix(".weight") for reader in site.readers]
    return [name.removeprefix(f"{parent}.") if parent else name for name in names] + list(site.other_consumers)
