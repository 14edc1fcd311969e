"""What a backend is: what it declares that it can do, and how it builds a kernel for a call."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch

from normswap.kernels.call import FORMS, Call, short

Kernel = Callable[..., torch.Tensor | tuple[torch.Tensor, torch.Tensor]]
"""Called as its form is (`call`): `norm(x, weight, bias)`, `add_norm(x, residual, weight, bias)`, `norm_add` likewise,
`norm_add_norm(x, residual, weight, bias, weight2, bias2)`; differentiable, and nothing is written in place."""


@dataclass(frozen=True)
class Abilities:
    """What a backend declares.

    Attributes:
        forms, kinds, gains, castings, dtypes, devices: that it serves (`call.Call`).
        bias: for which kinds.
        mixed: whether gain and bias may have another dtype than the input, and the output; and the residual.
        max_width: of a row.
        capability: the least compute capability of a GPU.
        compile: what `torch.compile` makes of it, in words.
        distributed: what it does with DTensor, in words.
        dtensor: whether it takes them as they are.
    """

    devices: tuple[str, ...]
    compile: str
    distributed: str
    forms: tuple[str, ...] = FORMS
    kinds: tuple[str, ...] = ("rmsnorm", "layernorm")
    gains: tuple[str | None, ...] = (None, "w", "1 + w")
    castings: tuple[str, ...] = ("float32", "float32-before-gain")
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    bias: tuple[str, ...] = ("rmsnorm", "layernorm")
    mixed: bool = True
    max_width: int = 65536
    capability: tuple[int, int] = (0, 0)
    dtensor: bool = False

    def rejects(self, call: Call) -> str | None:
        """The first thing that is asked and not declared."""
        if call.device not in self.devices:
            return f"runs on {' and '.join(self.devices)}, not on {call.device}"
        for dtype in call.dtypes:
            if dtype not in self.dtypes:
                return f"takes {', '.join(map(short, self.dtypes))}, not {short(dtype)}"
        if call.form not in self.forms:
            return f"has no {call.form}"
        if call.width > self.max_width:
            return f"takes rows up to {self.max_width}, not {call.width}"
        for norm in call.norms:
            if norm.kind not in self.kinds:
                return f"has no {norm.kind}"
            if norm.gain not in self.gains:
                return f"has no {'norm without gain' if norm.gain is None else f'gain {norm.gain}'}"
            if norm.bias and norm.kind not in self.bias:
                return f"has no {norm.kind} with a bias"
            if norm.casting not in self.castings:
                return f"does not round as the site does (casting {norm.casting})"
            if not self.mixed and not {norm.weight_dtype, norm.out_dtype, call.residual} <= {None, call.dtype}:
                return "takes gains, residuals and outputs in the input's dtype alone"
        if call.device == "cuda" and torch.cuda.get_device_capability() < self.capability:
            found, least = torch.cuda.get_device_capability(), self.capability
            return f"takes compute capability {least[0]}.{least[1]}, this GPU has {found[0]}.{found[1]}"
        return None


class Backend(ABC):
    """One provider of kernels. A file in `backends` that has a `BACKEND` is found there.

    Attributes:
        name: as users give it.
        about: in a sentence.
        abilities: what it declares.
        package: the distribution that it needs beside torch, if any.
        module: that it is imported as.
    """

    name: str
    about: str
    abilities: Abilities
    package: str | None = None
    module: str | None = None

    def missing(self) -> str | None:
        """Why it cannot be used on this machine at all, and what to do; None where it can."""
        if self.module is not None and importlib.util.find_spec(self.module) is None:
            return f"{self.package} is not installed (pip install {self.package})"
        return None

    def rejects(self, call: Call) -> str | None:
        """Why it does not serve a call; None where it says it does."""
        return self.missing() or self.abilities.rejects(call)

    def version(self) -> str:
        """Of what it is made of: timings are kept by it."""
        return importlib.metadata.version(self.package or "torch")

    @abstractmethod
    def build(self, call: Call) -> Kernel:
        """A kernel for a call that it does not reject."""
