"""Norms in another place: each block's slots, from one line of the table of placements to another.

A block is `x' = N_out( a x + N_branch( F( N_in(x) ) ) )` (DESIGN.md, "Placements"). On a raw stream (no N_out) write
n(x) = x / s(x) for the norm without gain and bias. Then `N_in(x) = g n(x) + b`, and because a norm does not see scale,

    n(x') = n( s n(x) + F(g n(x) + b) ).

A normalised stream carries `u = c n(x)` with a constant c for the scale s of every token, and the moved block is

    u' = c' n( u + F((g / c) u + b) ),

an ordinary post-norm block: c' is the gain of its norm, g / c and b go into the readers of `u`, or stay as an affine
where they cannot. It is exact where s is the same for all tokens; `calibration` finds the c that do best. With a scale
in the code (deepnorm, keel) the norm has no gain, `u' = n( c u + F(g u + b) )`.

What else reads the stream sees c n(x) in the place of x. The first moved step needs n(x) of what came before: a norm is
added where its layer begins. A final norm after a moved step becomes the affine `(g / c) u + b`.

On streams that stay raw, N_branch enters as `t n(F)`, with t the scale of F, or leaves as `g / t`; N_in leaves as
`g / c`.
"""

from __future__ import annotations

from normswap.errors import RefusedError
from normswap.planning.request import Placement
from normswap.planning.rewrites.moved import Moved, Scales
from normswap.planning.rewrites.places import NoPlace, Places
from normswap.planning.rewrites.slots import together
from normswap.planning.rewrites.steps import choose, steps_of
from normswap.planning.rewrites.stream_move import StreamMove
from normswap.understand.normmap import NormMap


def move(
    normmap: NormMap,
    placements: tuple[Placement, ...],
    scales: Scales | None,
    swapped: set[str],
    exact: bool = False,
) -> Moved:
    """Plan moving the norms of all streams.

    Args:
        placements: a row of the table and the layers it is for, None: all.
        scales: the constants, found on data; those that are missing are 1. None: all are.
        swapped: LayerNorms that become RMSNorms in the same plan.
        exact: take the form that computes the same function, where there is one.

    Raises:
        RefusedError: a placement or layer that is not there; the model has no stream.
    """
    result = Moved(placements=placements)
    places, named, constants = Places(normmap), set(), scales or Scales()
    every = {stream.name: steps_of(normmap, stream) for stream in normmap.streams}
    if not every:
        raise RefusedError(f"{normmap.architecture} has no residual stream with a norm: there is nothing to move.")
    choose([step for steps in every.values() for step in steps], placements)
    for stream in normmap.streams:
        if places.again(stream):
            continue  # a tower that runs twice: what is changed for the first run is changed for both
        try:
            found = StreamMove(normmap, places, stream, every[stream.name], constants, swapped, named, exact).run()
        except NoPlace as error:
            result.refused[stream.name] = str(error)
            continue
        if found.steps:
            result.exact = found.exact and (result.exact or not result.steps)
        result.edits += found.edits
        result.sites += found.sites
        result.steps += found.steps
        result.notes += found.notes
    result.edits = together(result.edits)
    if result.steps and not result.exact:
        result.claim = "untrained" if scales is None else "calibrated"
    return result
