"""RepBN after training: its statistics measured once more, then the norm folded away.

normswap.reestimate(model, batches)    # running statistics as evaluation will meet them
normswap.fold_repbn(model)             # what is left computes the same, without any norm
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from normswap.apply.live import apply_plan
from normswap.calibration.taps import Tap, rows, watch
from normswap.drafting import draft
from normswap.errors import RefusedError
from normswap.norms.kinds.affine import Affine
from normswap.norms.kinds.layer_norm import LayerNorm
from normswap.planning.edits import AnyEdit, Drop, Initialise, ModuleEdit, Refit, SetConfig, SwapNorm
from normswap.planning.plans import Plan
from normswap.planning.request import Request


@torch.no_grad()
def reestimate(model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Set the running statistics of every RepBN to those of what reaches it on `batches`, padding left out.

    Norms are treated in the order in which they run, each behind those before it as evaluation has them, so that
    afterwards each normalises these tokens exactly. One pass to each norm, of which the last is a whole one.

    Args:
        batches: keyword arguments of `forward`.

    Returns:
        By path, how many tokens each was measured on.

    Raises:
        RefusedError: the model has no RepBN, or one that the batches do not reach.
    """
    training = {module: module.training for module in model.modules()}
    model.eval()
    measured = {}
    try:
        for path in _in_order(model, batches[0]):
            norm, tap = model.get_submodule(path), Tap(path, "input")
            seen = [(watch(model, [tap], inputs).get(tap), inputs) for inputs in batches]
            x = [rows(value.movedim(norm.axis, -1), inputs).double() for value, inputs in seen if value is not None]
            count = sum(len(part) for part in x)
            if not count:
                raise RefusedError(f"{path}: nothing of the batches reaches it. Give batches that do.")
            mean = sum(part.sum(0) for part in x) / count
            norm.bn_mean.copy_(mean)
            norm.bn_var.copy_(sum((part - mean).square().sum(0) for part in x) / count)
            measured[path] = count
    finally:
        for module, mode in training.items():
            module.training = mode
    return measured


def fold_repbn(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> dict[str, bool]:
    """Fold every RepBN away, in place: into the linear maps that read it; where those are shared, a gain and bias stay.

    With a and c its slope and shift, `W (a x + c) = (W diag(a)) x + W c`: in evaluation the model computes what it did.

    Args:
        inputs: keyword arguments of `forward` for one small batch; a model of transformers needs none.

    Returns:
        By path, whether nothing at all is left there; elsewhere a gain and a bias stay.

    Raises:
        RefusedError: the model has no RepBN, or one whose ramp is not at 0, which is no affine map.
    """
    gone, norms, _ = _fold(model, inputs)
    return {path: path in gone for path in norms}


def folded_plan(plan: Plan, model: nn.Module, inputs: Mapping[str, Any] | None = None) -> Plan:
    """`fold_repbn`, and the plan of what is left of a model that `plan` made: its structure, without any RepBN."""
    gone, norms, edits = _fold(model, inputs)
    kept: list[AnyEdit] = []
    for edit in plan.edits:
        if isinstance(edit, Refit) and edit.tensor.rpartition(".")[0] in norms:
            continue
        if isinstance(edit, Initialise) and edit.module in norms:
            # a tensor of the source that nothing is left of
            if edit.module in gone and edit.tensor in edit.reads():
                kept.append(Drop(tensor=edit.tensor))
            continue
        if isinstance(edit, SwapNorm) and edit.module in norms:
            left = {"kind": "identity", "gain": None, "bias": False}
            left = left if edit.module in gone else {"kind": "affine", "gain": "w", "bias": True}
            edit = edit.model_copy(update=left)
        kept.append(edit)
    structure = [edit for edit in edits if isinstance(edit, ModuleEdit | SetConfig)]
    return plan.model_copy(update={"edits": (*kept, *structure)})


def _fold(
    model: nn.Module, inputs: Mapping[str, Any] | None
) -> tuple[set[str], dict[str, nn.Module], tuple[AnyEdit, ...]]:
    """Paths where nothing is left, the RepBNs that were there, and the edits that folded them."""
    norms = {path: model.get_submodule(path) for path in _paths(model)}
    on = [path for path, norm in norms.items() if bool(norm.ramp != 0)]
    if on:
        raise RefusedError(
            f"{on[0]} is on its ramp at {float(norms[on[0]].ramp):g}: expected 0, where it is an affine map. Train the "
            f"ramp down, or set it to 0, and measure."
        )
    affine = {path: _affine(norm) for path, norm in norms.items()}
    # a LayerNorm with this gain and bias has the same readers, and folds into them in the same way
    for path, norm in norms.items():
        stand_in = LayerNorm(norm.width, gain="w", bias=True, casting=norm.casting, axis=norm.axis)
        stand_in.weight, stand_in.bias = affine[path].weight, affine[path].bias
        model.set_submodule(path, stand_in.to(norm.bn_weight.device).train(norm.training))
    try:
        plan = draft(model, Request(fold=True, partial=True), inputs)
        edits = tuple(edit for edit in plan.edits if getattr(edit, "module", None) not in norms)
        apply_plan(model, plan.model_copy(update={"edits": edits}))
        gone = set(plan.converted)
    except RefusedError:
        gone, edits = set(), ()
    except BaseException:
        for path, norm in norms.items():
            model.set_submodule(path, norm)
        raise
    for path, rest in affine.items():
        model.set_submodule(path, nn.Identity() if path in gone else rest)
    return gone, norms, edits


def _affine(norm: nn.Module) -> Affine:
    slope, shift = norm.affine()
    rest = Affine(norm.width, gain="w", bias=True, casting=norm.casting, axis=norm.axis)
    rest.weight, rest.bias = nn.Parameter(slope.detach()), nn.Parameter(shift.detach())
    return rest.train(norm.training)


def has_repbn(model: nn.Module) -> bool:
    return bool(_found(model))


def _found(model: nn.Module) -> list[str]:
    """Paths of all RepBNs. They are known by what they have: a folder's own modelling file has a class of its own."""
    return [path for path, module in model.named_modules() if hasattr(module, "bn_var") and hasattr(module, "eta")]


def _paths(model: nn.Module) -> list[str]:
    if not (found := _found(model)):
        raise RefusedError(f"{type(model).__name__} has no RepBN. Put them in with --norm repbn.")
    return found


def _in_order(model: nn.Module, inputs: Mapping[str, Any]) -> list[str]:
    """The same in the order in which they run; those that do not run come last."""
    order: dict[str, None] = {}
    paths = _paths(model)
    handles = [
        model.get_submodule(path).register_forward_pre_hook(lambda module, args, path=path: order.setdefault(path))
        for path in paths
    ]
    try:
        watch(model, [Tap("", "output")], inputs)
    finally:
        for handle in handles:
            handle.remove()
    return [*order, *(path for path in paths if path not in order)]
