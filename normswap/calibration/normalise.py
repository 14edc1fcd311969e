"""Refit what writes to a stream, so that the stream comes normalised to norms that will no longer normalise it.

Where the original has x at token t, of scale s_t, a norm reads x / s_t. A norm with a frozen scale, or a slope, reads
what comes as it comes, so what comes is to be

    c x_t / s_t,        c one number for all tokens of the site (one for each of two clusters, if some are far apart).

The linear maps that end the branches added last are refitted to that by ridge regression, as `calibration.refit` does
for moved norms; r is chosen on tokens that take no part in the fit, and where none helps there, the writers stay.
Where a table of embeddings is all that the first norm reads, each of its rows is divided by its own scale, exactly,
for tokens that the data lack as well. Norms that stay as they are see no difference: they divide by the scale
themselves. So only streams that norms read to their end are treated, none that has norms of earlier conversions, and
tables that nothing else uses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from normswap.calibration.ridge import Ridge
from normswap.calibration.scales import normalised, scale_of
from normswap.calibration.taps import Tap, rows, watch
from normswap.calibration.writers import Writing, factor_of, features_of, write_change, writings
from normswap.norms.fits import around, constants
from normswap.norms.spec import NormSpec
from normswap.planning.rewrites.steps import steps_of
from normswap.understand.centring import Writer
from normswap.understand.normmap import NormMap, StreamInfo

#: r, how strongly the weights may be held to what they were
_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
#: one in so many tokens, the last ones, takes no part in the fit that r is chosen by
_HELD = 8
# the first norm must read the table's rows to this relative error, and no row grows more than so many times
_SAME, _MOST = 1e-3, 1e3


@dataclass(frozen=True)
class Origin:
    """What wrote last to the value that a norm reads: the linear maps of branches, or a table of embeddings alone."""

    writers: tuple[Writing, ...] = ()
    table: Writer | None = None


def origins(normmap: NormMap) -> dict[str, Origin]:
    """By path of each norm whose input may be refitted."""
    found: dict[str, Origin] = {}
    for stream in normmap.streams:
        own = any(normmap.sites[path].stream == stream.name for path in normmap.own)
        if not stream.found.final or own or any(block.n_out for block in stream.blocks):
            continue
        base = stream.found.analysis.base
        steps = {base(step.blocks[-1].result): step for step in steps_of(normmap, stream)}
        for op in normmap.trace.norm_operations():
            site = normmap.sites[op.norm]
            value = base(op.inputs[0])
            if site.stream != stream.name or site.role not in ("stream", "final") or site.spec.axes != (-1,):
                continue
            if value in steps:
                branches = [block.operands[1] for block in steps[value].blocks]
                found[op.norm] = Origin(writers=writings(normmap, stream, branches))
            elif value == base(stream.found.start):
                found[op.norm] = Origin(table=_table(normmap, stream, value))
    return found


def _table(normmap: NormMap, stream: StreamInfo, value: int) -> Writer | None:
    centring = normmap.centrings[stream.width]
    terms = centring.leaves(centring.terms.get((value, len(normmap.trace.values[value].shape) - 1)))
    if terms is None or len(terms) != 1:
        return None
    (term,) = terms
    if not isinstance(term, Writer) or term.kind != "parameter" or len(normmap.shape(term.name)) != 2:
        return None
    alone = len(normmap.names(term.name)) == 1 and normmap.users(term.name) == {term.module}
    return term if alone and term.axis == 1 else None


@torch.no_grad()
def normalise(
    model: nn.Module,
    path: str,
    spec: NormSpec,
    origin: Origin,
    wanted: torch.Tensor,
    centred: bool,
    batches: Sequence[Mapping[str, Any]],
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Refit, in place, what writes to the value that the norm at `path` of `model` reads.

    Args:
        spec: of the norm that was there.
        wanted: what the original has there, `(rows, width)`.
        centred: the new norm takes the mean out, so that there may be any.

    Returns:
        The tensors that changed, by name; none where nothing helps. And what the norm reads now, `(rows, width)`.
    """
    changed = {} if origin.table is None else _normalise_table(model, spec, origin.table, wanted, batches)
    taps = [Tap(path, "input"), *(Tap(writer.module, "input") for writer in origin.writers)]
    seen = [watch(model, taps, inputs) for inputs in batches]
    x = torch.cat([rows(found[taps[0]], inputs) for found, inputs in zip(seen, batches, strict=True)])
    factor = factor_of(model, origin.writers, taps[0], 1.0, batches[0], seen[0])
    if factor is None:
        return changed, x
    features = torch.cat([features_of(found, origin.writers, i) for found, i in zip(seen, batches, strict=True)])
    s = scale_of(wanted, spec)
    c = constants(s)(s)
    missing = c * normalised(wanted, spec) - (around(x, spec) if centred else x)
    change = _fitted(features, missing, c, any(writer.bias is not None for writer in origin.writers))
    if change is None:
        return {}, x
    parameters = dict(model.named_parameters(remove_duplicate=False))
    changed = write_change(parameters, origin.writers, *(part / factor for part in change))
    return changed, x + features @ change[0].to(x.dtype) + change[1].to(x.dtype)


def _fitted(features: torch.Tensor, missing: torch.Tensor, c: torch.Tensor, bias: bool):
    """The change of all weights and of the bias that gives most of what is missing; None where nothing helps."""
    weights = c.squeeze(-1).square().reciprocal()
    cut = len(missing) - max(1, len(missing) // _HELD)
    if not cut:
        return None

    def error(change) -> float:
        left = missing[cut:]
        if change is not None:
            left = left - features[cut:] @ change[0].to(left.dtype) - change[1].to(left.dtype)
        return float((left / c[cut:]).double().square().mean())

    found = Ridge(features[:cut], weights[:cut], bias).solve(missing[:cut], *_RIDGES)
    least, r = min((error(change), r) for change, r in zip(found, _RIDGES, strict=True))
    return Ridge(features, weights, bias).solve(missing, r)[0] if least < error(None) else None


def _normalise_table(model, spec: NormSpec, table: Writer, wanted: torch.Tensor, batches):
    """Divide each row by its scale."""
    weight = model.get_parameter(table.name)
    ids = []
    for inputs in batches:
        tap = Tap(table.module, "input")
        ids.append(rows(watch(model, [tap], inputs)[tap][..., None], inputs).squeeze(-1))
    ids = torch.cat(ids)
    if ids.is_floating_point() or len(ids) != len(wanted):
        return {}
    read = weight[ids]
    factor = float((read * wanted).sum() / read.square().sum().clamp_min(1e-30))
    if (wanted - factor * read).norm() > _SAME * wanted.norm():
        return {}
    s = scale_of(factor * weight, spec)
    ratio = constants(scale_of(wanted, spec))(s) / s
    weight.copy_(weight * ratio.clamp_max(_MOST))
    return {table.name: weight.detach().clone()}
