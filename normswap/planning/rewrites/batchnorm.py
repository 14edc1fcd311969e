"""Fold batch norms away. As it runs, a batch norm is an affine map of each channel,

    y = a x + c,        a = g / sqrt(var + eps),        c = b - a mean,

so that it can be taken over by what writes its input, `x = W h + k`, where that is read by the norm alone,

    y = (diag(a) W) h + (a k + c),

or else by what reads its output, as the gains and biases of other norms are (`fold`), or by a convolution beside it
(`understand.bypass`), whose kernel then holds a diagonal more. Nothing stays in its place: with neutral statistics it
would be the identity in evaluation, and a norm again in training.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from normswap.planning.edits import AddShift, AnyEdit, CarryAffine, Drop, FoldGain, Frozen, GrowBias, SwapNorm
from normswap.planning.rewrites.fold import Folding, into_readers, shared
from normswap.planning.rewrites.untie import Ties
from normswap.understand.bypass import Bypass
from normswap.understand.normmap import NormMap, Site
from normswap.understand.writing import Source

KIND = "batchnorm"


@dataclass
class Running(Folding):
    """What the folding of batch norms asks for."""

    def reasons(self) -> list[str]:
        if not self.sites:
            return []
        return [
            f"{len(self.sites)} batch norms, each an affine map of its channels as it runs, are folded into the "
            f"weights that write their inputs or read their outputs."
        ]


def fold_running(normmap: NormMap, sites: Iterable[Site], ties: Ties) -> Running:
    """Plan the folding of batch norms into their neighbours."""
    result = Running()
    behind: list[AnyEdit] = []
    written: set[str] = set()
    for site in sites:
        before = _into_writers(normmap, site, ties)
        if isinstance(before, str):
            result.refused[site.path] = before
            continue
        behind += before
        written.add(site.path)
        _done(normmap, site, [source.module for source in _sources(normmap, site)], result)
    for path, before in list(result.refused.items()):
        site = normmap.sites[path]
        carrier = normmap.bypasses.get(path)
        if carrier is not None and carrier.norm in written and shared(normmap, site) is None:
            behind += _beside(carrier, frozen(site), ties)
            modules = [carrier.source.module]
        else:
            norm = frozen(site)
            after = shared(normmap, site) or into_readers(normmap, site, ties, norm, "w", norm)
            if isinstance(after, str):
                result.refused[path] = (
                    f"{before}, so it cannot be folded there; nor where it is read: {after}. --norm affine keeps a "
                    f"gain and a bias in its place"
                )
                continue
            result.edits += after
            modules = [reader.module for reader in site.readers]
        del result.refused[path]
        _done(normmap, site, modules, result)
    # a bias first takes what is folded into it from the norm before, and then goes through the one behind
    gone = [edit for path in result.sites for edit in _gone(normmap, normmap.sites[path])]
    result.edits += [*behind, *gone]
    return result


def _done(normmap: NormMap, site: Site, modules: list[str], result: Folding) -> None:
    result.sites.append(site.path)
    result.across += [(site.path, module) for module in modules]


def frozen(site: Site) -> Frozen:
    """The affine map that a batch norm is as it runs."""
    spec = site.spec
    gain, bias = (f"{site.path}.{name}" if name else None for name in (spec.weight, spec.bias))
    mean, variance = f"{site.path}.{spec.mean}", f"{site.path}.{spec.variance}"
    return Frozen(mean=mean, variance=variance, eps=spec.eps, gain=gain, form=spec.gain or "w", bias=bias)


def _into_writers(normmap: NormMap, site: Site, ties: Ties) -> list[AnyEdit] | str:
    """Edits of what writes the norm's input, or why it cannot be changed."""
    if (why := shared(normmap, site) or normmap.writings[site.spec.channels].obstacles.get(site.path)) is not None:
        return why
    edits: list[AnyEdit] = []
    for source in _sources(normmap, site):
        found = _into_writer(normmap, source, site.spec.channels, frozen(site), ties)
        if isinstance(found, str):
            return found
        edits += found
    return edits


def _sources(normmap: NormMap, site: Site) -> list[Source]:
    return normmap.writings[site.spec.channels].sources[site.path]


def _into_writer(normmap: NormMap, source: Source, channels: int, norm: Frozen, ties: Ties) -> list[AnyEdit] | str:
    if normmap.parameters[source.name][source.axis] != channels:
        return f"its input is a part of what {source.name} writes"
    edits: list[AnyEdit] = []
    bias = f"{source.module}.bias"
    if source.bias is not None:
        bias = ties.name(source.bias, source.module)
    elif source.grows and source.module in normmap.biasless and normmap.name_in(source.module, source.name) is not None:
        edits.append(GrowBias(module=source.module, size=channels))
    else:
        return f"its input is written by {source.name}, which has no bias and cannot grow one"
    for tensor, axis in ((ties.name(source.name, source.module), source.axis), (bias, 0)):
        edits.append(FoldGain(tensor=tensor, axis=axis, weight=norm, form="w"))
    return [*edits, AddShift(tensor=bias, norm=norm)]


def _beside(carrier: Bypass, norm: Frozen, ties: Ties) -> list[AnyEdit]:
    """Edits of a convolution that carries the norm, once it has taken over the norm behind it."""
    source = carrier.source
    bias = f"{source.module}.bias" if source.bias is None else ties.name(source.bias, source.module)
    tensors = {ties.name(source.name, source.module): carrier.into, bias: None}
    return [
        CarryAffine(tensor=tensor, axis=source.axis, into=into, factor=carrier.factor, norm=norm, behind=carrier.norm)
        for tensor, into in tensors.items()
    ]


def _gone(normmap: NormMap, site: Site) -> list[AnyEdit]:
    """Edits that take the norm and all that it holds out of the model."""
    spec = site.spec
    swap = SwapNorm(
        module=site.path,
        kind="identity",
        width=spec.channels,
        eps=spec.eps,
        gain=None,
        bias=False,
        casting=spec.casting,
        axis=spec.axes[0],
    )
    held = (name for name in normmap.parameters if name.rpartition(".")[0] == site.path)
    return [*(Drop(tensor=name) for name in held if name in normmap.stored), swap]
