"""Plan: a request and a NormMap give the ordered edits, the claim, and its reasons, or a refusal that says why."""

from __future__ import annotations

from normswap.errors import RefusedError
from normswap.paths import blurred, folded
from normswap.planning.choice import Chosen, choose_norms
from normswap.planning.edits import (
    AnyEdit,
    Centre,
    CentreInput,
    CentreOutput,
    FoldBias,
    FoldGain,
    GrowBias,
    ModuleEdit,
    Rotate,
    SwapNorm,
    TensorEdit,
)
from normswap.planning.idle import Idle
from normswap.planning.plans import Claim, MovedBlock, Plan, Refusal
from normswap.planning.request import Request
from normswap.planning.rewrites import batchnorm
from normswap.planning.rewrites import centre as centring
from normswap.planning.rewrites.centre import centre
from normswap.planning.rewrites.exchange import Exchanged, exchange
from normswap.planning.rewrites.fold import Folding, fold
from normswap.planning.rewrites.move import move
from normswap.planning.rewrites.moved import Moved, MovedStep, Scales
from normswap.planning.rewrites.qk_norm import Inserted, insert_qk_norms
from normswap.planning.rewrites.rotate import Rotated, Rotator
from normswap.planning.rewrites.untie import Ties
from normswap.understand.normmap import NormMap, Site

#: kinds of norm whose parameters fold into their neighbours
FOLDED = ("layernorm", "rmsnorm", "groupnorm", batchnorm.KIND)


def make_plan(
    normmap: NormMap,
    request: Request,
    model_type: str = "",
    base_prefix: str = "",
    stays_tied: str | None = None,
    scales: Scales | None = None,
) -> Plan:
    """The plan alone, see `plan_moves`."""
    return plan_moves(normmap, request, model_type, base_prefix, stays_tied, scales)[0]


