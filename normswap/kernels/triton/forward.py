"""The forward of `norm`, `add-norm` and `norm-add`: one kernel, each program a few rows.

    norm        y = N(x)                       reads x, writes y                     2 values per element
    add-norm    s = residual + x; y = N(s)     reads x, residual, writes s, y        4
    norm-add    s = residual + N(x)            reads x, residual, writes s           3

A row that fits is held in registers from the first read to the last write. A longer one is read once per pass, two or
three times, of which all but the first come from the L2 cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from normswap.kernels.triton.steps import affine, normalised, read, root, rounded, statistics, stored


@triton.jit
def forward_kernel(
    x, residual, weight, bias, y, s, stats, rows, inner, outer, step,
    FORM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, LAYERNORM: tl.constexpr,
    GAIN: tl.constexpr, BIAS: tl.constexpr, EPS: tl.constexpr, OUT: tl.constexpr, SUM: tl.constexpr,
    STEP: tl.constexpr, HAT: tl.constexpr, GAINED: tl.constexpr, BIASED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Rows `(rows, WIDTH)`; those of x lie as `rows.Rows` says, all others one after the other.

    `stats` `(1 or 2, rows)` takes 1 / sqrt(...) and a LayerNorm's mean, for the backward.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = (row < rows)[:, None]
    x += (row // inner * outer + row % inner * step)[:, None]
    at = (row * WIDTH)[:, None]
    cols = tl.arange(0, BLOCK)
    ADDED: tl.constexpr = SUM if FORM == "add-norm" else None
    if BLOCK >= WIDTH:
        mask = here & (cols < WIDTH)[None, :]
        h = read(x + cols[None, :], residual + at + cols[None, :], mask, ADDED, ACC)
        mean, rstd = statistics(h, mask, WIDTH, LAYERNORM, EPS, STEP, ACC)
        _write(
            h, mean, rstd, residual + at, weight, bias, y + at, s + at, cols, mask,
            FORM, WIDTH, LAYERNORM, GAIN, BIAS, OUT, SUM, STEP, HAT, GAINED, BIASED, ACC,
        )  # fmt: skip
    else:
        mean, rstd = _looped_statistics(x, residual + at, here, ADDED, WIDTH, BLOCK, ROWS, LAYERNORM, EPS, STEP, ACC)
        for start in range(0, WIDTH, BLOCK):
            at_cols = start + cols
            mask = here & (at_cols < WIDTH)[None, :]
            h = read(x + at_cols[None, :], residual + at + at_cols[None, :], mask, ADDED, ACC)
            _write(
                h, mean, rstd, residual + at, weight, bias, y + at, s + at, at_cols, mask,
                FORM, WIDTH, LAYERNORM, GAIN, BIAS, OUT, SUM, STEP, HAT, GAINED, BIASED, ACC,
            )  # fmt: skip
    tl.store(stats + row, rstd, mask=row < rows)
    if LAYERNORM:
        tl.store(stats + rows + row, mean, mask=row < rows)


@triton.jit
def _write(
    h, mean, rstd, residual, weight, bias, y, s, cols, mask,
    FORM: tl.constexpr, WIDTH: tl.constexpr, LAYERNORM: tl.constexpr, GAIN: tl.constexpr, BIAS: tl.constexpr,
    OUT: tl.constexpr, SUM: tl.constexpr, STEP: tl.constexpr, HAT: tl.constexpr, GAINED: tl.constexpr,
    BIASED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The results of some columns, from what the norm read."""
    v = normalised(h, mean, rstd, LAYERNORM, STEP, HAT, ACC)
    v = affine(v, weight, bias, cols, WIDTH, GAIN, BIAS, GAINED, BIASED, ACC)
    if FORM == "norm-add":
        v = rounded(v, OUT, ACC) + tl.load(residual + cols[None, :], mask=mask, other=0.0).to(ACC)
        stored(s + cols[None, :], v, mask)
    else:
        if FORM == "add-norm":
            stored(s + cols[None, :], h, mask)
        stored(y + cols[None, :], v, mask)


@triton.jit
def _looped_statistics(
    x, residual, here, SUM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    LAYERNORM: tl.constexpr, EPS: tl.constexpr, STEP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """As `statistics`, of rows that are read BLOCK columns at a time."""
    cols = tl.arange(0, BLOCK)
    mean = tl.zeros([ROWS], ACC)
    if LAYERNORM:
        sums = tl.zeros([ROWS, BLOCK], ACC)
        for start in range(0, WIDTH, BLOCK):
            mask = here & (start + cols < WIDTH)[None, :]
            sums += read(x + (start + cols)[None, :], residual + (start + cols)[None, :], mask, SUM, ACC)
        mean = rounded(tl.sum(sums, 1) / WIDTH, STEP, ACC)
    squares = tl.zeros([ROWS, BLOCK], ACC)
    for start in range(0, WIDTH, BLOCK):
        mask = here & (start + cols < WIDTH)[None, :]
        h = read(x + (start + cols)[None, :], residual + (start + cols)[None, :], mask, SUM, ACC)
        if LAYERNORM:
            h = tl.where(mask, rounded(h - mean[:, None], STEP, ACC), 0.0)
        squares += rounded(h * h, STEP, ACC)
    return mean, root(tl.sum(squares, 1), WIDTH, EPS, STEP, ACC)
