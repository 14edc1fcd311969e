"""Fold batch norms away. As it runs, a batch norm is an affine map of each channel,

    y = a x + c,        a = g / sqrt(var + eps),        c = b - a mean,

so that it can be taken over by what writes its input, `x = W h + k`, where that is read by the norm alone,

    y = (diag(a) W) h + (a k + c),

or else by what reads its output, as the gains and biases of other norms are (`fold`). Nothing stays in its place: with
neutral statistics it would be the identity in evaluation, and a norm again in training.
"""

from __future__ import annotations

from collections.abc import Iterable

from normswap.planning.edits import AnyEdit, Drop, FoldGain, Frozen, GrowBias, SwapNorm, TakeAffine
from normswap.planning.rewrites.fold import Folding, into_readers, shared
from normswap.planning.rewrites.untie import Ties
from normswap.understand.normmap import NormMap, Site
from normswap.understand.writing import Source

KIND = "batchnorm"


def fold_running(normmap: NormMap, sites: Iterable[Site], ties: Ties) -> Folding:
    """Plan the folding of batch norms into their neighbours."""
    result = Folding()
    behind: list[AnyEdit] = []
    for site in sites:
        norm = frozen(site)
        before = _into_writers(normmap, site, norm, ties)
        if not isinstance(before, str):
            behind += before
            sources = normmap.writings[site.spec.channels].sources[site.path]
            result.across += [(site.path, source.module) for source in sources]
        else:
            after = shared(normmap, site) or into_readers(normmap, site, ties, norm, "w", norm)
            if isinstance(after, str):
                result.refused[site.path] = (
                    f"{before}, so it cannot be folded there; nor where it is read: {after}. --norm affine keeps a "
                    f"gain and a bias in its place"
                )
                continue
            result.edits += after
            result.across += [(site.path, reader.module) for reader in site.readers]
        behind += _gone(normmap, site)
        result.sites.append(site)
    # a bias first takes what is folded into it from the norm before, and then goes through the one behind
    result.edits += behind
    return result


def frozen(site: Site) -> Frozen:
    """The affine map that a batch norm is as it runs."""
    spec = site.spec
    gain, bias = (f"{site.path}.{name}" if name else None for name in (spec.weight, spec.bias))
    mean, variance = f"{site.path}.{spec.mean}", f"{site.path}.{spec.variance}"
    return Frozen(mean=mean, variance=variance, eps=spec.eps, gain=gain, form=spec.gain or "w", bias=bias)


def _into_writers(normmap: NormMap, site: Site, norm: Frozen, ties: Ties) -> list[AnyEdit] | str:
    """Edits of what writes the norm's input, or why it cannot be changed."""
    if (why := shared(normmap, site)) is not None:
        return why
    writings = normmap.writings[site.spec.channels]
    if site.path in writings.obstacles:
        return writings.obstacles[site.path]
    edits: list[AnyEdit] = []
    for source in writings.sources[site.path]:
        found = _into_writer(normmap, source, site.spec.channels, norm, ties)
        if isinstance(found, str):
            return found
        edits += found
    return edits


def _into_writer(normmap: NormMap, source: Source, channels: int, norm: Frozen, ties: Ties) -> list[AnyEdit] | str:
    if normmap.parameters[source.name][source.axis] != channels:
        return f"its input is a part of what {source.name} writes"
    gain = FoldGain(tensor=ties.name(source.name, source.module), axis=source.axis, weight=norm, form="w")
    if source.bias is not None:
        return [gain, TakeAffine(tensor=ties.name(source.bias, source.module), norm=norm)]
    owned = normmap.name_in(source.module, source.name) is not None
    if not (source.grows and owned and source.module in normmap.biasless):
        return f"its input is written by {source.name}, which has no bias and cannot grow one"
    bias = TakeAffine(tensor=f"{source.module}.bias", norm=norm)
    return [gain, GrowBias(module=source.module, size=channels), bias]


def _gone(normmap: NormMap, site: Site) -> list[AnyEdit]:
    """Edits that take the norm and all that it holds out of the model."""
    spec = site.spec
    swap = SwapNorm(
        module=site.path,
        kind="none",
        width=spec.channels,
        eps=spec.eps,
        gain=None,
        bias=False,
        casting=spec.casting,
        axis=spec.axes[0],
    )
    held = (name for name in normmap.parameters if name.rpartition(".")[0] == site.path)
    return [*(Drop(tensor=name) for name in held if name in normmap.stored), swap]