def plan_moves(
    normmap: NormMap,
    request: Request,
    model_type: str = "",
    base_prefix: str = "",
    stays_tied: str | None = None,
    scales: Scales | None = None,
) -> tuple[Plan, tuple[MovedStep, ...]]:
    """The plan that meets `request` on the model `normmap` describes.

    Args:
        model_type: of the source's configuration, kept in the plan.
        base_prefix: where the headless model stands inside the model, to tell whether its output changes.
        stays_tied: why tied parameters cannot be untied; None where they can.
        scales: the constants of a move, found on data; None: all are 1, and the claim is `untrained`.

    Returns:
        The plan, and what calibration needs to know of the blocks that it moves.

    Raises:
        RefusedError: nothing to do, or sites that cannot be converted and no `partial`.
    """
    if normmap.trace.strays:
        raise RefusedError(
            f"{normmap.architecture}: {normmap.trace.strays[0]} uses a tensor that no observed call made (a kernel "
            f"called past torch's own functions, perhaps), so what reaches it is not known. Switch to plain torch code."
        )
    if not (request.norms or request.fold or request.placements or request.qk_norm or request.rotate):
        raise RefusedError("nothing is asked for: give --norm rmsnorm, --fold, --rotate, --placement or --qk-norm.")
    chosen = choose_norms(normmap, request)
    swaps, wanted = chosen.by_rewrite(normmap.sites, "centre"), _sites_to_fold(normmap, request, chosen)
    exchanged = exchange(normmap, chosen.by_themselves(normmap.sites), chosen)
    if exchanged.sites and request.placements:
        raise RefusedError(
            f"{request.words()}: norms that move can become rmsnorm on their way, and no other kind. Move them first, "
            f"or leave --placement out."
        )
    if exchanged.sites and request.fold:
        raise RefusedError(
            f"{request.words()}: the gains of {', '.join(site.path for site in exchanged.sites[:3])} ... are made anew "
            f"and cannot be folded in the same run. Leave --fold out."
        )
    if request.placements and (own := [path for path in normmap.own if normmap.sites[path].stream is not None]):
        raise RefusedError(
            f"{request.words()}: {own[0]} was put in by a conversion and is a {normmap.sites[own[0]].spec.kind}; only "
            f"LayerNorm and RMSNorm can move. Move the norms of the model that it was made from."
        )
    lowered = chosen.by_rewrite(normmap.sites, "rotate")
    _check_rotation(request, lowered)
    rotator = Rotator(normmap, request, lowered, [site.path for site in exchanged.sites])
    idle = Idle(normmap)
    unseen, unread = idle.refuse_centring(swaps), idle.refuse_folding(wanted)
    for untied in (False, True):
        ties = Ties(normmap, untied, stays_tied)
        centred = centre(normmap, [site for site in swaps if site.path not in unseen], ties, request)
        swapped = {site.path for site in centred.sites}
        rotated = rotator.rotate(ties, swapped, centred.edits)
        taken = {*unread, *(site.path for site in rotated.folding.sites)}
        folds = [site for site in wanted if site.path not in taken]
        folding = fold(normmap, [site for site in folds if site.spec.kind != batchnorm.KIND], ties, swapped)
        folding.add(rotated.folding)
        running = batchnorm.fold_running(normmap, [site for site in folds if site.spec.kind == batchnorm.KIND], ties)
        if request.tied == "keep" or stays_tied or not ties.wanted:
            break  # nothing is gained by untying
    refused = chosen.refused | exchanged.refused | unread | folding.refused | running.refused | unseen
    refused |= centred.refused | rotated.refused
    moved = (
        move(normmap, request.placements, scales or Scales(), swapped, request.exact) if request.placements else Moved()
    )
    inserted = insert_qk_norms(normmap, request.qk_norm) if request.qk_norm else Inserted()
    refused |= moved.refused | inserted.refused

    one_by_one = (*folding.sites, *running.sites, *exchanged.sites)
    changed = {*swapped, *(site.path for site in one_by_one), *moved.sites}
    changed |= {path for stream in rotated.streams for path in stream.sites}
    converted = tuple(path for path in normmap.sites if path in changed)
    done = converted or moved.steps or inserted.norms  # a post-norm block that gets a scale on its skip changes no norm
    if refused and not (request.partial and done):
        _refuse(normmap, request, refused, converted)
    if not done and request.placements:
        raise RefusedError(f"{normmap.architecture}: every block stands so already: nothing to move.")
    if not done and request.rotate:
        raise RefusedError(f"{normmap.architecture} has no stream of RMSNorms to rotate: nothing to do.")
    if not done:
        raise RefusedError(f"{normmap.architecture} has no norm with a gain or bias to fold: nothing to do.")
    bare = {site.path for site in folding.sites}
    edits: list[AnyEdit] = [*ties.edits()]
    # gains and biases move on original values; what writes to a stream is centred last
    edits += [e for e in (*folding.edits, *running.edits, *moved.edits) if isinstance(e, TensorEdit)]
    edits += [edit for edit in (*centred.edits, *exchanged.edits) if isinstance(edit, TensorEdit)]
    edits += _treat_grown(folding.edits, [*centred.edits, *rotated.edits])
    edits += [edit for edit in rotated.edits if isinstance(edit, TensorEdit)]
    placed = {edit.module for edit in moved.edits if isinstance(edit, SwapNorm)}
    edits += [_swap(normmap, site, bare) for site in centred.sites if site.path not in placed]
    made = (
        *folding.edits,
        *running.edits,
        *centred.edits,
        *exchanged.edits,
        *rotated.edits,
        *moved.edits,
        *inserted.edits,
    )
    edits += dict.fromkeys(edit for edit in made if isinstance(edit, ModuleEdit))
    plan = Plan(
        architecture=normmap.architecture,
        model_type=model_type,
        request=request,
        claim=_claim(moved, exchanged, rotated, scales),
        reasons=(
            *_reasons(centred, folding, running, edits),
            *exchanged.reasons(chosen),
            *rotated.reasons(),
            *moved.reasons(request),
            *inserted.reasons(),
        ),
        converted=converted,
        refused=tuple(Refusal(site=path, reason=why) for path, why in refused.items()),
        base_output_unchanged=_base_unchanged(base_prefix, [*folding.across, *running.across]),
        edits=tuple(edits),
        rotated=tuple(rotated.streams),
        moved=tuple(
            MovedBlock(
                name=step.name,
                layer=step.layer,
                before=step.before,
                after=step.after,
                scale=(scales or Scales()).stream.get(step.name, 1.0),
            )
            for step in moved.steps
        ),
    )
    return plan, tuple(moved.steps)


def _check_rotation(request: Request, lowered: list[Site]) -> None:
    """Raises RefusedError where the streams are to be rotated, and something else that does not go with it."""
    if (request.rotate or lowered) and request.placements:
        raise RefusedError(
            f"{request.words()}: streams are rotated, or norms moved; leave --placement out, or --rotate and "
            f"--norm layernorm."
        )
    if request.rotate and lowered:
        raise RefusedError(
            f"{request.words()}: --norm layernorm rotates the stream itself, to where its mean is missed least; leave "
            f"--rotate out."
        )


def _claim(moved: Moved, exchanged: Exchanged, rotated: Rotated, scales: Scales | None) -> Claim:
    if exchanged.fitted or rotated.lowered:
        return "untrained"
    return "exact" if not moved.steps or moved.exact else "untrained" if scales is None else "calibrated"


