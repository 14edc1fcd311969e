"""RMSNorm and LayerNorm on the CPU by `norm.c`.

That is for eager mode. A compiler is given plain torch, which it fuses with what is around the norm: a compiled block
with the kernel inside, as an opaque operator, took 1.1 to 3 times as long (width 768 and 4096, float32 and bfloat16).
"""

from __future__ import annotations

from functools import cache

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from normswap.errors import KernelError
from normswap.kernels.cpu.library import DTYPES, Variant, load, pack, threads_of_torch
from normswap.kernels.plain import gradients_of_plain, plain
from normswap.norms.spec import Casting, GainForm

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

    The same in plain torch where a kernel cannot be: in compiled or traced code, for tensors that are not on the CPU.

    Args:
        x: (..., width), float32, bfloat16 or float16.
        weight, bias: (width,), each in any of these dtypes; `weight` is None where `gain` is.
        kind: `rmsnorm` (m = 0) or `layernorm` (m = mean(x)).
        casting: see `NormSpec`; `input` for float32 only.
        out_dtype: of the output.

    Raises:
        KernelError: a kernel cannot do this (`rejects`), or none can be compiled (`available`).
    """
    if torch.compiler.is_compiling() or type(x) not in _PLAIN or not x.is_cpu or _watched():
        return plain(x, weight, bias, kind=kind, eps=eps, gain=gain, casting=casting, out_dtype=out_dtype)
    kernel = _kernel(kind, eps, gain, casting, x.dtype, _dtype(weight), _dtype(bias), out_dtype)
    if torch.is_grad_enabled() and (
        x.requires_grad or (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad)
    ):
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
        return f"has no gain {variant.gain} {'without' if variant.weight is None else 'with'} a weight"
    if variant.casting == "input" and variant.x != torch.float32:
        return "does not round after every operation (casting input on half precision)"
    return None


def _watched() -> bool:
    """Whether somebody notes the operators that run, and would miss a kernel that is not one of torch's."""
    return torch.jit.is_tracing() or is_in_torch_dispatch_mode()


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
        self._same = variant.x == variant.y

    def forward(
        self, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, keep: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The output, and if it is to be kept each row's `1 / sqrt(...)`, after it (of a layernorm) each row's mean."""
        x = x.contiguous()
        width = x.shape[-1]
        rows = x.numel() // width if width else 0
        weight, bias = _fitting(weight, width), _fitting(bias, width)
        y = torch.empty_like(x) if self._same else torch.empty_like(x, dtype=self.variant.y)
        kept = torch.empty(self._statistics * rows) if keep else None
        scale, mean = self._rows(kept, rows)
        chunks, parallel = _threads(rows, width)
        self._forward(
            pack(
                x.data_ptr(), _pointer(weight), _pointer(bias), 0, y.data_ptr(), 0, scale, mean, 0, 0,
                rows, width, chunks, parallel, self.eps,
            )
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
        held = self.variant
        dx = torch.empty_like(x)
        # a row of sums for each chunk; the kernel clears them
        shape = (width,) if chunks == 1 else (chunks, width)
        dgain = torch.empty(shape) if parameters and held.weight is not None else None
        dbias = torch.empty(shape) if parameters and held.bias is not None else None
        scale, mean = self._rows(kept, rows)
        self._backward(
            pack(
                x.data_ptr(), _pointer(weight), 0, dy.data_ptr(), 0, dx.data_ptr(), scale, mean, _pointer(dgain),
                _pointer(dbias), rows, width, chunks, parallel, self.eps,
            )
        )  # fmt: skip
        return dx, _summed(dgain, held.weight), _summed(dbias, held.bias)

    def _rows(self, kept: torch.Tensor | None, rows: int) -> tuple[int, int]:
        """Where the `1 / sqrt(...)` and the means of the rows begin."""
        if kept is None:
            return 0, 0
        first = kept.data_ptr()
        return first, first + 4 * rows if self._statistics == 2 else 0


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
            how = {"kind": ctx.kernel.variant.kind, "gain": ctx.kernel.variant.gain, "eps": ctx.kernel.eps}
            return *gradients_of_plain((x, weight, bias), needed, dy, how), None
        dx, dgain, dbias = ctx.kernel.backward(dy, x, weight, kept, needed[1] or needed[2])
        return dx, dgain, dbias, None


@cache
def _kernel(kind, eps, gain, casting, x, weight, bias, y) -> _Kernel:
    return _Kernel(Variant(kind, gain, casting, x, weight, bias, y), eps)


def _dtype(t: torch.Tensor | None) -> torch.dtype | None:
    return None if t is None else t.dtype


def _pointer(t: torch.Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _summed(sums: torch.Tensor | None, dtype: torch.dtype | None) -> torch.Tensor | None:
    """The gradient of a parameter of `dtype`, from its sums, (width,) or in chunks, (chunks, width)."""
    if sums is None:
        return None
    gradient = sums if sums.ndim == 1 else sums.sum(0)
    return gradient if dtype == torch.float32 else gradient.to(dtype)


def _fitting(parameter: torch.Tensor | None, width: int) -> torch.Tensor | None:
    """A gain or bias as the kernel reads it; reading past its end would be no error but nonsense."""
    if parameter is None:
        return None
    if parameter.shape != (width,) or not parameter.is_cpu or type(parameter) not in _PLAIN:
        raise KernelError(
            f"normswap's CPU kernel got rows of {width} values with a {type(parameter).__name__} of shape "
            f"{tuple(parameter.shape)} on {parameter.device}: it takes a plain tensor of shape ({width},) on the CPU"
        )
    return parameter.contiguous()


def _threads(rows: int, width: int) -> tuple[int, int]:
    """In how many chunks the rows are cut, one for a thread, and what runs them."""
    if rows * width <= _GRAIN:
        return 1, 0
    parallel = threads_of_torch()
    return (1, 0) if parallel is None else (min(torch.get_num_threads(), rows, rows * width // _GRAIN), parallel)
