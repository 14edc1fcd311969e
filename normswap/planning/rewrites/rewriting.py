"""What every rewrite gives: the edits that it asks for, where, what it cannot have, and why what it does holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from normswap.planning.edits import AnyEdit
from normswap.planning.plans import Claim

#: when the tensor edits of a rewrite act: what was tied is stored apart, gains and biases move on original values, then
#: what writes to streams loses its mean, norms are made anew, and at last streams are carried in another basis
UNTIED, GAINS, WRITERS, NORMS, BASES = range(5)


@dataclass
class Rewriting:
    """What a rewrite asks for.

    Attributes:
        edits: in order; its tensor edits act at `stage`, among those of the other rewrites.
        sites: paths of the norms that it changes, or puts in.
        refused: what it cannot have, by path, and why.
        claim: what the result promises.
    """

    stage: ClassVar[int] = GAINS

    edits: list[AnyEdit] = field(default_factory=list)
    sites: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    claim: Claim = "exact"

    def reasons(self) -> list[str]:
        """Why the claim holds, a sentence each."""
        return []
