"""DTensors through the operators: rows may be sharded along any axis but the last, without communication.

Gains and biases are replicated; their gradients come out partial, one summand per shard. Statistics `(1 or 2, ...)` are
sharded one axis further right than x. Whatever comes otherwise (sharded along the last axis, partial) is redistributed.
"""

from __future__ import annotations

import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.placement_types import Placement

#: tensors of an operator, by the letters: X values `(..., width)`, S statistics, W parameters, G their gradients
_OPERATORS = {
    "norm": ("XS", "XWW"),
    "add_norm": ("XXS", "XXWW"),
    "norm_add": ("XS", "XXWW"),
    "norm_add_norm": ("XXSS", "XXWWWW"),
    "norm_backward": ("XGG", "XXSWWX"),
    "norm_add_norm_backward": ("XXGGGG", "XXXSSWWWWX"),
}


def _register(name: str, outputs: str, inputs: str) -> None:
    @register_sharding(getattr(torch.ops.normswap, name).default)
    def shardings(*arguments):
        tensors, how = arguments[: len(inputs)], arguments[len(inputs) :]
        numbers = [None] * len(how)
        partial = how[len(how) - outputs.count("G") :]  # a gradient that is not needed is empty

        def placed(axis: int | None) -> tuple[list[Placement], list[Placement | None]]:
            of = {"X": Replicate(), "S": Replicate(), "W": Replicate()}
            if axis is not None:
                of |= {"X": Shard(axis), "S": Shard(axis + 1)}
            gradients = iter([Partial() if needed and axis is not None else Replicate() for needed in partial])
            return (
                [next(gradients) if letter == "G" else of[letter] for letter in outputs],
                [None if tensor is None else of[letter] for letter, tensor in zip(inputs, tensors, strict=True)]
                + numbers,
            )

        return [placed(axis) for axis in (None, *range(len(arguments[0].shape) - 1))]


for _name, (_outputs, _inputs) in _OPERATORS.items():
    _register(_name, _outputs, _inputs)
