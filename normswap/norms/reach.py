"""Which values of its input a norm takes its statistics from: the axes, and how many share one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count

import torch
from torch import nn


@dataclass(frozen=True)
class Reach:
    """The values that share one statistic.

    Attributes:
        axes: the normalised axes, counted from the end; for norms over positions channels come first.
        width: how many values along a single axis, over several whole axes together, or how many channels.
        positions: a group or instance norm: some channels, and all positions.
    """

    axes: tuple[int, ...]
    width: int
    positions: bool

    def on(self, small: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, int]:
        """Width and number of groups on inputs of `shape`, when this was measured on those of `small`."""
        first = self.axes[0]
        if not self.positions and len(self.axes) > 1:
            return self.width, 1
        if self.positions and self.width == 1:  # an instance norm, whatever the number of channels
            return 1, shape[first]
        groups = small[first] // self.width
        return shape[first] // groups, groups

    def standardised(self, x: torch.Tensor) -> torch.Tensor:
        """`x` with mean 0 and variance 1 in every group."""
        if self.positions:
            rows = x.reshape(x.shape[0], x.shape[1] // self.width, -1)
            return _standardised(rows, (-1,)).reshape(x.shape)
        if len(self.axes) == 1:
            axis = self.axes[0] % x.ndim
            return _standardised(x.unflatten(axis, (-1, self.width)), (axis + 1,)).flatten(axis, axis + 1)
        return _standardised(x, self.axes)


def _standardised(x: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
    x = x - x.mean(axes, keepdim=True)
    return x / x.square().mean(axes, keepdim=True).sqrt()


def probe_shapes(module: nn.Module, shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Shapes to probe at: positions that are more than one and few, and, should that not run, the model's own.

    On a map of one pixel a group norm cannot be told from a norm of channels, and nothing is gained by large maps.
    """
    own = {n for t in (*module.parameters(), *module.buffers()) for n in t.shape if n > 1}
    held = [n for value in vars(module).values() for n in (value if isinstance(value, tuple) else (value,))]
    own |= {n for n in held if isinstance(n, int) and n > 1}
    free = (n for n in count(3) if n not in own)
    channels_first = len(shape) > 2 and shape[1] in own and shape[-1] not in own
    small = [min(max(shape[0], 2), 3)]
    for axis, n in enumerate(shape[1:], 1):
        position = axis < len(shape) - 1 or channels_first
        fixed = n in own or not position or (axis == 1 and channels_first)
        small.append(n if fixed else next(free))
    yield tuple(small)
    if tuple(small) != tuple(shape):
        yield tuple(shape)


def reach(
    run: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    y: torch.Tensor,
    parameters: dict[str, torch.Tensor],
    step: float,
) -> Reach | None:
    """Which outputs one input moves, and along which axes gain and bias lie. None: no norm's pattern.

    `step` is added to one input: large enough to move every output that shares the statistic.
    """
    changed = x.clone()
    changed[(0,) * x.ndim] += step
    moved = run(changed) != y
    if not moved[0].any() or moved[1:].any():
        return None
    reached = [sorted(set(column)) for column in moved.nonzero().T.tolist()]
    counts = [len(positions) for positions in reached]
    if any(positions != list(range(len(positions))) for positions in reached) or moved.sum() != _product(counts):
        return None
    axes = {axis for axis, n in enumerate(counts) if n > 1}
    whole = {axis for axis in axes if counts[axis] == x.shape[axis]}
    lying = [_lies_along(run, x, y, p) for p in parameters.values() if p.numel() > 1]
    if not axes or any(along is not None and not along for along in lying):
        return None
    lying = [along for along in lying if along is not None]
    first, *rest = sorted(axes)
    if not rest and all(first in along for along in lying) and not (lying == [] and _refuses_more_axes(run, x)):
        return Reach((first - x.ndim,), counts[first], False) if x.shape[first] % counts[first] == 0 else None
    if rest and axes == whole and _stands_on_all(run, x, axes, lying):
        return Reach(tuple(axis - x.ndim for axis in sorted(axes)), _product(counts), False)
    over_positions = axes - {1}
    if over_positions <= whole and over_positions == set(range(2, x.ndim)) and all(along == {1} for along in lying):
        return Reach(tuple(range(1 - x.ndim, 0)), counts[1], True) if x.shape[1] % counts[1] == 0 else None
    return None


def _lies_along(run, x: torch.Tensor, y: torch.Tensor, p: torch.Tensor) -> set[int] | None:
    """The axes along which one value of a parameter meets one output only; None where it does nothing.

    Empty where one value moves all outputs: something comes after it, as in a norm centred at its output.
    """
    before = p.clone()
    p.view(-1)[0] += 1
    differs = (run(x) - y).abs() > 1e-8 * y.abs().mean()
    p.copy_(before)
    if not differs.any():
        return None
    reached = [set(column) for column in differs.nonzero().T.tolist()]
    return {axis for axis, at in enumerate(reached) if len(at) == 1 < x.shape[axis]}


def _stands_on_all(run, x: torch.Tensor, axes: set[int], lying: list[set[int]]) -> bool:
    """A layer norm over several axes has gains of them all, or sizes that are its own; other norms take any size."""
    if lying:
        return all(along == axes for along in lying)
    longer = torch.cat([x, x.narrow(max(axes), 0, 1)], max(axes))
    return not _runs(run, longer)


def _refuses_more_axes(run, x: torch.Tensor) -> bool:
    """An instance norm of a sequence takes any length but no further axis; a norm of a token's channels does not."""
    longer = torch.cat([x, x[..., :1]], -1)
    return x.ndim == 3 and _runs(run, longer) and not _runs(run, x[None])


def _runs(run, x: torch.Tensor) -> bool:
    try:
        run(x)
    except (RuntimeError, ValueError, TypeError):
        return False
    return True


def _product(numbers: list[int]) -> int:
    product = 1
    for n in numbers:
        product *= n
    return product