def _sites_to_fold(normmap: NormMap, request: Request, chosen: Chosen) -> list[Site]:
    if not request.fold or request.placements:
        return []  # where norms move, their gains go with them
    alone = {site.path for site in chosen.by_themselves(normmap.sites)}
    sites = [site for path, site in normmap.sites.items() if path not in alone]
    return [site for site in sites if site.spec.kind in FOLDED]


def _treat_grown(folded: list[AnyEdit], centred: list[AnyEdit]) -> list[AnyEdit]:
    """A reader that is also a writer (queries to their norm) and grows a bias: treated as its weight's output is."""
    grown = {f"{edit.module}.bias" for edit in folded if isinstance(edit, GrowBias)}
    return [
        edit.model_copy(update={"tensor": bias.tensor, "axis": 0})
        for bias in folded
        if isinstance(bias, FoldBias) and bias.tensor in grown
        for edit in centred
        if isinstance(edit, Centre | FoldGain | Rotate) and edit.tensor == bias.reader and edit.axis != bias.axis
    ]


def _swap(normmap: NormMap, site: Site, bare: set[str]) -> SwapNorm:
    spec, keeps = site.spec, site.path not in bare
    name = spec.weight or spec.bias
    shape = normmap.shape(f"{site.path}.{name}") if name and keeps else (spec.width,)
    # a LayerNorm that casts does so once, at the end; the swapped norm keeps the site's own casting
    return SwapNorm(
        module=site.path,
        kind="rmsnorm",
        width=spec.width,
        eps=spec.eps,
        gain=spec.gain if keeps else None,
        bias=spec.bias is not None and keeps,
        casting=spec.casting,
        axis=spec.axes[0],
        shape=None if shape == (spec.width,) else shape,
    )


def _refuse(normmap: NormMap, request: Request, refused: dict[str, str], converted: tuple[str, ...]) -> None:
    way_out = (
        f"--partial does what can be done, at {len(converted)} of them, and leaves the rest as it is."
        if converted
        else "No site of this model can be converted so."
    )
    post = [stream.name for stream in normmap.streams if any("post" in block.placement for block in stream.blocks)]
    if post and any(choice.kind == centring.TARGET for choice in request.norms):
        way_out += (
            f"\nThe blocks of {', '.join(post)} are post-norm: linear maps read the stream itself, so its mean cannot "
            f"be taken out. Keep LayerNorm there; --fold alone needs no centring."
        )
    raise RefusedError(
        f"{normmap.architecture}: {request.words()} cannot be met at {len(refused)} of "
        f"{len(set(refused) | set(converted))} sites.\n{_listed(refused)}\n{way_out}",
        tuple(refused.items()),
    )


def _listed(reasons: dict[str, str]) -> str:
    """One line per reason, layers that differ in number only folded together."""
    shown = folded([(path, blurred(why)) for path, why in reasons.items()])
    return "\n".join(f"  {path}: {reasons[paths[0]]}" for path, paths in shown)


def _reasons(centred: centring.Centred, folding: Folding, running: Folding, edits: list[AnyEdit]) -> tuple[str, ...]:
    reasons = []
    if centred.sites:
        tensors = len([edit for edit in centred.edits if isinstance(edit, TensorEdit)])
        reasons.append(
            f"LayerNorm to RMSNorm at {len(centred.sites)} sites: {tensors} writers of the stream are centred, and "
            f"everything that reads it is invariant to its mean; the variance of a zero-mean vector is its mean square."
        )
    for kind, what, how in ((CentreOutput, "outputs", "come out"), (CentreInput, "inputs", "go in")):
        paths = [(edit.module, None) for edit in edits if isinstance(edit, kind)]
        if paths:
            shown = ", ".join(path for path, _ in folded(paths))
            reasons.append(f"The {what} of {shown} are centred as they {how}, in the module.")
    if folding.sites:
        reasons.append(f"Gain and bias of {len(folding.sites)} norms are moved into the linear maps that read them.")
    if running.sites:
        reasons.append(
            f"{len(running.sites)} batch norms, each an affine map of its channels as it runs, are folded into the "
            f"weights that write their inputs or read their outputs."
        )
    return tuple(reasons)


def _base_unchanged(prefix: str, folded_across: list[tuple[str, str]]) -> bool:
    """A norm folded into the head leaves the headless model without its gain."""

    def inside(module: str) -> bool:
        return module == prefix or module.startswith(f"{prefix}.")

    return not prefix or all(inside(norm) == inside(neighbour) for norm, neighbour in folded_across)
