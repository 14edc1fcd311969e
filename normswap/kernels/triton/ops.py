"""LayerNorm and RMSNorm over the last axis, alone and with the residual add around them, as differentiable functions.

With N a norm, all tensors `(..., width)`, gains and biases `(width,)`:

    norm            y = N(x)
    add_norm        s = residual + x;     y = N(s)      gives (y, s)
    norm_add        s = residual + N(x)                 gives s
    norm_add_norm   s = residual + N(x);  y = N2(s)     gives (y, s)

`kind`, `eps`, `gain` and `casting` are those of `NormSpec`, and the result is rounded wherever the eager module rounds.
`out_dtype` is the norm's, None for that of its input; a sum has the dtype that torch promotes its addends to. float64
goes with float64 alone. No input and no gradient is written to. Gradients of gradients are refused with KernelError.

Plain tensors outside of a compiler go to the kernels directly, all else through the operators of `library`.
"""

from __future__ import annotations

import torch

from normswap.kernels.triton import library as library  # registers the operators
from normswap.kernels.triton.eager import AddNormFunction, NormAddFunction, NormAddNormFunction, NormFunction

if torch.distributed.is_available():
    from normswap.kernels.triton import sharding as sharding  # registers how DTensors go through them

_PLAIN = {torch.Tensor, torch.nn.Parameter}


def norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    kind: str,
    eps: float,
    gain: str | None = "w",
    casting: str = "float32",
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """N(x)."""
    arguments = (x, weight, bias, *_how(out_dtype or x.dtype, kind, eps, gain, casting, weight))
    if _directly(x, weight, bias):
        return NormFunction.apply(*arguments)[0]
    return torch.ops.normswap.norm(*arguments)[0]


def add_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    kind: str,
    eps: float,
    gain: str | None = "w",
    casting: str = "float32",
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(N(s), s) with s = residual + x."""
    out_dtype = out_dtype or torch.promote_types(residual.dtype, x.dtype)
    arguments = (x, residual, weight, bias, *_how(out_dtype, kind, eps, gain, casting, weight))
    if _directly(x, residual, weight, bias):
        return AddNormFunction.apply(*arguments)[:2]
    return torch.ops.normswap.add_norm(*arguments)[:2]


def norm_add(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    kind: str,
    eps: float,
    gain: str | None = "w",
    casting: str = "float32",
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """residual + N(x)."""
    arguments = (x, residual, weight, bias, *_how(out_dtype or x.dtype, kind, eps, gain, casting, weight))
    if _directly(x, residual, weight, bias):
        return NormAddFunction.apply(*arguments)[0]
    return torch.ops.normswap.norm_add(*arguments)[0]


def norm_add_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    weight2: torch.Tensor | None = None,
    bias2: torch.Tensor | None = None,
    *,
    kind: str,
    eps: float,
    gain: str | None = "w",
    casting: str = "float32",
    out_dtype: torch.dtype | None = None,
    kind2: str,
    eps2: float,
    gain2: str | None = "w",
    casting2: str = "float32",
    out_dtype2: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(N2(s), s) with s = residual + N(x); what ends in 2 is N2's."""
    first = _how(out_dtype or x.dtype, kind, eps, gain, casting, weight)
    out_dtype2 = out_dtype2 or torch.promote_types(residual.dtype, first[0])
    second = _how(out_dtype2, kind2, eps2, gain2, casting2, weight2)
    arguments = (x, residual, weight, bias, weight2, bias2, *first, *second)
    if _directly(x, residual, weight, bias, weight2, bias2):
        return NormAddNormFunction.apply(*arguments)[:2]
    return torch.ops.normswap.norm_add_norm(*arguments)[:2]


def _how(out_dtype, kind, eps, gain, casting, weight) -> tuple:
    """The arguments of an operator that follow the tensors; without a weight there is no gain."""
    return out_dtype, kind, float(eps), None if weight is None else gain, casting


def _directly(*tensors: torch.Tensor | None) -> bool:
    """Whether nothing but autograd watches: no compiler, no tensor of a subclass, no dispatch mode."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    for tensor in tensors:
        if tensor is not None and type(tensor) not in _PLAIN:
            return False
    return True
