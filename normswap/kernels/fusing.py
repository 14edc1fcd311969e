"""Residual sums fused with the norms beside them, by methods of the blocks' own source rewritten on a live model."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from torch import nn

from normswap.apply.rebuild import keep_whole
from normswap.errors import PlanError
from normswap.kernels.pairs import Pair, find_pairs
from normswap.norms.centred import rebased
from normswap.planning.edits import Rewrite
from normswap.source.classes import Rewritten, rewritten_classes
from normswap.understand.normmap import NormMap

PREFIX = "Fused"
METHODS = {"add-norm": "add_norm", "norm-add": "norm_add", "norm-add-norm": "norm_add_norm"}


@dataclass
class Fusing:
    """What `fuse` did.

    Attributes:
        pairs: every residual sum of the model.
        classes: by path, the class that a module has now.
        before: by path, the one that it had.
    """

    pairs: list[Pair]
    classes: dict[str, Rewritten] = field(default_factory=dict, repr=False)
    before: dict[str, type[nn.Module]] = field(default_factory=dict, repr=False)
    _after: dict[str, type[nn.Module]] = field(default_factory=dict, repr=False)
    _whole: dict[str, object] = field(default_factory=dict, repr=False)

    @property
    def fused(self) -> list[Pair]:
        return [pair for pair in self.pairs if pair.form is not None]

    @property
    def kept(self) -> list[Pair]:
        """The sums that stay as they are; each has its reason."""
        return [pair for pair in self.pairs if pair.form is None]

    def source(self) -> dict[str, str]:
        """The text of each new class, by its name."""
        return {rewritten.name: rewritten.text for rewritten in self.classes.values()}

    def restore(self, model: nn.Module) -> None:
        """Give every module its own class back.

        Raises:
            PlanError: one has another class than `fuse` gave it; the model is unchanged.
        """
        modules = {path: model.get_submodule(path) for path in self.before}
        for path, module in modules.items():
            if type(module) is not self._after[path]:
                raise PlanError(
                    f"{path}: expected a {self._after[path].__name__}, as fusing left it, found a "
                    f"{type(module).__name__}. Undo first what changed it since."
                )
        for path, module in modules.items():
            module.__class__ = self.before[path]
        for path, names in self._whole.items():
            module = model.get_submodule(path)
            vars(module).pop("_no_split_modules", None)
            if names is not None:
                module._no_split_modules = names


def fuse(model: nn.Module, normmap: NormMap, paths: Collection[str]) -> Fusing:
    """Let fused norms of a live model make the residual sums beside them, where that is proved to be the same.

    Args:
        model: whose blocks get new classes, in place; parameters and names stay.
        normmap: of it, made before any of its classes changed.
        paths: the norms that have `add_norm`, `norm_add` and `norm_add_norm`.

    Raises:
        PlanError: a norm lacks them, or the model is another than the map says; the model is unchanged.
    """
    for path in paths:
        if lacks := [name for name in METHODS.values() if not hasattr(model.get_submodule(path), name)]:
            raise PlanError(f"{path} ({type(model.get_submodule(path)).__name__}) has no {lacks[0]}: swap it first.")
    fusing = Fusing(find_pairs(normmap, paths))
    fusing.classes = rewritten_classes(model, _edits(fusing.fused), PREFIX, "residual sums made by norms")
    built = {path: rewritten.build() for path, rewritten in fusing.classes.items()}
    listed = {path: vars(m).get("_no_split_modules") for path, m in model.named_modules()}
    for path, cls in built.items():
        module = model.get_submodule(path)
        fusing.before[path] = type(module)
        module.__class__ = fusing._after[path] = rebased(type(module), cls)
    keep_whole(model)
    fusing._whole = {
        path: listed[path] for path, m in model.named_modules() if vars(m).get("_no_split_modules") is not listed[path]
    }
    return fusing


def _edits(pairs: list[Pair]) -> list[Rewrite]:
    """One for each method of a module."""
    changes: dict[tuple[str, str, str], list] = {}
    for pair in pairs:
        changes.setdefault((pair.module, pair.name, pair.digest), []).extend(pair.changes)
    return [
        Rewrite(module=module, method=method, changes=tuple(made), digest=digest)
        for (module, method, digest), made in changes.items()
    ]
