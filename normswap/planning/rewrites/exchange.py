"""Norms exchanged one by one: the new norm is made of the tensors of the old one, or fitted to what that gives.

Nothing else of the model changes, so a site is exact or not by itself: `norms.kind` has the routes, each kind's file
its mathematics.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from normswap.norms.kind import Fitted
from normswap.planning.choice import Chosen
from normswap.planning.edits import AnyEdit, Drop, Initialise, SwapNorm
from normswap.planning.rewrites.rewriting import NORMS, Rewriting
from normswap.understand.normmap import NormMap, Site


@dataclass
class Exchanged(Rewriting):
    """What exchanging asks for.

    Attributes:
        ways: how many sites go from which kind to which, and whether they are fitted.
    """

    stage = NORMS

    ways: Counter[tuple[str, str, bool]] = field(default_factory=Counter)

    def reasons(self) -> list[str]:
        return [
            f"{before} to {after} at {count} sites: "
            + ("fitted to what each norm gave." if fitted else "made of the norm's own tensors.")
            for (before, after, fitted), count in self.ways.items()
        ]


def exchange(normmap: NormMap, sites: Iterable[Site], chosen: Chosen) -> Exchanged:
    """Plan the exchange of `sites` for the kinds that are chosen for them."""
    result = Exchanged()
    for site in sites:
        if (obstacle := _obstacle(normmap, site)) is not None:
            result.refused[site.path] = obstacle
            continue
        result.edits += _edits(normmap, site, chosen)
        result.sites.append(site.path)
        fitted = isinstance(chosen.route(site), Fitted)
        result.ways[site.spec.kind, chosen.kinds[site.path].name, fitted] += 1
        if fitted:
            result.claim = "untrained"
    return result


def _obstacle(normmap: NormMap, site: Site) -> str | None:
    """Why there can be no other norm in the place of this one, None if there can."""
    spec = site.spec
    if spec.gate is not None:
        return "it has a gate, which another norm would not have"
    by_channel = spec.kind in ("batchnorm", "groupnorm")  # gain and bias lie along the first of its axes
    if not by_channel and (len(spec.axes) != 1 or spec.groups > 1):
        return "it normalises runs of its channels, or several axes together; only norms over one axis can be exchanged"
    if site.path in normmap.twins:
        return f"it is {', '.join(normmap.twins[site.path])} as well, which would stay as it is"
    for name in spec.tensors.values():
        parameter = f"{site.path}.{name}"
        if normmap.shape(parameter) != (spec.channels,):
            return f"its {name} has shape {normmap.shape(parameter)}; expected one value per channel"
        if others := sorted(set(normmap.names(parameter)) - {parameter}):
            return f"its {name} is {', '.join(others)} as well, which would lose it too"
    return None


def _edits(normmap: NormMap, site: Site, chosen: Chosen) -> list[AnyEdit]:
    kind, spec = chosen.kinds[site.path], site.spec
    swap = SwapNorm(
        module=site.path,
        kind=kind.builds(spec.kind),
        width=spec.channels,
        eps=spec.eps,
        gain="w",
        bias=True,
        casting=spec.casting,
        axis=spec.axes[0],
    )
    made = [fill.tensor for fill in swap.makes()]
    lost = [name for name in normmap.stored if name.startswith(f"{site.path}.") and name not in made]
    return [
        swap,
        *(Initialise(tensor=name, module=site.path, kind=kind.name, replaced=spec) for name in made),
        *(Drop(tensor=name) for name in sorted(lost)),
    ]
