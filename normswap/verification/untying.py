"""Whether untying embeddings changes what a model does, before anything else is done to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from normswap.apply.live import apply_structure, without_storage
from normswap.observe.inputs import example_inputs
from normswap.observe.run import observe
from normswap.planning.edits import SetConfig, Untie
from normswap.planning.plans import Plan


def why_tied(model: nn.Module, plan: Plan, inputs: Mapping[str, Any] | None = None) -> str | None:
    """Why the untying that `plan` asks for would change the function: some scale their output only when tied.

    Returns None where the model calls the same operations once its configuration says that nothing is tied.
    """
    untying = tuple(edit for edit in plan.edits if isinstance(edit, Untie | SetConfig))
    if not untying:
        return None
    inputs = example_inputs(model) if inputs is None else inputs
    untied = without_storage(model)
    apply_structure(untied, plan.model_copy(update={"edits": untying}))
    before, after = ([(op.name, op.module) for op in observe(m, inputs).operations] for m in (model, untied))
    if before == after:
        return None
    (name, module), _ = next(
        (pair for pair in zip(before, after, strict=False) if pair[0] != pair[1]), (before[-1], after[-1])
    )
    return (
        f"they stay tied, since {plan.architecture} computes something else when its embeddings are not: {name} in "
        f"{module or 'the model'} is not the same then"
    )
