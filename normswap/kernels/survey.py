"""Which kernels the norms of a checkpoint would get on this machine, without its weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from normswap.checkpoint.source import Source
from normswap.errors import KernelError
from normswap.kernels.backends import BACKENDS
from normswap.kernels.choice import Chooser
from normswap.kernels.fusing import Fusing, rewritten
from normswap.kernels.sites import examined, runtimes_of
from normswap.kernels.sums import choose_sums
from normswap.kernels.swap import Kernels, check_backends
from normswap.understand.normmap import inspect


def survey(
    model: str | Path,
    backend: str | Sequence[str] = "auto",
    *,
    fuse_residual: bool = False,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    autocast: torch.dtype | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    tell: Callable[[str], None] = lambda what: None,
) -> Kernels:
    """What `use_kernels` would do with a checkpoint.

    Args:
        model: a folder with a config.json, or a Hub id; no weights are read.
        backend, fuse_residual, autocast, tell: as of `use_kernels`.
        device: `cpu`, `cuda`, ...; None: the GPU where there is one.
        dtype: of the weights; None: as the configuration says.

    Raises:
        KernelError: no such backend or device.
        SourceError, ObserveError: as `inspect`.
    """
    asked = check_backends(backend)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise KernelError(f"device {device} is not there: {str(error).splitlines()[0]}") from error
    source = Source.open(model, revision=revision, trust_remote_code=trust_remote_code, weights=False)
    built = source.build()
    dtype = dtype or source.config.dtype or torch.float32
    modules = dict(built.named_modules())
    chooser, runtimes = Chooser(asked, tell), runtimes_of(device, dtype, autocast)
    normmap = inspect(built)
    sites = [
        examined(modules[path], path, site.spec, device, runtimes, chooser, dtype)
        for path, site in normmap.sites.items()
    ]
    if not fuse_residual:
        return Kernels(sites, device, dtype)
    pairs, forms = choose_sums(normmap, {site.path: site for site in sites}, chooser)
    made = [choice for _, choices in forms for _, choice in choices]
    return Kernels(sites, device, dtype, Fusing(pairs, rewritten(built, pairs)), made)


def backends() -> list[dict[str, object]]:
    """Every backend: whether it can be used here, and what it declares."""
    return [
        {
            "name": name,
            "about": backend.about,
            "missing": backend.missing(),
            "version": None if backend.missing() else backend.version(),
            "devices": list(backend.abilities.devices),
            "forms": list(backend.abilities.forms),
            "kinds": list(backend.abilities.kinds),
            "castings": list(backend.abilities.castings),
            "max_width": backend.abilities.max_width,
            "compile": backend.abilities.compile,
            "distributed": backend.abilities.distributed,
        }
        for name, backend in BACKENDS.items()
    ]
