"""Whether untying embeddings changes what a model does, before anything else is done to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from normswap.apply.live import apply_structure, without_storage
from normswap.errors import RefusedError
from normswap.observe.inputs import example_inputs
from normswap.observe.run import observe
from normswap.planning.edits import SetConfig, Untie
from normswap.planning.plans import Plan


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
