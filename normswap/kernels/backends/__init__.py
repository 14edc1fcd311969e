"""The backends: each file here that has a `BACKEND` is one. To add one, add a file."""

from __future__ import annotations

import importlib
import pkgutil

from normswap.kernels.backend import Backend

BACKENDS: dict[str, Backend] = {}
for _found in pkgutil.iter_modules(__path__):
    _backend = importlib.import_module(f"{__name__}.{_found.name}").BACKEND
    BACKENDS[_backend.name] = _backend
