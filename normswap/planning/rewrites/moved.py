"""What a move asks for and gives: its constants, the steps that it moves, its edits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from normswap.norms.spec import NormSpec
from normswap.planning.request import Placement
from normswap.planning.rewrites.rewriting import Rewriting


@dataclass(frozen=True)
class Scales:
    """The constants of a move, by step name: `stream[3]` is what step 3 reads, `stream[end]` what the last one gives.

    Attributes:
        stream: c, the scale of the stream.
        branch: t, the scale of what a branch gives, by step name and the branch's number in the step.
    """

    stream: Mapping[str, float] = field(default_factory=dict)
    branch: Mapping[tuple[str, int], float] = field(default_factory=dict)


@dataclass(frozen=True)
class MovedStep:
    """What calibration needs to know of a moved step.

    Attributes:
        name, stream, layer: of the step.
        before, after: its placement.
        result: the value of the trace that its sum gives.
        branches: values that its branches add.
        scaled: the value whose scale the constant c of the step stands for, and the norm that says what scale is.
        out: in the moved model, the module that reads the step's sum and normalises it, None: none is there.
        frame: name of the parameter by which the sum is multiplied on its way to `out`, None: it is not.
        norm: how the sum is read.
        after_it: name of the step that reads the sum, `stream[end]` behind the last.
        adds_n_in: whether a norm is put in before the branch.
    """

    name: str
    stream: str
    layer: int | None
    before: str
    after: str
    result: int
    branches: tuple[int, ...]
    scaled: tuple[int, NormSpec] | None
    out: str | None
    frame: str | None
    norm: NormSpec
    after_it: str
    adds_n_in: bool


@dataclass
class Moved(Rewriting):
    """What moving asks for.

    Attributes:
        placements: what was asked for.
        steps: those that move.
        exact: whether that keeps the function.
        notes: what is said of it besides.
    """

    placements: tuple[Placement, ...] = ()
    steps: list[MovedStep] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    exact: bool = False

    def reasons(self) -> list[str]:
        if not self.steps:
            return []
        words = " and ".join(placement.words().replace("--", "") for placement in self.placements)
        streams = ", ".join(dict.fromkeys(step.stream for step in self.steps))
        how = "" if self.exact else ", with a constant in the place of each token's scale"
        said = [f"{len(self.steps)} blocks of {streams} are moved ({words}){how}."]
        return [*said, *dict.fromkeys(self.notes)]
