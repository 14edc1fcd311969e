"""The forward of `norm-add-norm`: s = residual + N(x); y = N2(s), for rows that fit into registers.

Reads x and residual, writes s and y: 4 values per element.
"""

from __future__ import annotations

import triton
import triton.language as tl

from normswap.kernels.triton.steps import affine, normalised, read, rounded, statistics, stored


@triton.jit
def sandwich_kernel(
    x, residual, weight, bias, weight2, bias2, y, s, stats, stats2, rows, inner, outer, step,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, SUM: tl.constexpr, ACC: tl.constexpr,
    LAYERNORM: tl.constexpr, GAIN: tl.constexpr, BIAS: tl.constexpr, EPS: tl.constexpr, OUT: tl.constexpr,
    STEP: tl.constexpr, HAT: tl.constexpr, GAINED: tl.constexpr, BIASED: tl.constexpr,
    LAYERNORM2: tl.constexpr, GAIN2: tl.constexpr, BIAS2: tl.constexpr, EPS2: tl.constexpr,
    STEP2: tl.constexpr, HAT2: tl.constexpr, GAINED2: tl.constexpr, BIASED2: tl.constexpr,
):  # fmt: skip
    """As `forward_kernel`; names that end in 2 are of the second norm, and of its statistics."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (cols < WIDTH)[None, :]
    x_at = (row // inner * outer + row % inner * step)[:, None] + cols[None, :]
    at = (row * WIDTH)[:, None] + cols[None, :]
    h = read(x + x_at, x, mask, None, ACC)
    mean, rstd = statistics(h, mask, WIDTH, LAYERNORM, EPS, STEP, ACC)
    v = normalised(h, mean, rstd, LAYERNORM, STEP, HAT, ACC)
    v = affine(v, weight, bias, cols, WIDTH, GAIN, BIAS, GAINED, BIASED, ACC)
    v = rounded(v, OUT, ACC) + tl.load(residual + at, mask=mask, other=0.0).to(ACC)
    h = tl.where(mask, rounded(v, SUM, ACC), 0.0)
    stored(s + at, h, mask)
    mean2, rstd2 = statistics(h, mask, WIDTH, LAYERNORM2, EPS2, STEP2, ACC)
    v = normalised(h, mean2, rstd2, LAYERNORM2, STEP2, HAT2, ACC)
    v = affine(v, weight2, bias2, cols, WIDTH, GAIN2, BIAS2, GAINED2, BIASED2, ACC)
    stored(y + at, v, mask)
    tl.store(stats + row, rstd, mask=row < rows)
    tl.store(stats2 + row, rstd2, mask=row < rows)
    if LAYERNORM:
        tl.store(stats + rows + row, mean, mask=row < rows)
    if LAYERNORM2:
        tl.store(stats2 + rows + row, mean2, mask=row < rows)
