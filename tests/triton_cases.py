"""Norms as Triton kernels are asked for them, and what they must give: the modules' own mathematics in float64."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from triton.runtime import interpreter

from normswap.kernels.triton import ops
from normswap.norms.formula import formula
from normswap.norms.spec import NormSpec

#: what one rounding to the nearest costs at most, relative
ROUNDING = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-24, torch.float64: 2**-53}


def quick_interpreter() -> None:
    """Interpreted helpers without what the interpreter does again at each call of one: 3 ms each, once is enough."""
    done = set()

    def call(self, *args, **kwargs):
        if self.fn.__module__.startswith("triton.") and self.fn not in done:
            interpreter._patch_lang(self.fn)
            done.add(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


def inputs(form: str, shape: tuple, dtype, device: str, weight_dtype=None, bias: bool = True, seed: int = 0) -> dict:
    """Tensors of a form by argument name, rows with a mean and of different scales."""
    g = torch.Generator().manual_seed(seed)

    def made(*size, scale=1.0, shift=0.0, of=dtype):
        value = torch.randn(size, generator=g, dtype=torch.float64) * scale + shift
        return value.to(of).to(device).requires_grad_()

    spread = torch.randn((*shape[:-1], 1), generator=g, dtype=torch.float64).exp()
    tensors = {"x": made(*shape, scale=spread, shift=0.5 * spread)}
    if form != "norm":
        tensors["residual"] = made(*shape)
    for suffix in ("", "2") if form == "norm-add-norm" else ("",):
        tensors[f"weight{suffix}"] = made(shape[-1], scale=0.3, shift=0.6, of=weight_dtype or dtype)
        if bias:
            tensors[f"bias{suffix}"] = made(shape[-1], of=weight_dtype or dtype)
    return tensors


def options(form: str, **norm) -> dict:
    """Keyword arguments of a form; the second norm of `norm-add-norm` is of the other kind and gain."""
    if form != "norm-add-norm":
        return norm
    other = {
        "kind": {"rmsnorm": "layernorm", "layernorm": "rmsnorm"}[norm["kind"]],
        "gain": {"w": "1 + w", "1 + w": "w"}[norm["gain"]],
    }
    return norm | {f"{name}2": value for name, value in (norm | other).items()}


def ran(form: str, tensors: dict, told: dict) -> tuple[torch.Tensor, ...]:
    """What the kernels give, as a tuple."""
    results = getattr(ops, form.replace("-", "_"))(**tensors, **told)
    return results if isinstance(results, tuple) else (results,)


def reference(form: str, tensors: dict, told: dict) -> tuple[torch.Tensor, ...]:
    """What eager modules give on the same tensors."""
    x, residual = tensors["x"], tensors.get("residual")
    if form == "norm":
        return (_norm(x, tensors, told, ""),)
    s = residual + (x if form == "add-norm" else _norm(x, tensors, told, ""))
    if form == "norm-add":
        return (s,)
    return _norm(s, tensors, told, "" if form == "add-norm" else "2"), s


@contextmanager
def rounded_once():
    """Means and inverse roots of tensors as a GPU gives them: a CPU rounds the sum and the root on the way as well."""
    mean, rsqrt = torch.Tensor.mean, torch.rsqrt
    torch.Tensor.mean = lambda x, *args, **kwargs: mean(x.double(), *args, **kwargs).to(x.dtype)
    torch.rsqrt = lambda x: rsqrt(x.double()).to(x.dtype)
    try:
        yield
    finally:
        torch.Tensor.mean, torch.rsqrt = mean, rsqrt


def widened(tensors: dict) -> dict:
    """The same in float64, to be differentiated."""
    return {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}


def gradients(results: tuple, tensors: dict, seed: int = 1) -> tuple:
    """Of all tensors, for random gradients of the results, which must be as before afterwards."""
    g = torch.Generator().manual_seed(seed)
    arriving = [torch.randn(r.shape, generator=g, dtype=torch.float64).to(results[0].dtype).to(r) for r in results]
    before = [one.clone() for one in arriving]
    found = torch.autograd.grad(results, list(tensors.values()), arriving)
    assert all(torch.equal(one, kept) for one, kept in zip(arriving, before, strict=True))
    return found


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative, in the l2 norm."""
    assert found.shape == wanted.shape and found.numel() > 0
    return float(((found.double() - wanted).norm() / wanted.norm()).detach())


def _norm(x, tensors: dict, told: dict, suffix: str) -> torch.Tensor:
    spec = NormSpec(
        kind=told[f"kind{suffix}"],
        axes=(-1,),
        width=x.shape[-1],
        gain=told[f"gain{suffix}"],
        weight=f"weight{suffix}" if f"weight{suffix}" in tensors else None,
        bias=f"bias{suffix}" if f"bias{suffix}" in tensors else None,
        eps=told[f"eps{suffix}"],
        casting=told[f"casting{suffix}"],
    )
    return formula(x, spec, tensors)
