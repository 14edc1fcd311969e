"""Weights in another basis of a stream."""

from __future__ import annotations

from typing import Literal

from normswap.planning.edits.edit import FITTED, TensorEdit
from normswap.planning.orthogonal import Rotation


class Rotate(TensorEdit):
    """`T <- R T` along `axis`, or along each run of channels in it.

    So for what writes to a stream that is carried as `R x`, and for what reads it, `W <- W R^T`. `back`: R^T in the
    place of R.
    """

    edit: Literal["rotate"] = "rotate"
    axis: int
    rotation: Rotation
    back: bool = False

    def fitted(self):
        return (self.rotation.fitted,) if self.rotation.fitted else ()

    def mixes(self):
        return (self.axis,)

    def apply(self, value, read):
        return self.rotation.turn(value, self.axis, lambda name: read(FITTED + name), self.back)


class Compensate(TensorEdit):
    """What a reader loses with a direction v of its input, put back as far as the rest tells it: `W <- W + (W v) c^T`.

    Where the norm in front takes out `v (v^T n)`, and `v^T n` is about `c^T n + m`. Along `axis`, in runs of channels.

    Attributes:
        lost, told_by: names of the fitted v and c.
    """

    edit: Literal["compensate"] = "compensate"
    axis: int
    lost: str
    told_by: str

    def fitted(self):
        return self.lost, self.told_by

    def mixes(self):
        return (self.axis,)

    def apply(self, value, read):
        if value.is_meta:
            return value
        v, c = read(FITTED + self.lost), read(FITTED + self.told_by)
        split = value.unflatten(self.axis, (-1, len(v))).movedim(self.axis + 1, -1)
        return (split + (split @ v).unsqueeze(-1) * c).movedim(-1, self.axis + 1).flatten(self.axis, self.axis + 1)
