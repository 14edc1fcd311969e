"""Which residual sums of a model are made by the norms beside them: those that a backend makes faster so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from normswap.kernels.call import Call, Form
from normswap.kernels.choice import Choice, Chooser
from normswap.kernels.pairs import Pair, find_pairs
from normswap.kernels.sites import Runtime, SiteKernels
from normswap.understand.normmap import NormMap

Forms = list[tuple[Pair, list[tuple[Runtime, Choice]]]]


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
        unserved = [(pair, choices[0][1] if choices else None) for pair, choices in found]
        unserved = [(pair, choice) for pair, choice in unserved if choice is None or choice.backend is None]
        if not unserved:
            break
        for pair, choice in unserved:  # a smaller form may do: without the norm in front of the sum, say
            able.discard(pair.norms[0])
            why[pair.module] = choice.why if choice else f"{pair.norms[0]} gives another dtype than it reads"
    pairs = [replace(pair, reason=why.get(pair.module, pair.reason)) if pair.form is None else pair for pair in pairs]
    return pairs, found


def _choices(pair: Pair, sites: Mapping[str, SiteKernels], chooser: Chooser) -> list[tuple[Runtime, Choice]]:
    """What serves a sum and its norms: on the model's own dtype first, then on what autocast brings to them."""
    first, last = sites[pair.norms[0]], sites[pair.norms[-1]]
    members = (first, last) if pair.form == "norm-add-norm" else (first,)
    found = []
    for runtime in first.choices:
        for call in _calls(pair.form, runtime, first, last):
            with runtime.entered(call.device):
                choice = chooser.choose(call, [site.made for site in members], [site.spec for site in members])
            found.append((runtime, choice))
    return found


def _calls(form: Form, runtime: Runtime, first: SiteKernels, last: SiteKernels) -> Iterator[Call]:
    """The calls of a form whose first norm is called as `runtime` says.

    Autocast leaves the residual in float32 where what is added to it is in half precision.
    """
    own = first.choices[runtime].call
    if form == "add-norm":
        added = (
            {runtime.dtype, runtime.autocast or runtime.dtype} if runtime.dtype == torch.float32 else {runtime.dtype}
        )
        for dtype in sorted(added, key=lambda dtype: dtype != runtime.dtype):
            yield replace(own, form=form, dtype=dtype, residual=runtime.dtype)
        return
    residuals = dict.fromkeys((runtime.dtype, torch.float32 if runtime.autocast else runtime.dtype))
    for residual in residuals:
        call = replace(own, form=form, residual=residual)
        if form == "norm-add":
            yield call
            continue
        then = last.choices.get(Runtime(torch.promote_types(own.norm.out_dtype, residual), runtime.autocast))
        if then is not None:
            yield replace(call, then=then.call.norm)
