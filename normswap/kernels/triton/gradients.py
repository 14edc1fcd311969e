"""What each form keeps for its backward, and how its gradients come from that of a norm.

What is kept: what a norm read, its statistics, gain and bias; never x_hat. Gradients that arrive are read, never
written to: in `residual + norm(x)` the one that arrives at the sum is the residual's as well.

`keep_*` and `of_*` serve operators (`library`) and `torch.autograd.Function`s (`eager`) alike: inputs and outputs are
those of the operators, and `run` is the operator `norm_backward`, or a function that does the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def keep_norm(ctx, inputs, output) -> None:
    """Of `norm`."""
    x, weight, bias, *how = inputs
    _keep(ctx, how, x, output[1], weight, bias)


def of_norm(run: Callable) -> Callable:
    """The backward of `norm`."""

    def backward(ctx, dy, _):
        if dy is None:
            return (None,) * 8
        dx, dw, db = _of_one(ctx, run, dy, None, ctx.how, ctx.needs_input_grad[1:3])
        return dx, dw, db, *(None,) * 5

    return backward


def keep_add_norm(ctx, inputs, output) -> None:
    """Of `add_norm`: s, not its addends."""
    x, residual, weight, bias, *how = inputs
    ctx.dtypes = x.dtype, residual.dtype
    _keep(ctx, how, output[1], output[2], weight, bias)


def of_add_norm(run: Callable) -> Callable:
    """The backward of `add_norm`."""

    def backward(ctx, dy, ds, _):
        dw = db = None
        if dy is not None:
            ds, dw, db = _of_one(ctx, run, dy, ds, ctx.how, ctx.needs_input_grad[2:4])
        return *_both(ctx, ds), dw, db, *(None,) * 5

    return backward


def keep_norm_add(ctx, inputs, output) -> None:
    """Of `norm_add`: x, not the sum."""
    x, residual, weight, bias, *how = inputs
    ctx.dtypes = how[0], residual.dtype
    _keep(ctx, how, x, output[1], weight, bias)


def of_norm_add(run: Callable) -> Callable:
    """The backward of `norm_add`."""

    def backward(ctx, ds, _):
        if ds is None:
            return (None,) * 9
        dy, dr = _both(ctx, ds)
        dx, dw, db = _of_one(ctx, run, dy, None, ctx.how, ctx.needs_input_grad[2:4])
        return dx, dr, dw, db, *(None,) * 5

    return backward


def keep_norm_add_norm(ctx, inputs, output) -> None:
    """Of `norm_add_norm`: x and s."""
    x, residual, weight, bias, weight2, bias2, *how = inputs
    ctx.dtypes = how[0], residual.dtype
    _keep(ctx, how, x, output[2], weight, bias, output[1], output[3], weight2, bias2)


def of_norm_add_norm(run: Callable, run_both: Callable) -> Callable:
    """The backward of `norm_add_norm`; `run_both` is the operator `norm_add_norm_backward`, or does the same."""

    def backward(ctx, dy, ds, *_):
        dw = db = dw2 = db2 = None
        if dy is not None:
            x, stats, weight, bias, s, stats2, weight2, bias2 = ctx.saved_tensors
            needs = [
                needed and p is not None
                for needed, p in zip(ctx.needs_input_grad[2:6], (weight, bias, weight2, bias2), strict=True)
            ]
            ds, dx, *found = run_both(dy, x, s, stats, stats2, weight, bias, weight2, bias2, ds, *ctx.how, *needs)
            dw, db, dw2, db2 = (one if needed else None for one, needed in zip(found, needs, strict=True))
        elif ds is None:
            return (None,) * 16
        else:
            dx, dw, db = _of_one(ctx, run, ds.to(ctx.how[0]), None, ctx.how[:5], ctx.needs_input_grad[2:4])
        return dx, ds.to(ctx.dtypes[1]), dw, db, dw2, db2, *(None,) * 10

    return backward


def _keep(ctx, how, *tensors) -> None:
    ctx.how = tuple(how)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _of_one(ctx, run: Callable, dy, ds, how, needed) -> tuple:
    """Gradients of what the first norm read and of its gain and bias."""
    read, stats, weight, bias = ctx.saved_tensors[:4]
    need_weight, need_bias = needed[0] and weight is not None, needed[1] and bias is not None
    dx, dw, db = run(dy, read, stats, weight, bias, ds, *how, need_weight, need_bias)
    return dx, dw if need_weight else None, db if need_bias else None


def _both(ctx, ds: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The gradient of a sum as that of its addends, in their dtypes."""
    return tuple(None if ds is None else ds.to(dtype) for dtype in ctx.dtypes)
