"""The sum of the partial sums that `backward.py` leaves, always in the same order."""

from __future__ import annotations

import triton
import triton.language as tl

from normswap.kernels.triton.steps import stored


@triton.jit
def reduce_kernel(
    partials, dw, db, programs,
    WIDTH: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """`partials` `(programs, WEIGHT + BIAS, WIDTH)`; each program sums COLS columns, of dw or of db."""
    which = tl.program_id(1)
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    inside = cols < WIDTH
    sums = tl.zeros([ROWS, COLS], ACC)
    for start in range(0, programs, ROWS):
        row = start + tl.arange(0, ROWS)
        at = (row.to(tl.int64) * (WEIGHT + BIAS) + which) * WIDTH
        sums += tl.load(
            partials + at[:, None] + cols[None, :], mask=(row < programs)[:, None] & inside[None, :], other=0.0
        )
    total = tl.sum(sums, 0)
    if WEIGHT and BIAS:
        if which == 0:
            stored(dw + cols, total, inside)
        else:
            stored(db + cols, total, inside)
    elif WEIGHT:
        stored(dw + cols, total, inside)
    else:
        stored(db + cols, total, inside)
