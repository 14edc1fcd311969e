"""The backward of a norm: one persistent kernel, each program walking over tiles of rows.

With g = dy * gain(w) and means over a row,

    dh = rstd * (g - mean(g) - x_hat * mean(g * x_hat))     mean(g) for a LayerNorm only
    dw = sum over rows of dy * x_hat;   db = sum over rows of dy

reads dy and what the norm read, writes its gradient: 3 values per element, 4 where a gradient `ds` that arrived at the
norm's input (the `s` of add-norm) is added. Each program adds its rows up and leaves one partial sum of dw and db;
`reduce.py` sums them. There are as many programs as the GPU runs at once, so partial sums stay few however many rows
there are, and the result is the same each time. They are skipped where no gradient of the weights is asked for.

A row that fits is held in registers. Of a longer one two passes read it, the second from the L2 cache, and the partial
sums live in memory, that is in L2: they are read and written once per tile of rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from normswap.kernels.triton.steps import gain, rounded, stored


@triton.jit
def backward_kernel(
    dy, ds, x, stats, weight, dx, partials, rows, inner, outer, step,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, KEEP: tl.constexpr,
    LAYERNORM: tl.constexpr, GAIN: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, DS: tl.constexpr,
    STEP: tl.constexpr, HAT: tl.constexpr, GAINED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Rows `(rows, WIDTH)`; those of x lie as `rows.Rows` says, all others one after the other.

    WEIGHT, BIAS: whether their gradients are asked for; `partials` is `(programs, WEIGHT + BIAS, WIDTH)`,
    of zeros where a row does not fit.
    DS: whether `ds` is added. KEEP: whether the gain stays in registers from row to row.
    """
    program = tl.program_id(0)
    tiles = tl.cdiv(rows, ROWS)
    cols = tl.arange(0, BLOCK)
    partials += program.to(tl.int64) * (WEIGHT + BIAS) * WIDTH
    if BLOCK >= WIDTH:
        if KEEP and GAIN is not None:
            w = gain(weight, cols, WIDTH, GAIN, GAINED, ACC)[None, :]
        dw = tl.zeros([ROWS, BLOCK], ACC)
        db = tl.zeros([ROWS, BLOCK], ACC)
        for tile in tl.range(program, tiles, tl.num_programs(0), num_stages=STAGES):
            row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
            here = row < rows
            mask = here[:, None] & (cols < WIDTH)[None, :]
            at = (row * WIDTH)[:, None]
            x_at = (row // inner * outer + row % inner * step)[:, None]
            d = tl.load(dy + at + cols[None, :], mask=mask, other=0.0).to(ACC)
            h = tl.load(x + x_at + cols[None, :], mask=mask, other=0.0).to(ACC)
            rstd, mean = kept_statistics(stats, row, rows, here, LAYERNORM, ACC)
            x_hat = backward_normalised(h, mean, rstd, mask, LAYERNORM, STEP, ACC)
            if WEIGHT:
                dw += d * rounded(x_hat, HAT, ACC)
            if BIAS:
                db += d
            if GAIN is not None:
                if not KEEP:
                    w = gain(weight, cols, WIDTH, GAIN, GAINED, ACC)[None, :]
                d *= w
            dh = input_gradient(d, x_hat, rstd, WIDTH, LAYERNORM)
            if DS:
                dh += tl.load(ds + at + cols[None, :], mask=mask, other=0.0).to(ACC)
            stored(dx + at + cols[None, :], dh, mask)
        leave(partials, dw, db, cols, WIDTH, WEIGHT, BIAS)
    else:
        for tile in range(program, tiles, tl.num_programs(0)):
            row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
            here = row < rows
            at = (row * WIDTH)[:, None]
            x_at = (row // inner * outer + row % inner * step)[:, None]
            rstd, mean = kept_statistics(stats, row, rows, here, LAYERNORM, ACC)
            gs = tl.zeros([ROWS, BLOCK], ACC)
            alongs = tl.zeros([ROWS, BLOCK], ACC)
            for start in range(0, WIDTH, BLOCK):
                c = start + cols
                mask = here[:, None] & (c < WIDTH)[None, :]
                g = tl.load(dy + at + c[None, :], mask=mask, other=0.0).to(ACC)
                if GAIN is not None:
                    g *= gain(weight, c, WIDTH, GAIN, GAINED, ACC)[None, :]
                h = tl.load(x + x_at + c[None, :], mask=mask, other=0.0).to(ACC)
                alongs += g * backward_normalised(h, mean, rstd, mask, LAYERNORM, STEP, ACC)
                gs += g
            along = (tl.sum(alongs, 1) / WIDTH)[:, None]
            g_mean = (tl.sum(gs, 1) / WIDTH)[:, None]
            for start in range(0, WIDTH, BLOCK):
                c = start + cols
                mask = here[:, None] & (c < WIDTH)[None, :]
                d = tl.load(dy + at + c[None, :], mask=mask, other=0.0).to(ACC)
                h = tl.load(x + x_at + c[None, :], mask=mask, other=0.0).to(ACC)
                x_hat = backward_normalised(h, mean, rstd, mask, LAYERNORM, STEP, ACC)
                if WEIGHT:
                    _add(partials + c, tl.sum(d * rounded(x_hat, HAT, ACC), 0), c < WIDTH)
                if BIAS:
                    _add(partials + WEIGHT * WIDTH + c, tl.sum(d, 0), c < WIDTH)
                if GAIN is not None:
                    d *= gain(weight, c, WIDTH, GAIN, GAINED, ACC)[None, :]
                dh = d - x_hat * along
                if LAYERNORM:
                    dh -= g_mean
                dh *= rstd[:, None]
                if DS:
                    dh += tl.load(ds + at + c[None, :], mask=mask, other=0.0).to(ACC)
                stored(dx + at + c[None, :], dh, mask)
            tl.debug_barrier()  # the next tile reads the partial sums that this one wrote, by other threads perhaps


@triton.jit
def kept_statistics(stats, row, rows, here, LAYERNORM: tl.constexpr, ACC: tl.constexpr):
    """What the forward kept of some rows: rstd, and a LayerNorm's mean."""
    rstd = tl.load(stats + row, mask=here, other=0.0)
    mean = tl.zeros([row.shape[0]], ACC)
    if LAYERNORM:
        mean = tl.load(stats + rows + row, mask=here, other=0.0)
    return rstd, mean


@triton.jit
def backward_normalised(h, mean, rstd, mask, LAYERNORM: tl.constexpr, STEP: tl.constexpr, ACC: tl.constexpr):
    """x_hat, zero outside of the mask, not rounded as the forward's: the gradient of h is that of the function."""
    if LAYERNORM:
        h = tl.where(mask, rounded(h - mean[:, None], STEP, ACC), 0.0)
    return h * rstd[:, None]


@triton.jit
def input_gradient(g, x_hat, rstd, WIDTH: tl.constexpr, LAYERNORM: tl.constexpr):
    """dh of rows that are whole."""
    dh = g - x_hat * (tl.sum(g * x_hat, 1) / WIDTH)[:, None]
    if LAYERNORM:
        dh -= (tl.sum(g, 1) / WIDTH)[:, None]
    return dh * rstd[:, None]


@triton.jit
def leave(partials, dw, db, cols, WIDTH: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr):
    """A program's partial sums, from those of each row of its tiles."""
    if WEIGHT:
        tl.store(partials + cols, tl.sum(dw, 0), mask=cols < WIDTH)
    if BIAS:
        tl.store(partials + WEIGHT * WIDTH + cols, tl.sum(db, 0), mask=cols < WIDTH)


@triton.jit
def _add(pointers, v, mask):
    """v added to a sum in memory."""
    tl.store(pointers, tl.load(pointers, mask=mask, other=0.0) + v, mask=mask)
