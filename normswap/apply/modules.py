"""Module edits, one by one: what each expects of a model, and what it does to it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from normswap.apply.calls import check_calls
from normswap.apply.rebuild import keep_whole, put_norm
from normswap.errors import PlanError
from normswap.norms.centred import centre_input, centre_output, rebased
from normswap.norms.normed import norm_output
from normswap.planning.edits import (
    AddNorm,
    CentreInput,
    CentreOutput,
    GrowBias,
    ModuleEdit,
    NormOutput,
    Rewrite,
    SetScale,
    SwapNorm,
)
from normswap.source.classes import Rewritten, rewritten_classes


class ModuleEdits:
    """The module edits of a plan, checked against `model` and ready to be done.

    Args:
        dropped: tensors that the plan removes.

    Raises:
        PlanError: a module is missing or is not what the plan was made for.
        RefusedError: the source of a method that is to be rewritten cannot be had.
    """

    def __init__(self, model: nn.Module, edits: Sequence[ModuleEdit], dropped: set[str]):
        self.model, self.edits = model, edits
        self.norms: dict[str, nn.Module] = {}
        for edit in edits:
            self._check(edit, dropped)
        check_calls(model, edits)
        rewrites = [edit for edit in edits if isinstance(edit, Rewrite)]
        self.classes: dict[str, Rewritten] = rewritten_classes(model, rewrites)

    def run(self) -> None:
        for path, rewritten in self.classes.items():
            module = self.model.get_submodule(path)
            module.__class__ = rebased(type(module), rewritten.build())
        for edit in self.edits:
            self._do(edit)
        if self.classes:
            keep_whole(self.model)

    def _check(self, edit: ModuleEdit, dropped: set[str]) -> None:
        if isinstance(edit, AddNorm):
            parent, _, name = edit.module.rpartition(".")
            if hasattr(_module(self.model, parent), name):
                raise PlanError(f"{edit.module} was to be added as a norm, but {parent or 'the model'} has it already.")
            self.norms[edit.module] = _added(self.model, parent, edit)
            return
        module = _module(self.model, edit.module)
        if isinstance(edit, SwapNorm):
            self.norms[edit.module] = _swapped(self.model, module, edit, dropped)
        elif isinstance(edit, GrowBias):
            _check_grows(module, edit)
        elif isinstance(edit, SetScale):
            if hasattr(module, edit.name):
                raise PlanError(
                    f"{edit.module}.{edit.name} was to be set to a number, but {type(module).__name__} has it already: "
                    "its norms have moved before. Start from the model that it was made from."
                )
        elif not isinstance(edit, CentreOutput | CentreInput | NormOutput | Rewrite):
            raise PlanError(f"the edit {edit.edit!r} of {edit.module} is not known here; update normswap.")

    def _do(self, edit: ModuleEdit) -> None:
        if isinstance(edit, AddNorm):
            parent, _, name = edit.module.rpartition(".")
            self.model.get_submodule(parent).add_module(name, self.norms[edit.module])
        elif isinstance(edit, SwapNorm):
            put_norm(self.model, edit.module, self.norms[edit.module])
        elif isinstance(edit, CentreOutput):
            centre_output(self.model.get_submodule(edit.module), edit.axis)
        elif isinstance(edit, CentreInput):
            centre_input(self.model.get_submodule(edit.module), edit.axis)
        elif isinstance(edit, SetScale):
            setattr(self.model.get_submodule(edit.module), edit.name, edit.value)
        elif isinstance(edit, NormOutput):
            norm_output(self.model.get_submodule(edit.module), {name: run for name, *run in edit.runs})
        elif isinstance(edit, GrowBias):
            module = self.model.get_submodule(edit.module)
            like = _like(self.model, edit.module)
            module.bias = nn.Parameter(torch.zeros(edit.size, dtype=like.dtype, device=like.device))


def _new(edit: SwapNorm, device: torch.device) -> nn.Module:
    with torch.device(device):
        return edit.build()


def _added(model: nn.Module, parent: str, edit: AddNorm) -> nn.Module:
    like = _like(model, parent)
    return _new(edit, like.device).to(like.dtype).train(model.get_submodule(parent).training)


def _swapped(model: nn.Module, old: nn.Module, edit: SwapNorm, dropped: set[str]) -> nn.Module:
    """What `edit` makes of `old`: parameters that stay are the same objects, others start neutral."""
    theirs = dict(old.named_parameters())
    own = (t for t in (*theirs.values(), *old.buffers()) if t.is_floating_point())
    like = next(own, None)
    like = _like(model, edit.module.rpartition(".")[0]) if like is None else like
    new = _new(edit, like.device).to(like.dtype)
    for name in dict(new.named_parameters()):
        if name not in theirs:
            continue
        if theirs[name].shape != (expected := edit.shape or (edit.width,)):
            raise PlanError(
                f"{edit.module}.{name}: expected shape {expected}, found {tuple(theirs[name].shape)}; "
                "the plan was made for a model of another size."
            )
        setattr(new, name, theirs.pop(name))
    lost = [f"{edit.module}.{name}" for name in theirs if f"{edit.module}.{name}" not in dropped]
    if lost:
        raise PlanError(
            f"swapping {edit.module} ({type(old).__name__}) would lose {', '.join(lost)}: "
            "the plan neither keeps nor drops it. Make a plan for this model."
        )
    return new.train(old.training)


def _like(model: nn.Module, path: str) -> torch.Tensor:
    """The parameter that says where a new one at `path` lies and in which precision: the nearest real one."""
    parts = path.split(".") if path else []
    for depth in range(len(parts), -1, -1):
        module = model.get_submodule(".".join(parts[:depth]))
        # the weight of a layer, or else whatever its parts have
        for parameter in module.parameters():
            if parameter.is_floating_point() and parameter.dtype.itemsize > 1:
                return parameter
    raise PlanError(f"{path or 'the model'}: expected a parameter beside which a new one can stand, found none.")


def _check_grows(module: nn.Module, edit: GrowBias) -> None:
    if "bias" not in module._parameters:
        raise PlanError(f"{edit.module} ({type(module).__name__}) has no place for a bias; expected one that is None.")
    if module.bias is not None:
        raise PlanError(f"{edit.module} was to be given a bias of size {edit.size}, but has one already.")


def _module(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise PlanError(f"the plan edits the module {path}, which the model does not have: {error}") from error
