"""RMSNorm and LayerNorm on the CPU without a compiler: torch's operators in as few passes as they allow.

torch has a fused LayerNorm on the CPU and no fused RMSNorm: `F.rms_norm` and its backward are some fifteen operators,
each of which reads and writes all of its tensors. Here rows are taken a few at a time, so that between two operators
they stay in the processor's cache; and what can be a matrix times a vector reads its matrix once and writes none.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from normswap.kernels.plain import factor_of, gradients_of_plain, plain
from normswap.norms.spec import Casting, GainForm

_VALUES = 1 << 17  # taken at once by a thread: half a megabyte, of a cache (L2) of one or two
_FEW = 1 << 16  # values that are in cache anyway, where what counts is how many operators are called


def few_passes(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    kind: str,
    eps: float,
    gain: GainForm | None,
    casting: Casting,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """`gain(weight) * (x - m) / sqrt(mean((x - m)^2) + eps) + bias` over the last axis; differentiable, never in place.

    Args: as of `norm`; also float64 and, of half precision, `casting="input"`, which are `plain`.
    """
    how = {"kind": kind, "eps": eps, "gain": gain, "casting": casting, "out_dtype": out_dtype}
    if torch.compiler.is_compiling():
        return plain(x, weight, bias, **how)
    if casting == "float32" and gain != "1 + w" and x.dtype == out_dtype:
        if all(t is None or t.dtype == out_dtype for t in (weight, bias)):
            if kind == "layernorm":
                return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
            if bias is None and x.numel() < _FEW:
                return F.rms_norm(x, x.shape[-1:], weight, eps)
    half = x.dtype in (torch.bfloat16, torch.float16)
    rounds = x.dtype == torch.float32 or (half and casting != "input")
    if kind != "rmsnorm" or not rounds or x.numel() < _FEW:
        return plain(x, weight, bias, **how)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _Differentiable.apply(x, weight, bias, how)
    return _forward(x, weight, bias, how)[0]


def _forward(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, how: dict
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and `1 / sqrt(...)` of each row, (rows, 1)."""
    width = x.shape[-1]
    rows = x.contiguous().view(-1, width)
    factor = factor_of(weight, how["gain"], how["casting"], torch.float32)
    rounds = x.dtype if how["casting"] == "float32-before-gain" else torch.float32
    y = torch.empty_like(rows, dtype=how["out_dtype"])
    scale = torch.empty(len(rows), 1)
    least = torch.tensor(how["eps"], dtype=torch.float32)
    for xs, ys, r in _blocks(rows, y, scale):
        own = xs.dtype != torch.float32  # else float() is x itself, which is not to be written
        h = xs.float()
        torch.linalg.vector_norm(h, dim=-1, keepdim=True, out=r)
        torch.addcmul(least, r, r, value=1 / width, out=r).rsqrt_()
        h = h.mul_(r) if own else torch.mul(h, r, out=ys if ys.dtype == h.dtype else None)
        h = h.to(rounds)
        for by, act in ((factor, torch.mul), (bias, torch.add)):
            if by is not None:
                h = act(h, by, out=h if torch.promote_types(h.dtype, by.dtype) == h.dtype else None)
        if h.data_ptr() != ys.data_ptr():
            ys.copy_(h)
    return y.view(x.shape), scale


def _backward(
    dy: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, factor: torch.Tensor | None, sums: tuple[bool, bool]
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """`dx = r (t - h mean(t h))` with `t = factor dy`, `h = r x`; and the sums over rows of `dy h` and of `dy`.

    Args:
        sums: which of the two are wanted.
    """
    width = x.shape[-1]
    rows, gradients = (t.contiguous().view(-1, width) for t in (x, dy))
    dx = torch.empty_like(rows)
    dgain, dbias = (torch.zeros(width) if wanted else None for wanted in sums)
    ones = torch.ones(width) if factor is None else factor.float()
    for ds, xs, r, out in _blocks(gradients, rows, scale, dx):
        ds, xs = ds.float(), xs.float()
        product = ds * xs
        along = torch.mv(product, ones).unsqueeze(1)
        if dgain is not None:
            dgain.addmv_(product.T, r.squeeze(1))
        if dbias is not None:
            dbias += ds.sum(0)
        t = torch.mul(ds, ones, out=product if out.dtype != torch.float32 else out).mul_(r)
        t.addcmul_(xs, along.mul_(r.pow(3)), value=-1 / width)
        if out.dtype != torch.float32:
            out.copy_(t)
    return dx.view(x.shape), dgain, dbias


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, how):
        y, scale = _forward(x, weight, bias, how)
        ctx.save_for_backward(x, weight, bias, scale)
        ctx.how = how
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, scale = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            return *gradients_of_plain((x, weight, bias), needed, dy, ctx.how), None
        factor = factor_of(weight, ctx.how["gain"], ctx.how["casting"], torch.float32)
        dx, dgain, dbias = _backward(dy, x, scale, factor, needed[1:])
        # autograd brings a gradient into its parameter's dtype
        return dx, dgain, dbias, None


def _blocks(*tensors: torch.Tensor):
    """Rows of all tensors, so many at a time that they stay in cache."""
    width = max(t.shape[-1] for t in tensors)
    count = max(_VALUES * torch.get_num_threads() // width, 1)
    return zip(*(t.split(count) for t in tensors), strict=True)
