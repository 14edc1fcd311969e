"""Which residual sums of a model are made by the norms beside them: those that a backend makes faster so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from normswap.kernels.call import formed
from normswap.kernels.choice import Choice, Chooser
from normswap.kernels.pairs import Pair, find_pairs
from normswap.kernels.sites import Runtime, SiteKernels
from normswap.understand.normmap import NormMap

Forms = list[tuple[Pair, dict[Runtime, Choice]]]


def choose_sums(normmap: NormMap, sites: Mapping[str, SiteKernels], chooser: Chooser) -> tuple[list[Pair], Forms]:
    """Every residual sum, and for those that norms are to make what serves them.

    Args:
        normmap: of the model before any of its classes changed.
        sites: its norms, examined.
    """
    able = {path for path, site in sites.items() if site.choices}
    why: dict[str, str] = {}
    while True:
        pairs = find_pairs(normmap, able)
        found = [(pair, _choices(pair, sites, chooser)) for pair in pairs if pair.form is not None]
        unserved = [(pair, next(iter(choices.values()), None)) for pair, choices in found]
        unserved = [(pair, choice) for pair, choice in unserved if choice is None or choice.backend is None]
        if not unserved:
            break
        for pair, choice in unserved:  # a smaller form may do: without the norm in front of the sum, say
            able.discard(pair.norms[0])
            why[pair.module] = choice.why if choice else f"{pair.norms[0]} gives another dtype than it reads"
    pairs = [replace(pair, reason=why.get(pair.module, pair.reason)) if pair.form is None else pair for pair in pairs]
    return pairs, found


def _choices(pair: Pair, sites: Mapping[str, SiteKernels], chooser: Chooser) -> dict[Runtime, Choice]:
    first, last = sites[pair.norms[0]], sites[pair.norms[-1]]
    found = {}
    for runtime, choice in first.choices.items():
        norm = choice.call.norm
        if pair.form != "add-norm" and norm.out_dtype != runtime.dtype:
            continue  # the sum has another dtype than what is added
        two = pair.form == "norm-add-norm"
        if two and runtime not in last.choices:
            continue
        call = formed(choice.call, pair.form, last.choices[runtime].call.norm if two else None)
        members = (first, last) if two else (first,)
        with runtime.entered(call.device):
            found[runtime] = chooser.choose(call, [site.made for site in members], [site.spec for site in members])
    return found
