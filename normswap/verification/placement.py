"""The second trace: a model whose norms moved is looked at again, and never asked what was done to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from normswap.errors import VerificationError
from normswap.planning.edits import AddNorm
from normswap.planning.plans import Plan
from normswap.planning.rewrites.steps import ROWS, steps_of
from normswap.understand.normmap import NormMap, StreamInfo, inspect


def check_moved(original: nn.Module, result: nn.Module, plan: Plan, inputs: Mapping[str, Any] | None = None) -> None:
    """Every norm that a move adds runs, and behind the sum of every block that is moved from a raw stream to a
    normalised one stands a norm.

    Both models are traced on the meta device. Streams must have the sums that they had; not those of exact moves, whose
    streams may carry more than they did, and which their numbers prove.

    Args:
        inputs: keyword arguments of `forward`, by default those that are made for observation.

    Raises:
        VerificationError: an added norm that nothing calls, a sum without a norm, or a stream with other sums.
    """
    if not plan.moved:
        return
    after = inspect(result, inputs=inputs)
    ran = {call.path for call in after.trace.calls}
    idle = [edit.module for edit in plan.edits if isinstance(edit, AddNorm) and edit.module not in ran]
    if idle:
        raise VerificationError(
            f"{idle[0]} is added by the move, and nothing calls it in the result. Nothing was published. Please report "
            f"the model: this is a fault of normswap."
        )
    targets = {block.name: ROWS[block.after] for block in plan.moved}
    if plan.claim == "exact" or not any(row.n_out for row in targets.values()):
        return
    before = inspect(original, inputs=inputs)
    left = list(after.streams)
    for stream in before.streams:
        now = _same(stream, left, after)
        left = [other for other in left if other is not now]
        sums = dict(zip((block.add for block in stream.blocks), now.blocks, strict=True))
        for step in steps_of(before, stream):
            wanted = step.name in targets and targets[step.name].n_out and not step.n_out
            if wanted and not sums[step.blocks[-1].add].n_out:
                raise VerificationError(
                    f"{step.name} should be {_after(plan, step.name)} now, and no norm is found behind its sum in "
                    f"{step.blocks[-1].module}: the plan says that it moves, and the result does not show it. Nothing "
                    f"was published. Please report the model: this is a fault of normswap."
                )


def _after(plan: Plan, name: str) -> str:
    return next(block.after for block in plan.moved if block.name == name)


def _same(stream: StreamInfo, left: list[StreamInfo], after: NormMap) -> StreamInfo:
    """The stream of the result that has the same sums; a tower that runs twice has two such streams, in order."""
    own = [block.module for block in stream.blocks]
    for other in left:
        if [block.module for block in other.blocks] == own:
            return other
    raise VerificationError(
        f"{stream.name} had {len(own)} sums, from {own[0]} to {own[-1]}, and no stream of the result has these: found "
        f"{'; '.join(f'{len(s.blocks)} in {s.name}' for s in after.streams) or 'none'}. Nothing was published. Please "
        f"report the model: this is a fault of normswap."
    )
