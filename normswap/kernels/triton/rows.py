"""Where the rows of a tensor lie: `row // inner * outer + row % inner * step` values after its first one."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Rows(NamedTuple):
    """Strides are in values."""

    inner: int
    outer: int
    step: int


def rows_of(x: torch.Tensor) -> tuple[torch.Tensor, Rows]:
    """`x` and where its rows lie, or a contiguous copy of it where two strides cannot say that.

    Any last axis that is contiguous will do whose leading axes lie as at most two: a slice of a fused projection, or a
    batch and a sequence that were exchanged.
    """
    if x.is_contiguous():
        return x, Rows(1, x.shape[-1], 0)
    if x.stride(-1) == 1 or x.shape[-1] == 1:
        axes: list[list[int]] = []  # size and stride, innermost last, neighbours that lie as one joined
        for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
            if size == 1:
                continue
            if axes and axes[-1][1] == size * stride:
                axes[-1] = [axes[-1][0] * size, stride]
            else:
                axes.append([size, stride])
        if len(axes) == 2:
            return x, Rows(axes[1][0], axes[0][1], axes[1][1])
        if len(axes) < 2:
            return x, Rows(1, axes[0][1] if axes else 0, 0)
    x = x.contiguous()
    return x, Rows(1, x.shape[-1], 0)
