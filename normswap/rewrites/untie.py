"""Tied parameters: one tensor under several names, of which an edit may want to change only some.

While tied, an edit of the tensor reaches every module that reads it. Untied, each name is a tensor of its own (the
configuration has one flag for all of them), and an edit reaches the modules that hold it by that name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from normswap.apply.live import apply_structure, without_storage
from normswap.edits import AnyEdit, SetConfig, Untie
from normswap.errors import RefusedError
from normswap.inputs import example_inputs
from normswap.normmap import NormMap
from normswap.observe import observe
from normswap.plans import Plan


class Ties:
    """By which name a module reads a parameter, and who else reads it by that name.

    Attributes:
        untied: whether tied names are separated in this plan.
        wanted: set by a rewrite that could go on if they were.
    """

    def __init__(self, normmap: NormMap, untied: bool):
        self.normmap, self.untied, self.wanted = normmap, untied, False

    def name(self, parameter: str, module: str) -> str:
        own = self.normmap.name_in(module, parameter)
        return own if self.untied and own is not None else parameter

    def users(self, parameter: str, module: str) -> set[str]:
        """Modules that read the tensor which `module` reads as `parameter`, itself included."""
        name = self.name(parameter, module)
        return {user for user in self.normmap.users(parameter) if self.name(parameter, user) == name}

    def want(self, parameter: str) -> None:
        if len(self.normmap.names(parameter)) > 1:
            self.wanted = True

    def edits(self) -> list[AnyEdit]:
        if not self.untied:
            return []
        untied = [Untie(tensor=alias, source=source) for alias, source in self.normmap.aliases.items()]
        return [*untied, SetConfig(key="tie_word_embeddings", value=False)]


def check_untying(model: nn.Module, plan: Plan, inputs: Mapping[str, Any] | None = None) -> None:
    """Refuse a plan whose untying alone changes what the model does: some scale their output only when tied.

    Raises:
        RefusedError: the model calls other operations once its configuration says that nothing is tied.
    """
    untying = tuple(edit for edit in plan.edits if isinstance(edit, Untie | SetConfig))
    if not untying:
        return
    inputs = example_inputs(model) if inputs is None else inputs
    untied = without_storage(model)
    apply_structure(untied, plan.model_copy(update={"edits": untying}))
    before, after = ([(op.name, op.module) for op in observe(m, inputs).operations] for m in (model, untied))
    if before != after:
        changed = next(
            (pair for pair in zip(before, after, strict=False) if pair[0] != pair[1]), (before[-1], after[-1])
        )
        (name, module), _ = changed
        raise RefusedError(
            f"{plan.architecture} computes something else when its embeddings are not tied: {name} in "
            f"{module or 'the model'} is not the same then. Keep them tied (--tied keep)."
        )
