"""A kernel measured against the module that it is to stand for, before it does.

What a backend declares is believed of no kernel: outputs and gradients of both are held against the same mathematics in
float64, and in half precision the kernel's elements against the module's, one by one, since another place of rounding
shows there alone: `F.rms_norm` and Llama's norm agree on 74% of bfloat16 elements.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import nn

from normswap.kernels.backend import Kernel
from normswap.kernels.call import Call
from normswap.norms.formula import formula
from normswap.norms.spec import NormSpec

ROWS = 32
AGREE = 0.99
"""The part of half-precision outputs that must be the same bits. Measured: 0.997 and more of kernels that round as the
module does, where float32 sums are taken in another order."""


def sample(module: nn.Module, device: str, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of a norm on `device` with random gains; without hooks, and without the values of the original."""
    made = copy.deepcopy(module).to_empty(device=device).eval()
    made = made if dtype is None else made.to(dtype)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for p in made.parameters():
            p.copy_(1 + 0.3 * torch.randn(p.shape))
            p.requires_grad_(True)
    return made


def plainly(form: str, modules: Sequence[nn.Module]) -> Callable[..., tuple[torch.Tensor, ...]]:
    """What a form is, with the modules themselves; a function of x, and of the residual where the form has one."""
    first, last = modules[0], modules[-1]

    def add_norm(x, residual):
        s = residual + x
        return first(s), s

    def norm_add_norm(x, residual):
        s = residual + first(x)
        return last(s), s

    return {
        "norm": lambda x: (first(x),),
        "add-norm": add_norm,
        "norm-add": lambda x, residual: (residual + first(x),),
        "norm-add-norm": norm_add_norm,
    }[form]


def unfaithful(kernel: Kernel, call: Call, modules: Sequence[nn.Module], specs: Sequence[NormSpec]) -> str | None:
    """Why a kernel is not what the modules compute, with what was measured; None where it is.

    Args:
        modules: of the call, as `sample` gives them; with the second norm of `norm-add-norm`.
        specs: of them.
    """
    with torch.random.fork_rng():
        torch.manual_seed(1)
        sizes = torch.logspace(-2, 2, ROWS)[:, None]
        inputs = [(sizes * (torch.randn(ROWS, call.width) + 0.5)).to(call.device, dtype) for dtype in call.dtypes]
        grads = [torch.randn(ROWS, call.width).to(call.device) for _ in range(2)]
    tensors = [
        getattr(m, name) if name else None for m, s in zip(modules, specs, strict=True) for name in (s.weight, s.bias)
    ]

    def through(function, x, parameters, like=None):
        x = [t.detach().clone().requires_grad_() for t in x]
        y = function(*x)
        y = y if isinstance(y, tuple) else (y,)
        for a, b in zip(y, like or y, strict=True):
            if a.dtype != b.dtype or a.shape != b.shape:
                return f"gives {tuple(a.shape)} {a.dtype}, the module {tuple(b.shape)} {b.dtype}", None
        gs = [g.to(t.dtype) for g, t in zip(grads, y, strict=False)]
        before = [t.detach().clone() for t in (*gs, *x)]
        wanted = [*x, *(p for p in parameters if p is not None)]
        gradients = torch.autograd.grad(y, wanted, gs)
        if not all(map(torch.equal, (*gs, *x), before)):
            return "writes into its input or its incoming gradient", None
        return [t.detach() for t in y], list(gradients)

    expected, expected_gradients = through(plainly(call.form, modules), inputs, tensors)
    try:
        found, gradients = through(lambda *x: kernel(*x, *tensors), inputs, tensors, expected)
    except Exception as error:  # of a compiler, a driver, a package: whatever it is, this kernel does not serve
        return f"fails: {type(error).__name__}: {_first_line(error)}"
    if gradients is None:
        return found
    wide = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    exact, exact_gradients = through(_in_float64(call, specs, wide), [t.double() for t in inputs], wide)
    for which, a, b, c in zip(("y", "s") if len(found) > 1 else "y", found, expected, exact, strict=True):
        agree = float((a == b).float().mean())
        if a.dtype in (torch.bfloat16, torch.float16) and agree < AGREE:
            return f"its {which} has the module's bits in {agree:.1%} of elements: it rounds elsewhere"
        if why := _further(a, b, c, call.dtype):
            return f"its {which} is {why}"
    names = ["x", "residual"][: len(inputs)] + [
        name for i, s in enumerate(specs) for n, name in ((s.weight, f"gain {i}"), (s.bias, f"bias {i}")) if n
    ]
    for name, a, b, c in zip(names, gradients, expected_gradients, exact_gradients, strict=True):
        if why := _further(a, b, c, call.dtype):
            return f"its gradient of {name} is {why}"
    return None


def _in_float64(call: Call, specs: Sequence[NormSpec], tensors: Sequence[torch.Tensor | None]) -> Callable:
    def norm(i: int):
        held = {n: t for n, t in zip((specs[i].weight, specs[i].bias), tensors[2 * i : 2 * i + 2], strict=True) if n}
        return lambda x: formula(x, specs[i], held)

    return plainly(call.form, [norm(i) for i in range(len(specs))])


def _further(found: torch.Tensor, module: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> str | None:
    """Whether the kernel is further from the mathematics than twice the module, and a rounding of each element."""
    size = exact.norm() + 1e-30
    error, own = ((t.double() - exact).norm() / size for t in (found, module))
    allowed = 2 * own + 2 * torch.finfo(dtype).eps
    return f"{float(error):.1e} from the mathematics, the module's {float(own):.1e}" if not error <= allowed else None


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "")[:200]
