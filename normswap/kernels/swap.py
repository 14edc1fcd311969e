"""Kernels under a live model, and away again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from normswap.errors import KernelError
from normswap.kernels.backends import BACKENDS
from normswap.kernels.choice import Choice, Chooser
from normswap.kernels.fused import FusedNorm, Served, Table, fused_class, key_of, plain_class_of
from normswap.kernels.fusing import Fusing, fuse, unfuse
from normswap.kernels.sites import Runtime, SiteKernels, examined, runtimes_of
from normswap.kernels.sums import choose_sums
from normswap.understand.normmap import find_sites, inspect


@dataclass
class Kernels:
    """What `use_kernels` did.

    Attributes:
        sites: every norm of the model, in execution order.
        device, dtype: that the model computes on and in.
        fusing: what became of residual sums, None where that was not asked for.
        forms: what serves those that norms make.
    """

    sites: list[SiteKernels]
    device: str
    dtype: torch.dtype
    fusing: Fusing | None = None
    forms: list[Choice] = field(default_factory=list)

    @property
    def served(self) -> list[str]:
        """Paths of the norms that kernels compute now."""
        return [site.path for site in self.sites if site.backend is not None]

    def chosen(self) -> dict[str, str | None]:
        """The backend of each call, in words; None: the module."""
        found = [*(choice for site in self.sites for choice in site.choices.values()), *self.forms]
        return {choice.call.words(): choice.backend for choice in found}

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
            "sums": [
                {"module": pair.module, "form": pair.form, "norms": pair.norms, "why": pair.reason}
                for pair in (self.fusing.pairs if self.fusing else ())
            ],
        }


def use_kernels(
    model: nn.Module,
    backend: str | Sequence[str] = "auto",
    *,
    fuse_residual: bool = False,
    device: str | None = None,
    autocast: torch.dtype | None = None,
    inputs: Mapping[str, Any] | None = None,
    chosen: Mapping[str, str | None] | None = None,
    tell: Callable[[str], None] = lambda what: None,
) -> Kernels:
    """Let fused kernels compute the norms of a live model, in place; weights, names and the function stay.

    Each kernel is measured against the norm it is to stand for, outputs and gradients, before it does: one that rounds
    elsewhere, or writes into a gradient, is not taken. `restore_kernels` undoes it. Call it when the model is on its
    device and in its dtype, before `DistributedDataParallel`, `fully_shard` and `torch.compile`, and again when an eps
    was changed, which a kernel has as it was; weights are read as they are.

    Args:
        model: of transformers, or any with `inputs`; LayerNorms and RMSNorms, converted or not.
        backend: `auto`, the fastest on this machine for each norm, its own module where that is; the name of one
            (`normswap kernels` lists them), or several in order of preference.
        fuse_residual: have norms make the residual sums beside them, where a backend can: the source of a block's
            `forward` is rewritten to `y, h = self.norm.add_norm(f, residual)` and the like, where the trace and the
            source prove that it is the same. `Kernels.fusing` has the new source, and why other sums stay. For eager
            mode: `torch.compile` fuses sums and norms by itself.
        device: type of the device that it will compute on; None: where its weights are.
        autocast: the dtype that the model will compute in under `torch.autocast`, where it has float32 weights. By
            default both half precisions are prepared on a GPU, and none on a CPU, where some backends take seconds to
            compile for each. Under what is not prepared, norms compute as they did.
        inputs: keyword arguments of `forward` for one small batch; by default made from what the model says it takes.
        chosen: what an earlier call chose (`Kernels.chosen`), which is not measured anew.
        tell: called with what is being measured; compiling takes seconds.

    Returns:
        What serves each norm, why, and what rejected the others.

    Raises:
        KernelError: no such backend, it is not installed, or weights have no values here (meta device, offloaded).
        ObserveError: the model could not be run once.
    """
    asked = check_backends(backend)
    restore_kernels(model)
    normmap = inspect(model, inputs=inputs) if fuse_residual else None
    sites = [(path, site.spec) for path, site in normmap.sites.items()] if normmap else find_sites(model, inputs)
    modules = dict(model.named_modules())
    device, dtype = _where(model, device)
    chooser = Chooser(asked, tell, chosen or {})
    runtimes = runtimes_of(device, dtype, autocast)
    found = [examined(modules[path], path, spec, device, runtimes, chooser) for path, spec in sites]
    pairs, forms = choose_sums(normmap, {site.path: site for site in found}, chooser) if normmap else ([], [])
    for site in found:
        own = [(pair, choices) for pair, choices in forms if pair.norms[0] == site.path]
        rows = [
            (runtime, choice, pair.norms[1] if pair.form == "norm-add-norm" else "")
            for pair, choices in own
            for runtime, choice in choices
        ]
        seconds = any(site.path in pair.norms[1:] for pair, _ in forms)
        _swap(modules[site.path], site, rows, seconds)
    made = [choice for _, choices in forms for _, choice in choices]
    return Kernels(found, device, dtype, fuse(model, pairs) if pairs else None, made)


def restore_kernels(model: nn.Module) -> list[str]:
    """Give every norm, and every block, of a model its own class back. Returns the paths of norms that had a kernel.

    Raises:
        KernelError: something else has changed the class of one since (`fully_shard`): undo that first.
    """
    fused = [(path, module) for path, module in model.named_modules() if isinstance(module, FusedNorm)]
    for path, module in fused:
        if plain_class_of(module) is None:
            raise KernelError(
                f"{path} has become a {type(module).__name__} since use_kernels: expected the class that it gave. "
                f"Restore kernels before what wraps norms one by one (fully_shard), or leave norms out of that."
            )
    unfuse(model)
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


def _where(model: nn.Module, device: str | None) -> tuple[str, torch.dtype]:
    """Device type and dtype of a model."""
    floats = [p for p in model.parameters() if p.is_floating_point()]
    absent = next((n for n, p in model.named_parameters() if p.is_meta), None)
    if not floats or absent is not None:
        what = "it has no parameters" if absent is None else f"{absent} has no values here (meta device, or offloaded)"
        raise KernelError(f"kernels go under a model as it computes, and {what}: load it whole, on its device.")
    return device or floats[0].device.type, model.dtype if hasattr(model, "dtype") else floats[0].dtype


def _swap(module: nn.Module, site: SiteKernels, forms: Sequence[tuple[Runtime, Choice, str]], seconds: bool) -> None:
    """Give a norm its kernels: alone, and in `forms`, each with the path of its second norm.

    `seconds`: whether it is the second norm of another's form, which asks it for its tensors.
    """
    table = Table(site.path, site.spec.weight, site.spec.bias)
    alone = [(runtime, choice, "") for runtime, choice in site.choices.items()]
    for runtime, choice, second in (*alone, *forms):
        if choice.backend is not None:
            key = key_of(choice.call, runtime.autocast, second)
            table.add(key, Served(choice.call, choice.backend), choice.kernel)
    if table.served or seconds:
        module.__class__ = fused_class(type(module))
        module.kernels = table
