"""Kernels under a live model, and away again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from normswap.errors import KernelError
from normswap.kernels.backends import BACKENDS
from normswap.kernels.call import Call, norm_of, short, unserved
from normswap.kernels.choice import Choice, Chooser
from normswap.kernels.faithful import sample
from normswap.kernels.fused import FusedNorm, Served, Table, fused_class, key_of, plain_class_of
from normswap.norms.spec import NormSpec
from normswap.understand.normmap import find_sites


@dataclass(frozen=True)
class Runtime:
    """What a norm may be called with.

    Attributes:
        dtype: of its input.
        autocast: dtype of the autocast that it runs under; None: under none.
    """

    dtype: torch.dtype
    autocast: torch.dtype | None = None

    def entered(self, device: str) -> torch.autocast:
        return torch.autocast(device, self.autocast, enabled=self.autocast is not None)


@dataclass
class SiteKernels:
    """What became of one site.

    Attributes:
        path: of the norm in the model.
        choices: by what it may be called with; the model's own dtype first.
        kept: why it keeps its module whatever it is called with; None where `choices` says.
    """

    path: str
    choices: dict[Runtime, Choice] = field(default_factory=dict)
    kept: str | None = None

    @property
    def first(self) -> Choice | None:
        """The choice for the model's own dtype."""
        return next(iter(self.choices.values()), None)

    @property
    def backend(self) -> str | None:
        """That serves the model's own dtype, None: its module."""
        return self.first.backend if self.first else None

    @property
    def why(self) -> str:
        return self.kept or self.first.why


@dataclass
class Kernels:
    """What `use_kernels` did.

    Attributes:
        sites: every norm of the model, in execution order.
        device, dtype: that the model computes on and in.
    """

    sites: list[SiteKernels]
    device: str
    dtype: torch.dtype

    @property
    def served(self) -> list[str]:
        """Paths of the norms that kernels compute now."""
        return [site.path for site in self.sites if site.backend is not None]

    def summary(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "device": self.device,
            "dtype": str(self.dtype).removeprefix("torch."),
            "sites": [
                {
                    "path": site.path,
                    "backend": site.backend,
                    "why": site.why,
                    "calls": [
                        {
                            "call": c.call.words(),
                            "backend": c.backend,
                            "why": c.why,
                            "rejected": c.rejected,
                            "us": c.times,
                        }
                        for c in site.choices.values()
                    ],
                }
                for site in self.sites
            ],
        }


def use_kernels(
    model: nn.Module,
    backend: str | Sequence[str] = "auto",
    *,
    autocast: torch.dtype | None = None,
    inputs: Mapping[str, Any] | None = None,
    tell: Callable[[str], None] = lambda what: None,
) -> Kernels:
    """Let fused kernels compute the norms of a live model, in place; weights, names and the function stay.

    Each kernel is measured against the norm it is to stand for, outputs and gradients, before it does: one that rounds
    elsewhere, or writes into a gradient, is not taken. `restore_kernels` undoes it. Call it when the model is on its
    device and in its dtype, before `DistributedDataParallel`, `fully_shard` and `torch.compile`.

    Args:
        model: of transformers, or any with `inputs`; LayerNorms and RMSNorms, converted or not.
        backend: `auto`, the fastest on this machine for each norm, its own module where that is; the name of one
            (`normswap kernels` lists them), or several in order of preference.
        autocast: the dtype that the model will compute in under `torch.autocast`, where it has float32 weights. By
            default both half precisions are prepared on a GPU, and none on a CPU, where some backends take seconds to
            compile for each. Under what is not prepared, norms compute as they did.
        inputs: keyword arguments of `forward` for one small batch; by default made from what the model says it takes.
        tell: called with what is being measured; compiling takes seconds.

    Returns:
        What serves each norm, why, and what rejected the others.

    Raises:
        KernelError: no such backend, it is not installed, or weights have no values here (meta device, offloaded).
        ObserveError: the model could not be run once.
    """
    asked = check_backends(backend)
    restore_kernels(model)
    sites = find_sites(model, inputs)
    modules = dict(model.named_modules())
    device, dtype = _where(model)
    chooser = Chooser(asked, tell)
    runtimes = runtimes_of(device, dtype, autocast)
    found = [examined(modules[path], path, spec, device, runtimes, chooser) for path, spec in sites]
    for site, (path, spec) in zip(found, sites, strict=True):
        _swap(modules[path], site, spec, device)
    return Kernels(found, device, dtype)


