"""A norm of a model whose forward is a kernel. Its class is a subclass of its own; parameters and names stay."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from normswap.kernels.backend import Kernel
from normswap.kernels.backends import BACKENDS
from normswap.kernels.call import Call, Form


@dataclass(frozen=True)
class Served:
    """A call, and the backend that serves it."""

    call: Call
    backend: str


class Table:
    """The kernels of one site, by `key_of`.

    Copies share it; pickled, it keeps the names of the backends and builds the kernels anew.
    """

    def __init__(self, site: str, weight: str | None, bias: str | None):
        self.site, self.weight, self.bias = site, weight, bias
        self.served: dict[tuple, Served] = {}
        self.kernels: dict[tuple, Kernel] = {}
        self.whole: dict[tuple, bool] = {}
        self.devices: set[str] = set()

    def add(self, key: tuple, served: Served, kernel: Kernel | None = None) -> None:
        backend = BACKENDS[served.backend]
        self.served[key] = served
        self.devices.add(served.call.device)
        self.kernels[key] = kernel or backend.build(served.call)
        self.whole[key] = backend.abilities.dtensor

    def __deepcopy__(self, memo: dict) -> Table:
        return self

    def __reduce__(self):
        return _rebuilt_table, (self.site, self.weight, self.bias, self.served)


def key_of(call: Call, autocast: torch.dtype | None, second: str = "") -> tuple:
    """What a kernel is found by: form, dtypes of input and residual, device, autocast, and path of the second norm."""
    return call.form, call.dtype, call.residual, call.device, autocast, second


class FusedNorm:
    """Mixin in front of the class of a norm. Where there is no kernel for what it is called with, it is the norm."""

    kernels: Table

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        x = args[0] if len(args) == 1 and not kwargs else None
        run = None if x is None else self._kernel("norm", x)
        return super().forward(*args, **kwargs) if run is None else run(x, *self._tensors())

    def add_norm(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(norm(s), s)` with `s = residual + x`."""
        run = self._kernel("add-norm", x, residual)
        if run is None:
            s = residual + x
            return self(s), s
        return run(x, residual, *self._tensors())

    def norm_add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """`residual + norm(x)`."""
        run = self._kernel("norm-add", x, residual)
        return residual + self(x) if run is None else run(x, residual, *self._tensors())

    def norm_add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, second: nn.Module
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`(second(s), s)` with `s = residual + norm(x)`."""
        known = isinstance(second, FusedNorm) and second._plainly_called()
        run = self._kernel("norm-add-norm", x, residual, second.kernels.site) if known else None
        if run is None:
            s = residual + self(x)
            return second(s), s
        return run(x, residual, *self._tensors(), *second._tensors())

    def _kernel(self, form: Form, x: torch.Tensor, residual: torch.Tensor | None = None, second: str = ""):
        if residual is not None:
            if residual.shape != x.shape or not self._plainly_called():
                return None
        device = x.device.type
        if device not in self.kernels.devices:  # the meta device, say, which knows of no autocast
            return None
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        key = form, x.dtype, None if residual is None else residual.dtype, device, autocast, second
        kernel = self.kernels.kernels.get(key)
        if kernel is None or (not self.kernels.whole[key] and not self._plain_tensors(x, residual)):
            return None
        return kernel

    def _plainly_called(self) -> bool:
        """Whether calling the module is calling its forward: no hooks that another path would leave out."""
        return not (self._forward_hooks or self._forward_pre_hooks or self._backward_hooks or self._backward_pre_hooks)

    def _plain_tensors(self, x: torch.Tensor, residual: torch.Tensor | None) -> bool:
        # a DTensor, or another class that gives torch functions a meaning of its own
        held = [t for t in (x, residual, *self._tensors()) if t is not None]
        return all(type(t) in (torch.Tensor, nn.Parameter) for t in held)

    def _tensors(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        weight, bias = self.kernels.weight, self.kernels.bias
        return (getattr(self, weight) if weight else None), (getattr(self, bias) if bias else None)

    def __reduce_ex__(self, protocol: int):
        return _rebuilt_norm, (plain_class_of(self),), self.__dict__


@cache
def fused_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The fused form of a norm's class; its name ends as the class's does, which initialisers look at."""
    return type(f"Fused{cls.__name__}", (FusedNorm, cls), {"__module__": cls.__module__, "plain_class": cls})


def plain_class_of(module: FusedNorm) -> type[nn.Module] | None:
    """The class of a fused norm before it was; None where its class has been changed again since."""
    return vars(type(module)).get("plain_class")


def _rebuilt_norm(cls: type[nn.Module]) -> nn.Module:
    made = fused_class(cls)
    return made.__new__(made)


def _rebuilt_table(site: str, weight: str | None, bias: str | None, served: dict[tuple, Served]) -> Table:
    table = Table(site, weight, bias)
    for key, entry in served.items():
        table.add(key, entry)
    return table
