"""What rewritten code may call: norms and numbers that a plan puts into a module, and nothing that was there to find.

The source of a method is the installed library's, and a plan says at which of its expressions `self.name(..)` is put
in. Were any name allowed, a plan from anyone could have a model call what writes files or fetches code.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from normswap.errors import PlanError
from normswap.planning.edits import AddNorm, ModuleEdit, NormOutput, Rewrite, SetScale

#: changes that leave parts of what stands there
_LEAVING = ("unwrap", "left", "right")
_CALLING = ("wrap", "enter")


def check_calls(model: nn.Module, edits: Sequence[ModuleEdit]) -> None:
    """Raise PlanError where code would use anything but modules and numbers that the plan sets, or an edit is twice."""
    _check_once(edits)
    added = {edit.module for edit in edits if isinstance(edit, AddNorm)}
    numbers = {(edit.module, edit.name) for edit in edits if isinstance(edit, SetScale)}

    def is_module(path: str) -> bool:
        try:
            return path in added or model.get_submodule(path) is not None
        except AttributeError:
            return False

    for edit in edits:
        if isinstance(edit, NormOutput):
            for name, *_ in edit.runs:
                if not is_module(f"{edit.module}.{name}"):
                    raise _unknown(edit, f"calls {name}", "a norm")
        if not isinstance(edit, Rewrite):
            continue
        for change in edit.changes:
            path = f"{edit.module}.{change.name}" if edit.module else str(change.name)
            if change.kind in _CALLING and not is_module(path):
                raise _unknown(edit, f"calls {change.name}", "a norm")
            if change.kind == "scale" and (edit.module, change.name) not in numbers:
                raise _unknown(edit, f"multiplies by {change.name}", "a number that the plan sets")
            if change.kind not in (*_LEAVING, *_CALLING, "scale"):
                raise _unknown(edit, f"makes the change {change.kind}", "one of those that move norms")


def _check_once(edits: Sequence[ModuleEdit]) -> None:
    seen: set[tuple[str, ...]] = set()
    for edit in edits:
        what = (edit.edit, edit.module, *((edit.name,) if isinstance(edit, SetScale) else ()))
        if what in seen and not isinstance(edit, Rewrite):  # of these each is for another method, which is looked at
            raise PlanError(f"{edit.module}: the plan has two edits {edit.edit} of it, expected one. Make it again.")
        seen.add(what)


def _unknown(edit: ModuleEdit, does: str, expected: str) -> PlanError:
    return PlanError(
        f"the plan's code of {edit.module or 'the model'} {does}: expected {expected}. It was not written by normswap, "
        "or was changed since: make it again."
    )