def restore_kernels(model: nn.Module) -> list[str]:
    """Give every norm of a model its own class back. Returns the paths of those that had a kernel.

    Raises:
        KernelError: something else has changed the class of a norm since (`fully_shard`): undo that first.
    """
    fused = [(path, module) for path, module in model.named_modules() if isinstance(module, FusedNorm)]
    for path, module in fused:
        if type(module) is not fused_class(plain_class_of(module)):
            raise KernelError(
                f"{path} has become a {type(module).__name__} since use_kernels: expected the class that it gave. "
                f"Restore kernels before what wraps norms one by one (fully_shard), or leave norms out of that."
            )
    for _, module in fused:
        module.__class__ = plain_class_of(module)
        del module.kernels
    return [path for path, _ in fused]


def check_backends(backend: str | Sequence[str]) -> tuple[str, ...] | None:
    """The names asked for, None for `auto`. Raises KernelError for one that is unknown or cannot be used here."""
    if backend == "auto":
        return None
    asked = (backend,) if isinstance(backend, str) else tuple(backend)
    for name in asked:
        if name not in BACKENDS:
            raise KernelError(f"there is no backend '{name}': expected auto, or of {', '.join(BACKENDS)}.")
        if why := BACKENDS[name].missing():
            raise KernelError(f"backend {name}: {why}.")
    return asked


def examined(
    module: nn.Module,
    path: str,
    spec: NormSpec,
    device: str,
    runtimes: Sequence[Runtime],
    chooser: Chooser,
    cast: torch.dtype | None = None,
) -> SiteKernels:
    """Which backend serves one norm.

    Args:
        runtimes: what it may be called with.
        cast: examine the norm as if its weights had this dtype; None: as they are.
    """
    site = SiteKernels(path, kept=_kept(module, spec))
    if site.kept is not None:
        return site
    made = sample(module, device, cast)
    weights = [p.dtype for p in made.parameters()]
    for runtime in runtimes:
        with runtime.entered(device):
            try:
                with torch.no_grad():
                    out = made(torch.ones(2, spec.width, device=device, dtype=runtime.dtype))
            except RuntimeError:
                continue  # not even the module takes this
            norm = norm_of(spec, runtime.dtype, weights[0] if weights else None, out.dtype)
            call = Call("norm", spec.width, runtime.dtype, device, norm)
            site.choices[runtime] = chooser.choose(call, [made], [spec])
    if not site.choices:
        site.kept = f"fails on {short(runtimes[0].dtype)} rows of {spec.width} when it is run alone"
    return site


def runtimes_of(device: str, dtype: torch.dtype, autocast: torch.dtype | None) -> list[Runtime]:
    """What the norms of a model of `dtype` may be called with; see `use_kernels` for `autocast`."""
    found = [Runtime(dtype)]
    if dtype == torch.float32:
        usual = (torch.bfloat16, torch.float16) if device == "cuda" else ()
        for half in usual if autocast is None else (autocast,):
            found += [Runtime(torch.float32, half), Runtime(half, half)]
    return found


def _kept(module: nn.Module, spec: NormSpec) -> str | None:
    if "forward" in vars(module):
        return "its forward was replaced on the module itself (by hooks of accelerate, or another patch)"
    return unserved(spec)


def _where(model: nn.Module) -> tuple[str, torch.dtype]:
    """Device type and dtype of a model."""
    floats = [p for p in model.parameters() if p.is_floating_point()]
    absent = next((n for n, p in model.named_parameters() if p.is_meta), None)
    if not floats or absent is not None:
        what = "it has no parameters" if absent is None else f"{absent} has no values here (meta device, or offloaded)"
        raise KernelError(f"kernels go under a model as it computes, and {what}: load it whole, on its device.")
    return floats[0].device.type, model.dtype if hasattr(model, "dtype") else floats[0].dtype


def _swap(module: nn.Module, site: SiteKernels, spec: NormSpec, device: str) -> None:
    table = Table(site.path, spec.weight, spec.bias)
    for runtime, choice in site.choices.items():
        if choice.backend is not None:
            key = key_of("norm", runtime.dtype, device, runtime.autocast)
            table.add(key, Served(choice.call, choice.backend), choice.kernel)
    if table.served:
        module.__class__ = fused_class(type(module))
        module.kernels = table
