"""The backward of `norm-add-norm` in one persistent kernel, for rows that fit into registers twice.

With backward_N(dy, x) the gradient of what N reads (`backward.py`),

    dr = ds + backward_N2(dy, s)    that of s, and of the residual
    dx = backward_N(dr, x)

reads dy, ds, s and x, writes dr and dx: 6 values per element. Wider rows take the kernel of one norm twice, and 7.
"""

from __future__ import annotations

import triton
import triton.language as tl

from normswap.kernels.triton.backward import backward_normalised, input_gradient, kept_statistics, leave
from normswap.kernels.triton.steps import gain, rounded, stored


@triton.jit
def sandwich_backward_kernel(
    dy, ds, s, stats2, weight2, x, stats, weight, dr, dx, partials, partials2, rows, inner, outer, step,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, DS: tl.constexpr,
    SUM: tl.constexpr, OUT: tl.constexpr, ACC: tl.constexpr,
    LAYERNORM: tl.constexpr, GAIN: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    STEP: tl.constexpr, HAT: tl.constexpr, GAINED: tl.constexpr,
    LAYERNORM2: tl.constexpr, GAIN2: tl.constexpr, WEIGHT2: tl.constexpr, BIAS2: tl.constexpr,
    STEP2: tl.constexpr, HAT2: tl.constexpr, GAINED2: tl.constexpr,
):  # fmt: skip
    """As `backward_kernel`; names that end in 2 are of the second norm. Rows of x alone may lie anywhere."""
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    if GAIN is not None:
        w = gain(weight, cols, WIDTH, GAIN, GAINED, ACC)[None, :]
    if GAIN2 is not None:
        w2 = gain(weight2, cols, WIDTH, GAIN2, GAINED2, ACC)[None, :]
    dw = tl.zeros([ROWS, BLOCK], ACC)
    db = tl.zeros([ROWS, BLOCK], ACC)
    dw2 = tl.zeros([ROWS, BLOCK], ACC)
    db2 = tl.zeros([ROWS, BLOCK], ACC)
    for tile in tl.range(program, tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        here = row < rows
        mask = here[:, None] & (cols < WIDTH)[None, :]
        at = (row * WIDTH)[:, None] + cols[None, :]
        x_at = (row // inner * outer + row % inner * step)[:, None] + cols[None, :]
        d = tl.load(dy + at, mask=mask, other=0.0).to(ACC)
        h = tl.load(s + at, mask=mask, other=0.0).to(ACC)
        rstd, mean = kept_statistics(stats2, row, rows, here, LAYERNORM2, ACC)
        x_hat = backward_normalised(h, mean, rstd, mask, LAYERNORM2, STEP2, ACC)
        if WEIGHT2:
            dw2 += d * rounded(x_hat, HAT2, ACC)
        if BIAS2:
            db2 += d
        if GAIN2 is not None:
            d *= w2
        d = input_gradient(d, x_hat, rstd, WIDTH, LAYERNORM2)
        if DS:
            d += tl.load(ds + at, mask=mask, other=0.0).to(ACC)
        stored(dr + at, d, mask)
        d = tl.where(mask, rounded(rounded(d, SUM, ACC), OUT, ACC), 0.0)
        h = tl.load(x + x_at, mask=mask, other=0.0).to(ACC)
        rstd, mean = kept_statistics(stats, row, rows, here, LAYERNORM, ACC)
        x_hat = backward_normalised(h, mean, rstd, mask, LAYERNORM, STEP, ACC)
        if WEIGHT:
            dw += d * rounded(x_hat, HAT, ACC)
        if BIAS:
            db += d
        if GAIN is not None:
            d *= w
        stored(dx + at, input_gradient(d, x_hat, rstd, WIDTH, LAYERNORM), mask)
    leave(partials + program * (WEIGHT + BIAS) * WIDTH, dw, db, cols, WIDTH, WEIGHT, BIAS)
    leave(partials2 + program * (WEIGHT2 + BIAS2) * WIDTH, dw2, db2, cols, WIDTH, WEIGHT2, BIAS2)
