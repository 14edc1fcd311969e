"""The kernels as operators of torch, `torch.ops.normswap`: for compilers, DTensor, and whatever watches dispatch.

    norm(x, weight, bias, ...) -> (y, stats)
    add_norm(x, residual, weight, bias, ...) -> (y, s, stats)
    norm_add(x, residual, weight, bias, ...) -> (s, stats)
    norm_add_norm(x, residual, weight, bias, weight2, bias2, ...) -> (y, s, stats, stats2)
    norm_backward(dy, x, stats, weight, bias, ds, ...) -> (dx, dw, db)
    norm_add_norm_backward(dy, x, s, stats, stats2, weight, bias, weight2, bias2, ds, ...) -> (dr, dx, dw, db, dw2, db2)

Shapes are those of `launch`; a gradient that is not asked for has size 0. The arguments after the tensors say how a
norm computes; `out_dtype` comes first of them, because DTensor takes what follows the first number to be part of what a
sharding is chosen by.
"""

from __future__ import annotations

import torch

from normswap.errors import KernelError
from normswap.kernels.triton import gradients
from normswap.kernels.triton.launch import (
    Norm,
    launch_add_norm,
    launch_norm,
    launch_norm_add,
    launch_norm_add_norm,
    new_stats,
)
from normswap.kernels.triton.launch_backward import launch_backward, launch_norm_add_norm_backward

Tensor = torch.Tensor


@torch.library.custom_op("normswap::norm", mutates_args=())
def norm_op(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    kind: str,
    eps: float,
    gain: str | None,
    casting: str,
) -> tuple[Tensor, Tensor]:
    """y = N(x), and the statistics."""
    return launch_norm(x, weight, bias, Norm(out_dtype, kind, eps, gain, casting))


@norm_op.register_fake
def _(x, weight, bias, *how):
    norm = Norm(*how)
    return x.new_empty(x.shape, dtype=norm.out_dtype), new_stats(x, norm)


