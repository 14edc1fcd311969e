"""Gains and biases of norms moved into the weights beside them."""

from __future__ import annotations

from typing import Literal

import torch

from normswap.norms.spec import GainForm
from normswap.pages import apart
from normswap.planning.edits.edit import Read, TensorEdit, along
from normswap.planning.edits.running import Frozen


class FoldGain(TensorEdit):
    """A scale per channel moved into its neighbour: `W <- W diag(g)` along the `axis` that meets it.

    The gain of a norm moves into what reads it, the scale of a branch into what writes it. Of a batch norm, which is an
    affine map as it runs, g is the whole scale.

    The axis may meet several vectors side by side (patches that are merged): then it holds `runs` runs of channels.
    """

    edit: Literal["fold_gain"] = "fold_gain"
    axis: int
    weight: str | Frozen
    form: GainForm
    runs: int = 1

    def reads(self):
        return self.weight.reads() if isinstance(self.weight, Frozen) else (self.weight,)

    def mixes(self):
        return (self.axis,)

    def gain(self, read: Read) -> torch.Tensor:
        """The scale, one value per channel."""
        if isinstance(self.weight, Frozen):
            return self.weight.scale(read)
        weight = read(self.weight)
        return 1 + weight if self.form == "1 + w" else weight

    def apply(self, value, read):
        return value * along(self.gain(read), self.runs, self.axis, value.ndim)


class FoldBias(TensorEdit):
    """A norm's bias moved into a reader's: `c <- c + W b`, with `W` as it was before any gain was folded.

    `W b` is W times b along `axis`, summed over the axes `sums`: by default that one, for a convolution its kernel too.
    `runs` as for the gain. Of a batch norm b is all that it adds.
    """

    edit: Literal["fold_bias"] = "fold_bias"
    reader: str
    axis: int
    bias: str | Frozen
    sums: tuple[int, ...] | None = None
    runs: int = 1

    def reads(self):
        return (self.reader, *(self.bias.reads() if isinstance(self.bias, Frozen) else (self.bias,)))

    def carried(self, read: Read) -> torch.Tensor:
        """`W b`."""
        return read.once(self, lambda: self._carried(read))

    def _carried(self, read: Read) -> torch.Tensor:
        sums = self.sums or (self.axis,)
        kernel = [axis for axis in sums if axis != self.axis]
        bias = self.bias.shift(read) if isinstance(self.bias, Frozen) else read(self.bias)
        bias, parts, start = bias.flatten().repeat(self.runs), [], 0
        for reader in read.in_parts(self.reader):
            own = bias[start : start + len(reader)] if self.axis == 0 else bias
            start += len(reader)
            reader = reader.sum(kernel, keepdim=True) if kernel else reader
            carried = torch.tensordot(reader, own, dims=([self.axis], [0]))
            carried = carried.reshape([n for axis, n in enumerate(reader.shape) if axis not in sums])
            parts.append(carried if carried.is_meta else apart(carried, torch.float64))
        if self.axis == 0 and start != len(bias):
            raise ValueError(f"expected a bias of {start} values, found {len(bias)}")
        return torch.stack(parts).sum(0) if 0 in sums else torch.cat(parts)

    def apply(self, value, read):
        carried = self.carried(read)
        return carried if value is None else value + carried
