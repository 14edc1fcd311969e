"""The norms that a conversion can put into a model: one file per kind, found by looking.

Each file has a tuple `KINDS` of what it offers. A new file needs no other change.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module

from torch import nn

from normswap.norms.kind import Kind

KINDS: dict[str, Kind] = {
    kind.name: kind
    for info in pkgutil.iter_modules(__path__)
    for kind in import_module(f"{__name__}.{info.name}").KINDS
}
#: by name, what is built
MODULES: dict[str, type[nn.Module]] = {name: kind.module for name, kind in KINDS.items()}
#: those that can be asked for
OFFERED: dict[str, Kind] = {name: kind for name, kind in KINDS.items() if kind.routes}
