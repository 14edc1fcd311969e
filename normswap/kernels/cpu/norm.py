"""RMSNorm and LayerNorm on the CPU by `norm.c`: in eager mode, under autograd, and as an operator that compilers see."""

from __future__ import annotations

from functools import cache

import torch

from normswap.errors import KernelError
from normswap.kernels.cpu.library import DTYPES, Variant, load, threads_of_torch
from normswap.norms.formula import formula
from normswap.norms.spec import Casting, GainForm, NormSpec

_GRAIN = 32768  # values that are worth a thread, as torch has it
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def norm(
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

    Args:
        x: (..., width), float32, bfloat16 or float16.
        weight, bias: (width,), each in any of these dtypes; `weight` is None where `gain` is.
        kind: `rmsnorm` (m = 0) or `layernorm` (m = mean(x)).
        casting: see `NormSpec`; `input` for float32 only.
        out_dtype: of the output.

    Raises:
        KernelError: a kernel cannot do this (`rejects`), or none can be compiled (`available`).
    """
    if torch.compiler.is_compiling() or type(x) not in _PLAIN or not x.is_cpu:
        return _operator(x, weight, bias, kind, eps, gain, casting, out_dtype)[0]
    kernel = _kernel(kind, eps, gain, casting, x.dtype, _dtype(weight), _dtype(bias), out_dtype)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _Differentiable.apply(x, weight, bias, kernel)
    return kernel.forward(x, weight, bias, False)[0]


def rejects(variant: Variant) -> str | None:
    """Why there is no kernel for a variant, None where there is one."""
    if variant.kind not in ("rmsnorm", "layernorm"):
        return f"has no {variant.kind}"
    for dtype in (variant.x, variant.y, variant.weight, variant.bias):
        if dtype is not None and dtype not in DTYPES:
            return f"takes float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if (variant.gain is None) != (variant.weight is None):
        return f"gain {variant.gain} {'without' if variant.weight is None else 'with'} a weight"
    if variant.casting == "input" and variant.x != torch.float32:
        return "does not round after every operation (casting input on half precision)"
    return None


class _Kernel:
    """One variant with its eps."""

    def __init__(self, variant: Variant, eps: float):
        why = rejects(variant)
        if why is not None:
            raise KernelError(f"normswap's CPU kernel {why}: keep the module, or use another backend")
        library = load(variant)
        self.variant, self.eps = variant, eps
        self._forward, self._backward = library.forward, library.backward
        self._statistics = 2 if variant.kind == "layernorm" else 1

    def forward(
        self, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, keep: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The output, and if they are to be kept each row's `1 / sqrt(...)` and (of a layernorm) mean, (1 or 2, rows)."""
        x = x.contiguous()
        width = x.shape[-1]
        rows = x.numel() // width if width else 0
        weight, bias = _fitting(weight, width), _fitting(bias, width)
        y = torch.empty_like(x, dtype=self.variant.y)
        kept = torch.empty(self._statistics, rows, dtype=torch.float32) if keep else None
        if rows:
            scale, mean = self._pointers(kept, rows)
            chunks, parallel = _threads(rows, width)
            self._forward(
                x.data_ptr(), _pointer(weight), _pointer(bias), y.data_ptr(), scale, mean, rows, width, self.eps,
                chunks, parallel,
            )  # fmt: skip
        return y, kept

    def backward(
        self, dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, kept: torch.Tensor, parameters: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """The gradients of x, and if asked for those of gain and bias."""
        x, dy = x.contiguous(), dy.contiguous()
        width = x.shape[-1]
        rows = x.numel() // width if width else 0
        weight = _fitting(weight, width)
        chunks, parallel = _threads(rows, width)
        dx = torch.empty_like(x)
        sums = torch.zeros(2, chunks, width) if parameters else None
        if rows:
            scale, mean = self._pointers(kept, rows)
            dgain = _pointer(sums)
            dbias = dgain + 4 * chunks * width if parameters else None
            self._backward(
                x.data_ptr(), _pointer(weight), dy.data_ptr(), scale, mean, dx.data_ptr(), dgain, dbias, rows, width,
                chunks, parallel,
            )  # fmt: skip
        if sums is None:
            return dx, None, None
        dgain, dbias = sums.squeeze(1) if chunks == 1 else sums.sum(1)
        held = self.variant
        return (
            dx,
            None if held.weight is None else dgain.to(held.weight),
            None if held.bias is None else dbias.to(held.bias),
        )

    def differentiable(self, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
        """The same in torch and float32, for gradients of gradients."""
        v = self.variant
        spec = NormSpec(
            kind=v.kind, axes=(-1,), width=x.shape[-1], gain=v.gain, eps=self.eps, casting="float32",
            weight=None if weight is None else "weight", bias=None if bias is None else "bias",
        )  # fmt: skip
        return formula(x.float(), spec, {"weight": weight, "bias": bias})

    def _pointers(self, kept: torch.Tensor | None, rows: int) -> tuple[int | None, int | None]:
        if kept is None:
            return None, None
        first = kept.data_ptr()
        return first, first + 4 * rows if self._statistics == 2 else None


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, kernel):
        y, kept = kernel.forward(x, weight, bias, True)
        ctx.save_for_backward(x, weight, bias, kept)
        ctx.kernel = kernel
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, kept = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # a gradient that is to be differentiated again
            held = (x, weight, bias)
            of = [t for t, is_needed in zip(held, needed, strict=True) if is_needed]
            found = iter(torch.autograd.grad(ctx.kernel.differentiable(*held), of, dy.float(), create_graph=True))
            return *(next(found) if is_needed else None for is_needed in needed), None
        dx, dgain, dbias = ctx.kernel.backward(dy, x, weight, kept, needed[1] or needed[2])
        return dx, dgain, dbias, None


@torch.library.custom_op("normswap::cpu_norm", mutates_args=(), device_types="cpu")
def _operator(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    kind: str,
    eps: float,
    gain: str | None,
    casting: str,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    kernel = _kernel(kind, eps, gain, casting, x.dtype, _dtype(weight), _dtype(bias), out_dtype)
    return kernel.forward(x, weight, bias, True)


@_operator.register_fake
def _(x, weight, bias, kind, eps, gain, casting, out_dtype):
    rows = x.numel() // x.shape[-1]
    kept = x.new_empty((2 if kind == "layernorm" else 1, rows), dtype=torch.float32)
    return torch.empty(x.shape, dtype=out_dtype, device=x.device), kept


@torch.library.custom_op("normswap::cpu_norm_backward", mutates_args=(), device_types="cpu")
def _operator_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    kept: torch.Tensor,
    kind: str,
    eps: float,
    gain: str | None,
    casting: str,
    parameters: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    kernel = _kernel(kind, eps, gain, casting, x.dtype, _dtype(weight), _dtype(bias), dy.dtype)
    dx, dgain, dbias = kernel.backward(dy, x, weight, kept, parameters)
    # an operator gives tensors: an empty one stands for None
    return dx, x.new_empty(0) if dgain is None else dgain, x.new_empty(0) if dbias is None else dbias


@_operator_backward.register_fake
def _(dy, x, weight, bias, kept, kind, eps, gain, casting, parameters):
    given = [x.new_empty(0) if t is None or not parameters else torch.empty_like(t) for t in (weight, bias)]
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), *given


def _setup(ctx, inputs, output):
    x, weight, bias, *ctx.how, _ = inputs
    ctx.save_for_backward(x, weight, bias, output[1])


def _operator_gradients(ctx, dy, _):
    x, weight, bias, kept = ctx.saved_tensors
    needed = ctx.needs_input_grad
    dx, dgain, dbias = _operator_backward(dy, x, weight, bias, kept, *ctx.how, needed[1] or needed[2])
    return dx, dgain if needed[1] else None, dbias if needed[2] else None, *[None] * 5


_operator.register_autograd(_operator_gradients, setup_context=_setup)


@cache
def _kernel(kind, eps, gain, casting, x, weight, bias, y) -> _Kernel:
    return _Kernel(Variant(kind, gain, casting, x, weight, bias, y), eps)


def _dtype(t: torch.Tensor | None) -> torch.dtype | None:
    return None if t is None else t.dtype


def _pointer(t: torch.Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _fitting(parameter: torch.Tensor | None, width: int) -> torch.Tensor | None:
    """A gain or bias as the kernel reads it; reading past its end would be no error but nonsense."""
    if parameter is None:
        return None
    if parameter.shape != (width,) or not parameter.is_cpu:
        raise KernelError(
            f"normswap's CPU kernel got rows of {width} values with a parameter of shape {tuple(parameter.shape)} "
            f"on {parameter.device}: it takes one of shape ({width},) on the CPU"
        )
    return parameter.contiguous()


def _threads(rows: int, width: int) -> tuple[int, int | None]:
    """In how many chunks the rows are cut, one for a thread, and what runs them."""
    if rows * width <= _GRAIN:
        return 1, None
    parallel = threads_of_torch()
    return (1, None) if parallel is None else (min(torch.get_num_threads(), rows, rows * width // _GRAIN), parallel)
