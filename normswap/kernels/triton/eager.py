"""The kernels under autograd without a round trip through the dispatcher, which costs more than a small norm."""

from __future__ import annotations

import torch

from normswap.kernels.triton import gradients
from normswap.kernels.triton.launch import (
    Norm,
    launch_add_norm,
    launch_norm,
    launch_norm_add,
    launch_norm_add_norm,
)
from normswap.kernels.triton.launch_backward import launch_backward, launch_norm_add_norm_backward


def _run_backward(dy, x, stats, weight, bias, ds, *how):
    *norm, need_weight, need_bias = how
    if torch.is_grad_enabled():  # a graph of the backward is made: the operator refuses to be differentiated
        return torch.ops.normswap.norm_backward(dy, x, stats, weight, bias, ds, *how)
    return launch_backward(dy, x, stats, weight, bias, ds, Norm(*norm), need_weight, need_bias)


def _run_backward_of_both(*arguments):
    if torch.is_grad_enabled():
        return torch.ops.normswap.norm_add_norm_backward(*arguments)
    tensors, how, needs = arguments[:10], arguments[10:20], arguments[20:]
    return launch_norm_add_norm_backward(*tensors, Norm(*how[:5]), Norm(*how[5:]), needs)


class NormFunction(torch.autograd.Function):
    """`norm`; arguments and results are the operator's."""

    backward = staticmethod(gradients.of_norm(_run_backward))

    @staticmethod
    def forward(ctx, x, weight, bias, *how):
        y, stats = launch_norm(x, weight, bias, Norm(*how))
        gradients.keep_norm(ctx, (x, weight, bias, *how), (y, stats))
        ctx.mark_non_differentiable(stats)
        return y, stats


class AddNormFunction(torch.autograd.Function):
    """`add_norm`."""

    backward = staticmethod(gradients.of_add_norm(_run_backward))

    @staticmethod
    def forward(ctx, x, residual, weight, bias, *how):
        y, s, stats = launch_add_norm(x, residual, weight, bias, Norm(*how))
        gradients.keep_add_norm(ctx, (x, residual, weight, bias, *how), (y, s, stats))
        ctx.mark_non_differentiable(stats)
        return y, s, stats


class NormAddFunction(torch.autograd.Function):
    """`norm_add`."""

    backward = staticmethod(gradients.of_norm_add(_run_backward))

    @staticmethod
    def forward(ctx, x, residual, weight, bias, *how):
        s, stats = launch_norm_add(x, residual, weight, bias, Norm(*how))
        gradients.keep_norm_add(ctx, (x, residual, weight, bias, *how), (s, stats))
        ctx.mark_non_differentiable(stats)
        return s, stats


class NormAddNormFunction(torch.autograd.Function):
    """`norm_add_norm`."""

    backward = staticmethod(gradients.of_norm_add_norm(_run_backward, _run_backward_of_both))

    @staticmethod
    def forward(ctx, x, residual, weight, bias, weight2, bias2, *how):
        outputs = launch_norm_add_norm(x, residual, weight, bias, weight2, bias2, Norm(*how[:5]), Norm(*how[5:]))
        gradients.keep_norm_add_norm(ctx, (x, residual, weight, bias, weight2, bias2, *how), outputs)
        ctx.mark_non_differentiable(*outputs[2:])
        return outputs
