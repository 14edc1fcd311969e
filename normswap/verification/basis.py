"""What a conversion has put into another basis, so that it is compared turned back, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from normswap.planning.plans import Plan

#: of rows in one basis, the rows in another
Turn = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class OtherBasis:
    """Of a model whose streams are rotated.

    Attributes:
        sites: per norm on such a stream, what turns rows `(.., width)` of its input or output to the original's basis.
        hidden: norms on such a stream whose rotation is not at hand (it was fitted, and is not stored with the model).
        outputs: names of inner values that the model gives out besides its result, in the new basis.
    """

    sites: Mapping[str, Turn] = field(default_factory=dict)
    hidden: frozenset[str] = frozenset()
    outputs: frozenset[str] = frozenset()

    @classmethod
    def of(cls, plan: Plan | None) -> OtherBasis:
        if plan is None:
            return cls()
        paths = {path for stream in plan.rotated for path in stream.sites}
        sites = plan.turned_back()
        outputs = frozenset(name for stream in plan.rotated for name in stream.outputs)
        return cls(sites, frozenset(paths - sites.keys()), outputs)