@torch.library.custom_op("normswap::add_norm", mutates_args=())
def add_norm_op(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    kind: str,
    eps: float,
    gain: str | None,
    casting: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """y = N(s) and s = residual + x, and the statistics."""
    return launch_add_norm(x, residual, weight, bias, Norm(out_dtype, kind, eps, gain, casting))


@add_norm_op.register_fake
def _(x, residual, weight, bias, *how):
    norm = Norm(*how)
    s = x.new_empty(x.shape, dtype=torch.promote_types(residual.dtype, x.dtype))
    return x.new_empty(x.shape, dtype=norm.out_dtype), s, new_stats(s, norm)


@torch.library.custom_op("normswap::norm_add", mutates_args=())
def norm_add_op(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    kind: str,
    eps: float,
    gain: str | None,
    casting: str,
) -> tuple[Tensor, Tensor]:
    """s = residual + N(x), and the statistics."""
    return launch_norm_add(x, residual, weight, bias, Norm(out_dtype, kind, eps, gain, casting))


@norm_add_op.register_fake
def _(x, residual, weight, bias, *how):
    norm = Norm(*how)
    return x.new_empty(x.shape, dtype=torch.promote_types(residual.dtype, norm.out_dtype)), new_stats(x, norm)


@torch.library.custom_op("normswap::norm_add_norm", mutates_args=())
def norm_add_norm_op(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    weight2: Tensor | None,
    bias2: Tensor | None,
    out_dtype: torch.dtype,
    kind: str,
    eps: float,
    gain: str | None,
    casting: str,
    out_dtype2: torch.dtype,
    kind2: str,
    eps2: float,
    gain2: str | None,
    casting2: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y = N2(s) and s = residual + N(x), and the statistics of both."""
    norm, norm2 = Norm(out_dtype, kind, eps, gain, casting), Norm(out_dtype2, kind2, eps2, gain2, casting2)
    return launch_norm_add_norm(x, residual, weight, bias, weight2, bias2, norm, norm2)


@norm_add_norm_op.register_fake
def _(x, residual, weight, bias, weight2, bias2, *how):
    norm, norm2 = Norm(*how[:5]), Norm(*how[5:])
    s = x.new_empty(x.shape, dtype=torch.promote_types(residual.dtype, norm.out_dtype))
    return x.new_empty(x.shape, dtype=norm2.out_dtype), s, new_stats(x, norm), new_stats(s, norm2)


@torch.library.custom_op("normswap::norm_backward", mutates_args=())
def norm_backward_op(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    ds: Tensor | None,
    out_dtype: torch.dtype,
    kind: str,
    eps: float,
    gain: str | None,
    casting: str,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of what the norm read, with `ds` added, and of its gain and bias."""
    norm = Norm(out_dtype, kind, eps, gain, casting)
    dx, dw, db = launch_backward(dy, x, stats, weight, bias, ds, norm, need_weight, need_bias)
    return dx, _some(dw, x), _some(db, x)


@norm_backward_op.register_fake
def _(dy, x, stats, weight, bias, ds, *how):
    need_weight, need_bias = how[-2:]
    return x.new_empty(x.shape), _like(weight, need_weight, x), _like(bias, need_bias, x)


@torch.library.custom_op("normswap::norm_add_norm_backward", mutates_args=())
def norm_add_norm_backward_op(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    stats: Tensor,
    stats2: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    weight2: Tensor | None,
    bias2: Tensor | None,
    ds: Tensor | None,
    out_dtype: torch.dtype,
    kind: str,
    eps: float,
    gain: str | None,
    casting: str,
    out_dtype2: torch.dtype,
    kind2: str,
    eps2: float,
    gain2: str | None,
    casting2: str,
    need_weight: bool,
    need_bias: bool,
    need_weight2: bool,
    need_bias2: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of s, with `ds` added, of x, and of gains and biases."""
    norm, norm2 = Norm(out_dtype, kind, eps, gain, casting), Norm(out_dtype2, kind2, eps2, gain2, casting2)
    needs = need_weight, need_bias, need_weight2, need_bias2
    dr, dx, *found = launch_norm_add_norm_backward(
        dy, x, s, stats, stats2, weight, bias, weight2, bias2, ds, norm, norm2, needs
    )
    return dr, dx, *(_some(one, x) for one in found)


@norm_add_norm_backward_op.register_fake
def _(dy, x, s, stats, stats2, weight, bias, weight2, bias2, ds, *how):
    parameters = zip((weight, bias, weight2, bias2), how[-4:], strict=True)
    return s.new_empty(s.shape), x.new_empty(x.shape), *(_like(p, needed, x) for p, needed in parameters)


def _some(tensor: Tensor | None, x: Tensor) -> Tensor:
    """An operator gives tensors: an empty one for none."""
    return x.new_empty(0) if tensor is None else tensor


def _like(parameter: Tensor | None, needed: bool, x: Tensor) -> Tensor:
    """The gradient of a parameter, without values."""
    return parameter.new_empty(parameter.shape) if needed else x.new_empty(0)


def _refuse(ctx, *_):
    raise KernelError(
        "a gradient of a gradient was asked for, and Triton kernels have the first only; "
        "use backend 'torch' for this model, or restore its own norms"
    )


def _run_backward(*arguments):
    return torch.ops.normswap.norm_backward(*arguments)


def _run_backward_of_both(*arguments):
    return torch.ops.normswap.norm_add_norm_backward(*arguments)


norm_backward_op.register_autograd(_refuse)
norm_add_norm_backward_op.register_autograd(_refuse)
norm_op.register_autograd(gradients.of_norm(_run_backward), setup_context=gradients.keep_norm)
add_norm_op.register_autograd(gradients.of_add_norm(_run_backward), setup_context=gradients.keep_add_norm)
norm_add_op.register_autograd(gradients.of_norm_add(_run_backward), setup_context=gradients.keep_norm_add)
norm_add_norm_op.register_autograd(
    gradients.of_norm_add_norm(_run_backward, _run_backward_of_both), setup_context=gradients.keep_norm_add_norm
)
