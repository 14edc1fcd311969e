"""Residual sums made by the norms beside them, in eager mode: blocks of a live model with some source changed."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from normswap.errors import KernelError
from normswap.kernels.fused import FusedNorm
from normswap.kernels.pairs import Pair
from normswap.norms.centred import plain_class, rebased
from normswap.planning.edits import Change, Rewrite
from normswap.source.classes import Rewritten, rewritten_classes

# in the namespace of a class that `fuse` made, what it was made of
_MADE = "_made_by_fusing"


@dataclass
class Fusing:
    """What `fuse` did.

    Attributes:
        pairs: every residual sum of the model.
        classes: by path of a module, the class that it has now.
    """

    pairs: list[Pair]
    classes: dict[str, Rewritten] = field(repr=False)

    @property
    def fused(self) -> list[Pair]:
        return [pair for pair in self.pairs if pair.form is not None]

    @property
    def kept(self) -> list[Pair]:
        """The sums that stay as they are; each has its reason."""
        return [pair for pair in self.pairs if pair.form is None]

    def source(self) -> dict[str, str]:
        """The text of each new class, by its name there."""
        return {rewritten.name: rewritten.text for rewritten in self.classes.values()}


def fuse(model: nn.Module, pairs: list[Pair]) -> Fusing:
    """Let fused norms of a live model make the residual sums beside them, where that is proved to be the same.

    `unfuse` undoes it.

    Args:
        model: whose blocks get new classes, in place; parameters and names stay.
        pairs: of it, found before any of its classes changed.

    Raises:
        KernelError: a norm of one is no fused norm; the model is unchanged.
    """
    fused = [pair for pair in pairs if pair.form is not None]
    for path in (path for pair in fused for path in pair.norms):
        if not isinstance(module := model.get_submodule(path), FusedNorm):
            raise KernelError(f"{path}: expected a fused norm, found a {type(module).__name__}; use_kernels makes one.")
    classes = rewritten(model, pairs)
    for path, cls in [(path, _built(made)) for path, made in classes.items()]:
        module = model.get_submodule(path)
        module.__class__ = rebased(type(module), cls)
    return Fusing(pairs, classes)


def rewritten(model: nn.Module, pairs: list[Pair]) -> dict[str, Rewritten]:
    """By path of a block, the class that makes its sums as `pairs` say."""
    edits = _edits([pair for pair in pairs if pair.form is not None])
    return rewritten_classes(model, edits, "Fused", about="residual sums made by norms", disguised=True)


def unfuse(model: nn.Module) -> list[str]:
    """Give every block of a model its own class back. Returns the paths of those that `fuse` changed.

    Raises:
        KernelError: something else has changed the class of a block since (`fully_shard`); the model is unchanged.
    """
    fused = [(path, m) for path, m in model.named_modules() if hasattr(type(m), _MADE)]
    for path, module in fused:
        if _MADE not in vars(plain_class(type(module))):
            raise KernelError(
                f"{path} has become a {type(module).__name__} since its sums were fused: expected the class that it "
                "got. Restore kernels before what wraps blocks one by one (fully_shard)."
            )
    for _, module in fused:
        module.__class__ = rebased(type(module), getattr(type(module), _MADE).base)
    return [path for path, _ in fused]


def _edits(pairs: list[Pair]) -> list[Rewrite]:
    """One for each method of a module."""
    changes: dict[tuple[str, str, str], list[Change]] = {}
    for pair in pairs:
        changes.setdefault((pair.module, pair.name, pair.digest), []).extend(pair.changes)
    return [
        Rewrite(module=module, method=method, changes=tuple(made), digest=digest)
        for (module, method, digest), made in changes.items()
    ]


def _built(made: Rewritten) -> type[nn.Module]:
    cls = made.build()
    setattr(cls, _MADE, made)
    cls.__reduce_ex__ = _reduced
    return cls


def _reduced(module: nn.Module, protocol: int) -> tuple | str:
    """How a block is pickled: no file has its class."""
    if _MADE not in vars(type(module)):  # a class made of it
        return object.__reduce_ex__(module, protocol)
    return _empty, (getattr(type(module), _MADE),), vars(module)


def _empty(made: Rewritten) -> nn.Module:
    cls = _built(made)
    return cls.__new__(cls)
