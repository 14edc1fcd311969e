"""Which parameters a stage trains."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from normswap.errors import RecipeError
from normswap.planning.edits import Rewrite, SwapNorm
from normswap.planning.plans import Plan
from normswap.tune.tapers import TaperedLane


def select(model: nn.Module, train: str | Sequence[str], plan: Plan | None, norms: Sequence[str]) -> set[str]:
    """Names of the parameters that `recipe.Stage.train` means.

    Args:
        model: to be trained.
        plan: what was done to it; None: nothing.
        norms: paths of the source's norms.

    Raises:
        RecipeError: it means none.
    """
    names = [name for name, _ in model.named_parameters()]
    patterns = [train] if isinstance(train, str) else list(train)
    found: set[str] = set()
    for pattern in patterns:
        if pattern == "all":
            chosen = set(names)
        elif pattern == "norms":
            made = [edit.module for edit in plan.edits if isinstance(edit, SwapNorm)] if plan else []
            chosen = _below(names, {*norms, *made})
        elif pattern == "skips":
            chosen = _below(names, {path for path, m in model.named_modules() if isinstance(m, TaperedLane)})
        elif pattern == "moved":
            chosen = _below(names, {edit.module for edit in plan.edits if isinstance(edit, Rewrite)} if plan else set())
        else:
            chosen = {name for name in names if fnmatchcase(name, pattern)}
        if not chosen:
            raise RecipeError(
                f"stages: train '{pattern}' means no parameter of this model. {_WHY.get(pattern, _NAMES)}"
            )
        found |= chosen
    return found


_NAMES = "Expected all, norms, skips, moved, or a pattern of parameter names such as '*.mlp.*'."
_WHY = {
    "skips": "Skips have scales while a taper moves norms; else these are in the weights that write to the stream.",
    "moved": "Blocks move where the surgery has a placement.",
    "norms": "None of its norms has a weight.",
}


def _below(names: Sequence[str], paths: set[str]) -> set[str]:
    """Names of parameters of the modules at `paths` and below."""
    return {name for name in names if any(name.startswith(f"{path}.") for path in paths)}
