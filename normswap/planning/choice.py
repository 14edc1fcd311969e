"""Which norms become what: the kinds that were asked for, site by site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches

from normswap.errors import RefusedError
from normswap.norms.kind import Kind, Rewrite, Route
from normswap.norms.kinds import OFFERED
from normswap.planning.request import NormChoice, Request
from normswap.understand.normmap import ROLES, NormMap, Site


@dataclass
class Chosen:
    """What is asked for.

    Attributes:
        kinds: by path of a site, what it is to become.
        refused: sites that were named and cannot become that, and why.
    """

    kinds: dict[str, Kind] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def by_rewrite(self, sites: Mapping[str, Site], name: str) -> list[Site]:
        """The sites that the rewrite `name` converts."""
        return [sites[path] for path in self.kinds if self.route(sites[path]) == Rewrite(name)]

    def by_themselves(self, sites: Mapping[str, Site]) -> list[Site]:
        """The sites whose new norm is made of the old one alone, or fitted to it."""
        return [sites[path] for path in self.kinds if not isinstance(self.route(sites[path]), Rewrite)]

    def route(self, site: Site) -> Route:
        return self.kinds[site.path].routes[site.spec.kind]


def choose_norms(normmap: NormMap, request: Request) -> Chosen:
    """The sites that `request` is for, and the kind of each.

    A kind asked for without saying where is for all sites that can become one; those that are named have to.

    Raises:
        RefusedError: an unknown kind or role, no such site, a site that is to become two things.
    """
    chosen = Chosen()
    for choice in request.norms:
        kind = kind_of(choice)
        named = [site for site in normmap.sites.values() if choice.takes(site.path, site.role)]
        able = [site for site in named if site.spec.kind in kind.routes]
        others = [site for site in named if site.spec.kind not in (*kind.routes, kind.name)]
        if not able and not (others and not choice.everywhere):
            raise RefusedError(_nothing(normmap, choice, kind, named))
        if not choice.everywhere:
            chosen.refused |= {site.path: _no_route(site, kind) for site in others}
        for site in able:
            form = _form(kind, site, request)
            before = chosen.kinds.setdefault(site.path, form)
            if before is not form:
                raise RefusedError(
                    f"{site.path} is to become {before.name} and {form.name} at once: give --sites or --role with "
                    f"each --norm, so that they name different sites."
                )
    for module, called in normmap.loose.items():
        if any(choice.everywhere and called in OFFERED[choice.kind].routes for choice in request.norms):
            why = f"its {called} is called as a function; only norms that are modules can be exchanged"
            chosen.refused[module] = why
    return chosen


def _form(kind: Kind, site: Site, request: Request) -> Kind:
    """The kind itself, or its exact form where only that will do."""
    exact = OFFERED.get(kind.exact)
    fits = exact is not None and site.spec.kind in exact.routes
    return exact if fits and (request.exact or site.stream is None) else kind


def kind_of(choice: NormChoice) -> Kind:
    """The kind that is asked for. Raises RefusedError where it, or the role, is not known."""
    if choice.kind not in OFFERED:
        near = get_close_matches(choice.kind, OFFERED, 1)
        meant = f" Did you mean {near[0]}?" if near else ""
        raise RefusedError(f"norm '{choice.kind}' is not offered: expected one of {', '.join(OFFERED)}.{meant}")
    if choice.role is not None and choice.role not in ROLES:
        raise RefusedError(f"role '{choice.role}' is not known: expected one of {', '.join(ROLES)}, or any.")
    return OFFERED[choice.kind]


def _no_route(site: Site, kind: Kind) -> str:
    return f"it is a {site.spec.kind}; a {kind.name} is made of {' or '.join(kind.routes)}"


def _nothing(normmap: NormMap, choice: NormChoice, kind: Kind, named: list[Site]) -> str:
    sites = normmap.sites.values()
    if not named and sites:
        roles = ", ".join(dict.fromkeys(site.role for site in sites))
        return (
            f"{normmap.architecture} has no norm that {choice.words()} names. Its norms are "
            f"{', '.join(list(normmap.sites)[:3])} ..., their roles {roles}; `normswap inspect` shows them all."
        )
    kinds = sorted({site.spec.kind for site in named})
    have = f"its {len(named)} norms are {' and '.join(kinds)}" if kinds else "no norm was found in it"
    return (
        f"{normmap.architecture} has no {' or '.join(kind.routes)} to turn into {kind.name}: {have}. "
        f"Nothing to convert; `normswap inspect` shows the norms, and --fold alone makes them weightless."
    )
