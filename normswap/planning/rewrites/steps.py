"""The steps of a stream: its blocks, parallel ones together, with the layer that each stands in and where it goes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from normswap.errors import RefusedError
from normswap.planning.request import Placement, parse_layers
from normswap.understand.normmap import NormMap, StreamInfo
from normswap.understand.placement import Block


@dataclass(frozen=True)
class Row:
    """A line of the table of placements: which slots hold a norm, and what is multiplied by a number.

    Attributes:
        scaled: the skip has a scale of its own.
        damped: what N_in gives is divided by the root of the layer's number, counted from 1.
    """

    n_in: bool
    n_branch: bool
    n_out: bool
    scaled: bool = False
    damped: bool = False


#: the placement whose skip is normalised, S(x) = N_in(x); as a row it is pre
SKIP = "pre-normalized-skip"

#: x' = N_out( a S(x) + b N_branch( F( N_in(x) ) ) )
ROWS = {
    "pre": Row(True, False, False),
    "post": Row(False, False, True),
    "deepnorm": Row(False, False, True, scaled=True),
    SKIP: Row(True, False, False),
    "sandwich": Row(True, True, False),
    "reordered": Row(False, True, False),
    "keel": Row(True, False, True, scaled=True),
    "layernorm-scaling": Row(True, False, False, damped=True),
}


@dataclass
class Step:
    """One block, or several that read the same value and are added one after another (parallel branches).

    Attributes:
        name: the stream and the step's number in it.
        layer: the number of the layer it stands in, None outside of numbered layers.
        blocks: in order; the last one's sum is the step's result.
        placement, target: the name and the row of what it is moved to, None: it stays.
    """

    name: str
    layer: int | None
    blocks: list[Block]
    placement: str | None = None

    @property
    def target(self) -> Row | None:
        return None if self.placement is None else ROWS[self.placement]

    @property
    def n_in(self) -> list[str]:
        return list(dict.fromkeys(path for block in self.blocks for path in block.n_in))

    @property
    def n_branch(self) -> list[str]:
        return list(dict.fromkeys(path for block in self.blocks for path in block.n_branch))

    @property
    def n_out(self) -> list[str]:
        return self.blocks[-1].n_out

    @property
    def source(self) -> Row:
        first = self.blocks[0]
        # a tensor on the skip of a raw stream is no matter: a norm behind the sum takes it as it comes
        scaled = first.is_scaled if self.n_out else first.skip != 1
        damped = all(block.is_damped for block in self.blocks)
        return Row(bool(self.n_in), bool(self.n_branch), bool(self.n_out), scaled, damped)

    @property
    def stays(self) -> bool:
        """Whether it stands as it is to stand, or is not to be moved.

        Norms on branches are no matter where the norm behind the sum stays, or the one in front of the branch; in the
        first layer a damped norm is any norm.
        """
        source, target = self.source, self.target
        if target is None or target == source:
            return True
        if target.damped and self.layer == 0:
            source = replace(source, damped=True)
        return (target.damped or (target.n_out and source.n_out)) and replace(source, n_branch=False) == target


def steps_of(normmap: NormMap, stream: StreamInfo) -> list[Step]:
    """The stream's blocks as steps, in order."""
    base = stream.found.analysis.base
    steps: list[Step] = []
    for block in stream.blocks:
        before = steps[-1].blocks if steps else []
        reads = {base(v) for v in block.read.values()}
        beside = base(before[-1].result) not in reads if before and reads else block.beside
        if before and beside and not before[-1].n_out:
            before.append(block)
            continue
        steps.append(Step(f"{stream.name}[{len(steps)}]", block.layer, [block]))
    return steps


def choose(steps: list[Step], placements: tuple[Placement, ...]) -> None:
    """Set the targets: each placement for its layers, `0-3,7`, or for all where None; later ones win.

    Raises:
        RefusedError: a layer that is not there, or a placement that is not known.
    """
    there = {step.layer for step in steps if step.layer is not None}
    for placement in placements:
        name, layers = placement.name, placement.layers
        row_of(name)
        odd = sorted(parse_layers(layers) - there) if layers is not None else []
        if odd:
            raise RefusedError(
                f"--layers {layers}: this model has no layer {', '.join(map(str, odd[:5]))}; expected numbers from "
                f"{min(there, default=0)} to {max(there, default=0)}."
            )
        for step in steps:
            if placement.takes(step.layer):
                step.placement = name


def row_of(name: str) -> Row:
    """The slots of a placement. Raises RefusedError where it is not known."""
    if name not in ROWS:
        raise RefusedError(f"placement '{name}' is not offered: expected one of {', '.join(ROWS)}.")
    return ROWS[name]
