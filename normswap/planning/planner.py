"""Plan: a request and a NormMap give the ordered edits, the claim, and its reasons, or a refusal that says why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar, get_args

from normswap.errors import RefusedError
from normswap.paths import blurred, folded
from normswap.planning.choice import Chosen, choose_norms
from normswap.planning.edits import AnyEdit, ModuleEdit, SwapNorm
from normswap.planning.idle import Idle
from normswap.planning.plans import Claim, MovedBlock, Plan, Refusal
from normswap.planning.request import Request
from normswap.planning.rewrites import batchnorm
from normswap.planning.rewrites import centre as centring
from normswap.planning.rewrites.centre import centre, swap
from normswap.planning.rewrites.exchange import Exchanged, exchange
from normswap.planning.rewrites.fold import Folding, fold
from normswap.planning.rewrites.grown import treat_grown
from normswap.planning.rewrites.move import move
from normswap.planning.rewrites.moved import Moved, MovedStep, Scales
from normswap.planning.rewrites.qk_norm import Inserted, insert_qk_norms
from normswap.planning.rewrites.rewriting import Rewriting
from normswap.planning.rewrites.rotate import Rotated, Rotator
from normswap.planning.rewrites.untie import Ties, Untied
from normswap.understand.normmap import NormMap, Site

R = TypeVar("R", bound=Rewriting)
#: what may be promised, the most first
CLAIMS = get_args(Claim)
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
    rewritings, refused = _rewrite(normmap, request, chosen, stays_tied, scales)
    for rewriting in rewritings:
        refused |= rewriting.refused
    changed = {path for rewriting in rewritings for path in rewriting.sites}
    converted = tuple(path for path in normmap.sites if path in changed)
    done = any(rewriting.edits for rewriting in rewritings)
    if refused and not (request.partial and done):
        _refuse(normmap, request, refused, converted)
    if not done:
        _refuse_nothing(normmap, request)
    steps = tuple(step for moved in _of(Moved, rewritings) for step in moved.steps)
    constants = scales.stream if scales is not None else {}
    plan = Plan(
        architecture=normmap.architecture,
        model_type=model_type,
        request=request,
        claim=max((rewriting.claim for rewriting in rewritings), key=CLAIMS.index),
        reasons=tuple(reason for rewriting in rewritings for reason in rewriting.reasons()),
        converted=converted,
        refused=tuple(Refusal(site=path, reason=why) for path, why in refused.items()),
        base_output_unchanged=_base_unchanged(base_prefix, rewritings),
        edits=tuple(_in_order(rewritings)),
        rotated=tuple(stream for rotated in _of(Rotated, rewritings) for stream in rotated.streams),
        moved=tuple(
            MovedBlock(
                name=step.name,
                layer=step.layer,
                before=step.before,
                after=step.after,
                scale=constants.get(step.name, 1.0),
            )
            for step in steps
        ),
    )
    return plan, steps


def _rewrite(
    normmap: NormMap, request: Request, chosen: Chosen, stays_tied: str | None, scales: Scales | None
) -> tuple[list[Rewriting], dict[str, str]]:
    """What each rewrite asks for, in the order in which it is told, and what was refused before."""
    exchanged = exchange(normmap, chosen.by_themselves(normmap.sites), chosen)
    lowered = chosen.by_rewrite(normmap.sites, "rotate")
    _check_together(normmap, request, exchanged, lowered)
    swaps, wanted = chosen.by_rewrite(normmap.sites, "centre"), _sites_to_fold(normmap, request, chosen)
    rotator = Rotator(normmap, request, lowered, exchanged.sites)
    idle = Idle(normmap)
    unseen, unread = idle.refuse_centring(swaps), idle.refuse_folding(wanted)
    for untied in (False, True):
        ties = Ties(normmap, untied, stays_tied)
        centred = centre(normmap, [site for site in swaps if site.path not in unseen], ties, request)
        rotated = rotator.rotate(ties, set(centred.sites), centred.edits)
        taken = {*unread, *rotated.folding.sites}
        folds = [site for site in wanted if site.path not in taken]
        folding = fold(normmap, [s for s in folds if s.spec.kind != batchnorm.KIND], ties, set(centred.sites))
        folding.add(rotated.folding)
        running = batchnorm.fold_running(normmap, [s for s in folds if s.spec.kind == batchnorm.KIND], ties)
        if request.tied == "keep" or stays_tied or not ties.wanted:
            break  # nothing is gained by untying
    folding.refused = unread | folding.refused
    centred.refused = unseen | centred.refused
    swapped = set(centred.sites)
    moved = move(normmap, request.placements, scales, swapped, request.exact) if request.placements else Moved()
    inserted = insert_qk_norms(normmap, request.qk_norm) if request.qk_norm else Inserted()
    placed = {edit.module for edit in moved.edits if isinstance(edit, SwapNorm)}
    rewritings = [
        Untied(edits=ties.edits()),
        swap(normmap, centred, folding.sites, placed),
        folding,
        running,
        centred,
        exchanged,
        treat_grown(folding, [centred, rotated]),
        rotated,
        moved,
        inserted,
    ]
    return rewritings, chosen.refused | exchanged.refused


def _of(kind: type[R], rewritings: list[Rewriting]) -> list[R]:
    return [rewriting for rewriting in rewritings if isinstance(rewriting, kind)]


def _in_order(rewritings: list[Rewriting]) -> Iterator[AnyEdit]:
    """All edits: those of tensors stage by stage, then those of modules."""
    for rewriting in sorted(rewritings, key=lambda rewriting: rewriting.stage):
        yield from (edit for edit in rewriting.edits if not isinstance(edit, ModuleEdit))
    yield from dict.fromkeys(e for rewriting in rewritings for e in rewriting.edits if isinstance(e, ModuleEdit))


def _check_together(normmap: NormMap, request: Request, exchanged: Exchanged, lowered: list[Site]) -> None:
    """Raises RefusedError where two things are asked for that do not go together."""
    if exchanged.sites and request.placements:
        raise RefusedError(
            f"{request.words()}: norms that move can become rmsnorm on their way, and no other kind. Move them first, "
            f"or leave --placement out."
        )
    if exchanged.sites and request.fold:
        raise RefusedError(
            f"{request.words()}: the gains of {', '.join(exchanged.sites[:3])} ... are made anew and cannot be folded "
            f"in the same run. Leave --fold out."
        )
    if request.placements and (own := [path for path in normmap.own if normmap.sites[path].stream is not None]):
        raise RefusedError(
            f"{request.words()}: {own[0]} was put in by a conversion and is a {normmap.sites[own[0]].spec.kind}; only "
            f"LayerNorm and RMSNorm can move. Move the norms of the model that it was made from."
        )
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


def _sites_to_fold(normmap: NormMap, request: Request, chosen: Chosen) -> list[Site]:
    if not request.fold or request.placements:
        return []  # where norms move, their gains go with them
    alone = {site.path for site in chosen.by_themselves(normmap.sites)}
    sites = [site for path, site in normmap.sites.items() if path not in alone]
    return [site for site in sites if site.spec.kind in FOLDED]


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


def _refuse_nothing(normmap: NormMap, request: Request) -> None:
    if request.placements:
        raise RefusedError(f"{normmap.architecture}: every block stands so already: nothing to move.")
    if request.rotate:
        raise RefusedError(f"{normmap.architecture} has no stream of RMSNorms to rotate: nothing to do.")
    raise RefusedError(f"{normmap.architecture} has no norm with a gain or bias to fold: nothing to do.")


def _base_unchanged(prefix: str, rewritings: list[Rewriting]) -> bool:
    """A norm folded into the head leaves the headless model without its gain."""

    def inside(module: str) -> bool:
        return module == prefix or module.startswith(f"{prefix}.")

    across = [pair for folding in _of(Folding, rewritings) for pair in folding.across]
    return not prefix or all(inside(norm) == inside(neighbour) for norm, neighbour in across)
