"""Values of a checkpoint's model tensors, before and after their edits: read from the files, computed in float64.

An embedding of a large vocabulary is many times larger in float64 than anything else here, so tensors are computed some
rows at a time wherever rows do not meet. The bits are the same: each row's result depends on that row alone.
"""

from __future__ import annotations

import math

import torch

from normswap.apply.keeper import Keeper
from normswap.apply.layout import Job, Layout
from normswap.checkpoint.files import Checkpoint
from normswap.checkpoint.keymap import SAVE_MERGED, Group, KeyMap, Tensors
from normswap.errors import PlanError
from normswap.planning.edits import TensorEdit, Untie
from normswap.planning.plans import Plan

# How many values are in float64 at once: 128 MiB.
AT_ONCE = 2**24


class Values:
    """Reads `source` through `keymap`, and what calibration fitted from `plan`; keeps no tensor.

    Args:
        keeper: is told each edit before it is made.
    """

    def __init__(self, source: Checkpoint, keymap: KeyMap, plan: Plan, keeper: Keeper | None = None):
        self._source, self._plan, self._keeper = source, plan, keeper
        self._keymap = keymap
        self._read_for_edits = plan.reading(self.original)

    def original(self, name: str) -> torch.Tensor:
        """A model tensor as the checkpoint has it, under `name` or an alias, in float64."""
        return self._stored(name).to(torch.float64)

    def edited(self, job: Job, dtype: torch.dtype) -> Tensors:
        """The job's tensors by checkpoint key, rounded once to `dtype`.

        Raises:
            PlanError: a value does not fit `dtype`, or transformers does not undo the group's conversion exactly.
        """
        if job.group is None:
            return {key: self._new(name, edits, dtype) for key in job.keys for name, edits in job.edits.items()}
        sources = self._read(job.group)
        made = self._keymap.to_model(job.group, sources)
        self._check_reversible(job.group, sources, made)
        del sources
        if self._keeper is not None:
            self._keeper.begin({edit.tensor for edits in job.edits.values() for edit in edits})
        for name in job.group.targets:
            made[name] = self._apply(name, made.pop(name), job.edits.get(name, ()), dtype)
        return self._keymap.to_source(job.group, made)

    def keep_removed(self, layout: Layout) -> None:
        """Tell the keeper of the tensors that are removed, which nothing computes."""
        edits = self._plan.tensor_edits()
        for entry in layout.summary.tensors.values():
            for name in entry.names if entry.what == "removed" else ():
                self._keeper.begin([name])
                value = self._stored(name)  # a count keeps its dtype
                value = value.to(torch.float64) if value.is_floating_point() else value
                for number, edit in enumerate(edits.get(name, ())):
                    self._keeper.note(edit, number, value, self._read_for_edits)
                    value = edit.apply(value, self._read_for_edits)

    def cast(self, key: str, dtype: torch.dtype) -> torch.Tensor:
        """A stored tensor in another dtype. Raises PlanError when a value does not fit it."""
        return self._apply(key, self._source.read(key), (), dtype)

    def check_copies(self, names: tuple[str, ...]) -> None:
        """Refuse a tied parameter that the files hold twice with different values: loading would not tie it."""
        first = self.original(names[0])
        for name in names[1:]:
            if not torch.equal(first, self.original(name)):
                raise PlanError(
                    f"expected {names[0]} and {name} to be equal in {self._source.folder}, since the configuration "
                    "ties them, found different values. Loading does not tie such a pair: set tie_word_embeddings to "
                    "false in config.json, and make the plan again."
                )

    def _new(self, name: str, edits: tuple[TensorEdit, ...], dtype: torch.dtype) -> torch.Tensor:
        if isinstance(edits[0], Untie):
            # What it does to values, without a copy of them in float64.
            return self._apply(name, self._stored(edits[0].source), edits[1:], dtype)
        return self._compute(name, None, edits, dtype)

    def _apply(self, name: str, value: torch.Tensor, edits: tuple[TensorEdit, ...], dtype: torch.dtype) -> torch.Tensor:
        if value.ndim == 0 or not all(edit.keeps_rows_apart() for edit in edits):
            return self._compute(name, value, edits, dtype)
        result = torch.empty(value.shape, dtype=dtype)
        rows = max(1, AT_ONCE // max(1, math.prod(value.shape[1:])))
        for part, place in zip(value.split(rows), result.split(rows), strict=True):
            place.copy_(self._compute(name, part, edits, dtype))
        return result

    def _compute(
        self, name: str, value: torch.Tensor | None, edits: tuple[TensorEdit, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        for number, edit in enumerate(edits):
            value = None if value is None else value.to(torch.float64)
            if self._keeper is not None:
                self._keeper.note(edit, number, value, self._read_for_edits)
            value = edit.apply(value, self._read_for_edits)
        rounded = value.to(dtype)
        if not rounded.isfinite().all() and value.isfinite().all():
            raise PlanError(
                f"{name}: expected all values to fit {dtype}, found {value.abs().max().item():.3g} against a largest "
                f"of {torch.finfo(dtype).max:.3g}; store as bfloat16 or float32."
            )
        return rounded

    def _stored(self, name: str) -> torch.Tensor:
        group = self._keymap.stored_group(name)
        made = self._keymap.to_model(group, self._read(group))
        return next(made[alias] for alias in (name, *self._keymap.names_of(name)) if alias in made)

    def _read(self, group: Group) -> Tensors:
        return {key: self._source.read(key) for key in group.sources}

    def _check_reversible(self, group: Group, sources: Tensors, made: Tensors) -> None:
        if group.converter is None:
            return
        back = self._keymap.to_source(group, made)
        for key, value in sources.items():
            # As bits: a NaN has to come back too.
            if not torch.equal(back[key].contiguous().view(torch.uint8), value.view(torch.uint8)):
                raise PlanError(
                    f"{key}: expected to get it back unchanged from {', '.join(group.targets)}, found other values: "
                    f"transformers does not undo this conversion exactly. {SAVE_MERGED}"
                )
