"""One norm of a model examined: what it asks of a kernel for all that it may be called with, and what serves it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from normswap.kernels.call import Call, norm_of, short, unserved
from normswap.kernels.choice import Choice, Chooser
from normswap.kernels.faithful import sample
from normswap.norms.spec import NormSpec


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


def runtimes_of(device: str, dtype: torch.dtype, autocast: torch.dtype | None) -> list[Runtime]:
    """What the norms of a model of `dtype` may be called with; see `use_kernels` for `autocast`."""
    found = [Runtime(dtype)]
    if dtype == torch.float32:
        usual = (torch.bfloat16, torch.float16) if device == "cuda" else ()
        for half in usual if autocast is None else (autocast,):
            found += [Runtime(torch.float32, half), Runtime(half, half)]
    return found


@dataclass
class SiteKernels:
    """What became of one site.

    Attributes:
        path: of the norm in the model.
        spec: its behaviour.
        choices: by what it may be called with; the model's own dtype first.
        kept: why it keeps its module whatever it is called with; None where `choices` says.
        made: a sample of it, on which kernels are measured.
    """

    path: str
    spec: NormSpec
    choices: dict[Runtime, Choice] = field(default_factory=dict)
    kept: str | None = None
    made: nn.Module | None = field(default=None, repr=False)

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
    site = SiteKernels(path, spec, kept=_kept(module, spec))
    if site.kept is not None:
        return site
    site.made = sample(module, device, cast)
    weights = [p.dtype for p in site.made.parameters()]
    for runtime in runtimes:
        with runtime.entered(device):
            try:
                with torch.no_grad():
                    out = site.made(torch.ones(2, spec.width, device=device, dtype=runtime.dtype))
            except RuntimeError:
                continue  # not even the module takes this
            norm = norm_of(spec, runtime.dtype, weights[0] if weights else None, out.dtype)
            call = Call("norm", spec.width, runtime.dtype, device, norm)
            site.choices[runtime] = chooser.choose(call, [site.made], [spec])
    if not site.choices:
        site.kept = f"fails on {short(runtimes[0].dtype)} rows of {spec.width} when it is run alone"
    return site


def _kept(module: nn.Module, spec: NormSpec) -> str | None:
    if "forward" in vars(module):
        return "its forward was replaced on the module itself (by hooks of accelerate, or another patch)"
    return unserved(spec)
