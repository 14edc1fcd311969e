"""normswap: change the norms of trained models.

    normswap.inspect("./my-model")                            # what its norms are, and where
    normswap.convert("./my-model", "./out", norm="rmsnorm")   # checkpoint to checkpoint
    normswap.convert_model(model, norm="rmsnorm")             # a live model, in place
    normswap.use_kernels(model)                               # fused kernels under its norms

Names are imported when they are used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from normswap.conversion import Conversion, convert, convert_model, plan
    from normswap.errors import (
        DestinationError,
        DivergedError,
        HubError,
        KernelError,
        NormswapError,
        ObserveError,
        PlanError,
        RecipeError,
        RefusedError,
        SourceError,
        VerificationError,
    )
    from normswap.kernels.swap import Kernels, restore_kernels, use_kernels
    from normswap.loading import load
    from normswap.norms.spec import NormSpec
    from normswap.planning.plans import Plan
    from normswap.planning.request import Request
    from normswap.repbn import fold_repbn, reestimate
    from normswap.report.page.write import write_report
    from normswap.tune.recipe import Recipe
    from normswap.tune.run import Finetuned, finetune
    from normswap.understand.normmap import NormMap, inspect
    from normswap.undoing import Undone, undo
    from normswap.verification.run import Report, verify

_HOME = {
    "conversion": ("Conversion", "convert", "convert_model", "plan"),
    "errors": (
        "DestinationError",
        "DivergedError",
        "HubError",
        "KernelError",
        "NormswapError",
        "ObserveError",
        "PlanError",
        "RecipeError",
        "RefusedError",
        "SourceError",
        "VerificationError",
    ),
    "kernels.swap": ("Kernels", "restore_kernels", "use_kernels"),
    "loading": ("load",),
    "understand.normmap": ("NormMap", "inspect"),
    "norms.spec": ("NormSpec",),
    "planning.plans": ("Plan",),
    "planning.request": ("Request",),
    "undoing": ("Undone", "undo"),
    "tune.recipe": ("Recipe",),
    "tune.run": ("Finetuned", "finetune"),
    "repbn": ("fold_repbn", "reestimate"),
    "verification.run": ("Report", "verify"),
    "report.page.write": ("write_report",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
__all__ = sorted(_MODULE_OF)
__version__ = "0.1.0"


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'normswap' has no attribute '{name}'; it offers {', '.join(__all__)}")
    return getattr(importlib.import_module(f"normswap.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
