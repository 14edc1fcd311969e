"""The steps that all kernels are made of, on tiles `(ROWS, BLOCK)` of the rows of a tensor."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _nothing():
    pass


#: whether kernels run in the interpreter, on the CPU (TRITON_INTERPRET=1 before triton was imported)
INTERPRETED: tl.constexpr = tl.constexpr(not isinstance(_nothing, triton.JITFunction))


@triton.jit
def rounded(v, DTYPE: tl.constexpr, ACC: tl.constexpr):
    """v as it is after a stay in DTYPE."""
    if DTYPE == ACC:
        return v
    if INTERPRETED and DTYPE == tl.bfloat16:  # the interpreter cuts bfloat16 off, a GPU rounds to nearest even
        bits = v.to(tl.float32).to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        v = tl.where(v == v, nearest.to(tl.float32, bitcast=True), v)
    return v.to(DTYPE).to(ACC)


@triton.jit
def stored(pointers, v, mask):
    """v rounded to the dtype of where it goes, and put there."""
    narrow: tl.constexpr = pointers.dtype.element_ty
    tl.store(pointers, rounded(v, narrow, v.dtype).to(narrow), mask=mask)


@triton.jit
def read(x, residual, mask, SUM: tl.constexpr, ACC: tl.constexpr):
    """What a norm reads: x, or with SUM the dtype of a stream, residual + x rounded to it. Both are pointers."""
    h = tl.load(x, mask=mask, other=0.0).to(ACC)
    if SUM is not None:
        h = rounded(tl.load(residual, mask=mask, other=0.0).to(ACC) + h, SUM, ACC)
    return h


@triton.jit
def root(squares, WIDTH: tl.constexpr, EPS: tl.constexpr, STEP: tl.constexpr, ACC: tl.constexpr):
    """1 / sqrt(squares / WIDTH + EPS), from the sums of squares of rows."""
    mean = rounded(squares / WIDTH, STEP, ACC)
    return rounded(tl.rsqrt(rounded(mean + EPS, STEP, ACC)), STEP, ACC)


@triton.jit
def statistics(
    h, mask, WIDTH: tl.constexpr, LAYERNORM: tl.constexpr, EPS: tl.constexpr, STEP: tl.constexpr, ACC: tl.constexpr
):
    """Of rows that are whole: mean (0 for an RMSNorm) and 1 / sqrt(mean((h - mean)^2) + eps), `(ROWS,)`."""
    if LAYERNORM:
        mean = rounded(tl.sum(h, 1) / WIDTH, STEP, ACC)
        h = tl.where(mask, rounded(h - mean[:, None], STEP, ACC), 0.0)
    else:
        mean = tl.zeros([h.shape[0]], ACC)
    return mean, root(tl.sum(rounded(h * h, STEP, ACC), 1), WIDTH, EPS, STEP, ACC)


@triton.jit
def normalised(h, mean, rstd, LAYERNORM: tl.constexpr, STEP: tl.constexpr, HAT: tl.constexpr, ACC: tl.constexpr):
    """(h - mean) * rstd."""
    if LAYERNORM:
        h = rounded(h - mean[:, None], STEP, ACC)
    return rounded(h * rstd[:, None], HAT, ACC)


@triton.jit
def gain(weight, cols, WIDTH: tl.constexpr, GAIN: tl.constexpr, GAINED: tl.constexpr, ACC: tl.constexpr):
    """The gain of some columns: w, or 1 + w."""
    w = tl.load(weight + cols, mask=cols < WIDTH, other=0.0).to(ACC)
    if GAIN == "1 + w":
        w = rounded(1.0 + w, GAINED, ACC)
    return w


@triton.jit
def affine(
    x_hat,
    weight,
    bias,
    cols,
    WIDTH: tl.constexpr,
    GAIN: tl.constexpr,
    BIAS: tl.constexpr,
    GAINED: tl.constexpr,
    BIASED: tl.constexpr,
    ACC: tl.constexpr,
):
    """x_hat with its gain and bias, where there are any."""
    if GAIN is not None:
        x_hat = rounded(x_hat * gain(weight, cols, WIDTH, GAIN, GAINED, ACC)[None, :], GAINED, ACC)
    if BIAS:
        b = tl.load(bias + cols, mask=cols < WIDTH, other=0.0).to(ACC)
        x_hat = rounded(x_hat + b[None, :], BIASED, ACC)
    return x_hat
