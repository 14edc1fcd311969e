"""What a file of `norms.kinds` says of its kind: the module that computes it, and how it is made of another kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from normswap.norms.spec import NormSpec

#: a norm's tensors by what they do: `gain` (as it is applied: of the form `1 + w`, one plus the weight), `bias`, and of
#: norms with running statistics `mean` and `variance`; what a norm does not have is missing
Tensors = Mapping[str, torch.Tensor]
Values = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Samples:
    """What one norm does to data.

    Attributes:
        x: what goes into it in the model as converted so far, `(rows, width)`.
        y: what the original norm gave for the same tokens, `(rows, width)`.
        normalised: what the new norm, without gain and bias, makes of x in the model, `(rows, width)`; where statistics
            are of several tokens, x alone does not tell. Of a norm whose class has no such step it is x.
        spec: the original norm.
        tensors: its own.
    """

    x: torch.Tensor
    y: torch.Tensor
    normalised: torch.Tensor
    spec: NormSpec
    tensors: Tensors


@dataclass(frozen=True)
class Rewrite:
    """Exactly, by changing all that writes to the stream and reads it: `name` of a rewrite in `planning.rewrites`."""

    name: str


@dataclass(frozen=True)
class Direct:
    """Exactly, from the norm's own tensors.

    Attributes:
        values: called with the norm's spec and its tensors; gives those of the new module, by name. What it leaves out
            is neutral.
        into: kind of module that is built, where it is not the kind itself.
    """

    values: Callable[[NormSpec, Tensors], Values]
    into: str | None = None


@dataclass(frozen=True)
class Fitted:
    """From data.

    Attributes:
        fit: gives the new module's tensors, by name.
        start: what it has before anything is fitted, as `Direct.values`.
        into: as for `Direct`.
        alone: `start` is fitted to data already, which running statistics remember: random inputs would spoil it.
        into_apart: kind of module that is built where `fit` gives tensors that the other does not have, for tokens that
            are far apart from all others; None: it never does.
        centred: the new norm takes each row's mean out as well.
        flat: called with the fitted tensors and `(rows, width)` inputs; tells at which of these the new norm is flat,
            its slope below a tenth of the largest. None: it is flat nowhere.
    """

    fit: Callable[[Samples], Values]
    start: Callable[[NormSpec, Tensors], Values]
    into: str | None = None
    alone: bool = False
    into_apart: str | None = None
    centred: bool = False
    flat: Callable[[Values, torch.Tensor], torch.Tensor] | None = None


Route = Rewrite | Direct | Fitted


@dataclass(frozen=True)
class Kind:
    """One kind of norm.

    Attributes:
        name: the word of `--norm`.
        module: built with the arguments of `norms.kinds.affine.Affine`. Its source alone goes into a converted
            checkpoint, so it uses torch alone.
        about: a line for those who choose.
        routes: by kind of the norm that is replaced, how this one is made of it. Without any, the kind is one that
            other rewrites put in, and cannot be asked for.
        exact: name of the kind that takes its place where only the same function will do, and for norms on no stream,
            which a rewrite of streams does not reach.
        opened: of a kind behind a gate, the kind that is left when the gate is open.
        by_eps: whether it is expressed by the norm that was there, with an eps that outweighs every variance: what is
            fitted has `weight`, `bias` and `scale`.
        inserted: of a kind that stands where there was no norm: called with its `normalised` x and x, each
            `(rows, width)`, and weights, `(rows,)`, gives the gain and bias with which it changes x least.
    """

    name: str
    module: type[nn.Module]
    about: str = ""
    routes: Mapping[str, Route] = field(default_factory=dict)
    exact: str | None = None
    opened: str | None = None
    by_eps: bool = False
    inserted: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Values] | None = None

    def builds(self, replaced: str) -> str:
        """The kind of module that stands where a norm of the kind `replaced` was."""
        return getattr(self.routes[replaced], "into", None) or self.name

    def forms(self, replaced: str) -> set[str]:
        """All kinds of module that may stand there, by what the data ask for."""
        return {self.builds(replaced)} | {getattr(self.routes[replaced], "into_apart", None)} - {None}
