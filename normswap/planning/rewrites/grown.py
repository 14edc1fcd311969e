"""Biases that readers grow to take over a norm's, where the reader is a writer as well (queries to their norm)."""

from __future__ import annotations

from collections.abc import Iterable

from normswap.planning.edits import Centre, FoldBias, FoldGain, GrowBias, Rotate
from normswap.planning.rewrites.fold import Folding
from normswap.planning.rewrites.rewriting import NORMS, Rewriting


class Grown(Rewriting):
    """What grown biases ask for."""

    stage = NORMS


def treat_grown(folding: Folding, others: Iterable[Rewriting]) -> Grown:
    """Plan that each grown bias is treated by `others` as the output of its weight is."""
    grown = {f"{edit.module}.bias" for edit in folding.edits if isinstance(edit, GrowBias)}
    made = [edit for rewriting in others for edit in rewriting.edits]
    return Grown(
        edits=[
            edit.model_copy(update={"tensor": bias.tensor, "axis": 0})
            for bias in folding.edits
            if isinstance(bias, FoldBias) and bias.tensor in grown
            for edit in made
            if isinstance(edit, Centre | FoldGain | Rotate) and edit.tensor == bias.reader and edit.axis != bias.axis
        ]
    )
