"""A plan applied to a live model, in place.

Structure comes first (norms swapped, methods rewritten, aliases untied), then values. Before either, the whole plan
runs once on a copy of the model that has shapes and no storage, so that a plan that does not fit raises while the model
is still untouched.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter

import torch
from torch import nn
from transformers import PreTrainedModel

from normswap.apply.modules import ModuleEdits
from normswap.errors import PlanError
from normswap.kernels.fused import FusedNorm
from normswap.planning.edits import FITTED, Initialise, SetEps, TensorEdit, Untie
from normswap.planning.plans import Plan
from normswap.understand.eps_keys import owner_of

Tensors = dict[str, torch.Tensor]


def apply_plan(model: nn.Module, plan: Plan) -> nn.Module:
    """Apply every edit of `plan` to `model` in place, and return it.

    Each tensor's edits act in order in float64 on the CPU, whatever the model's device, and are rounded once to the
    parameter's dtype: the weights are those of the streamed conversion, bit for bit. Parameters keep their identity
    where the structure allows it, and `requires_grad`. Extra memory: one tensor in float64, and the parameters of norms
    that are replaced, until the end.

    Raises:
        PlanError: the plan does not fit; the model is unchanged.
    """
    plan.check_complete()
    offloaded = [name for name in plan.tensor_edits() if getattr(model.state_dict().get(name), "is_meta", False)]
    if offloaded:
        raise PlanError(
            f"{offloaded[0]} is to be edited, but it has no values here (meta device, or offloaded). "
            "Load the model without offloading, or use apply_structure for the structure alone."
        )
    _apply(without_storage(model), plan)
    _apply(model, plan)
    return model


def apply_structure(model: nn.Module, plan: Plan) -> None:
    """Do the module edits, unties and config edits of `plan` on `model` in place; values stay as they are.

    Works on a freshly built model on any device, the meta device included.

    Raises:
        PlanError: a module is missing or is not what the plan was made for; the model is unchanged.
        RefusedError: the source of a method that is to be rewritten cannot be had; the model is unchanged.
    """
    if type(model).__name__ != plan.architecture:
        raise PlanError(
            f"the plan was made for {plan.architecture}, but the model is a {type(model).__name__}; "
            "make a plan for this model, or load the one it was made for."
        )
    if fused := next((path for path, module in model.named_modules() if isinstance(module, FusedNorm)), None):
        raise PlanError(f"{fused} is computed by a kernel, made for the norm as it was: call restore_kernels first.")
    unties = [edit for edit in plan.edits if isinstance(edit, Untie)]
    dropped = {edit.tensor for edit in plan.edits if isinstance(edit, TensorEdit) and edit.edit == "drop"}
    modules = ModuleEdits(model, plan.module_edits(), dropped)
    attributes = _eps_attributes(model, plan)
    config_changes = [(_config(model, edit.key), edit.value) for edit in plan.config_edits()]
    owners = _tying_submodels(model, unties)

    modules.run()
    for edit in unties:
        _untie(model, edit)
    for owner in owners:
        owner.config.tie_word_embeddings = False
    for owner, name, value in (*attributes, *((*owner, value) for owner, value in config_changes)):
        setattr(owner, name, value)


def _tying_submodels(model: nn.Module, unties: list[Untie]) -> list[PreTrainedModel]:
    """The (sub)models whose configuration ties what `unties` takes apart: that flag has to go, or a reload ties again.

    Raises PlanError where a tensor does not exist, or where the flag also ties tensors that the plan leaves tied.
    """
    tensors = model.state_dict(keep_vars=True)
    for edit in unties:
        for name in (edit.tensor, edit.source):
            if name not in tensors:
                raise PlanError(f"cannot untie {edit.tensor} from {edit.source}: the model has no tensor {name}.")
    # either name of a pair may be the one that transformers calls tied to the other
    untied = {name for edit in unties for name in (edit.tensor, edit.source)}
    owners = []
    for path, submodel in _submodels(model):
        tied = {_join(path, name) for name in submodel.get_expanded_tied_weights_keys(all_submodels=False)}
        if not tied & untied:
            continue
        if tied - untied:
            raise PlanError(
                f"the plan unties {', '.join(sorted(tied & untied))} but leaves {', '.join(sorted(tied - untied))} "
                f"tied: one flag (tie_word_embeddings of {path or 'the model'}) ties them all. Untie all or none."
            )
        owners.append(submodel)
    return owners


def _untie(model: nn.Module, edit: Untie) -> None:
    tensors = model.state_dict(keep_vars=True)
    alias, source = tensors[edit.tensor], tensors[edit.source]
    if alias is source:
        path, _, name = edit.tensor.rpartition(".")
        own = nn.Parameter(source.detach().clone(), requires_grad=source.requires_grad)
        model.get_submodule(path).register_parameter(name, own)
    # every submodel keeps its own list of what is tied below it, made when it was built
    for path, submodel in _submodels(model):
        for name in list(submodel.all_tied_weights_keys):
            if _join(path, name) in (edit.tensor, edit.source):
                del submodel.all_tied_weights_keys[name]


def _apply(model: nn.Module, plan: Plan) -> None:
    """Structure, then values. Originals are never copied: a tensor is written only after all that read it."""
    before: Tensors = model.state_dict(keep_vars=True)
    apply_structure(model, plan)
    after: Tensors = model.state_dict(keep_vars=True)
    edits = plan.tensor_edits()
    _check_names(edits, before, after)

    read = plan.reading(lambda name: _float64(before[name]))

    for names in _readers_first(edits):
        made = {}
        for name in names:
            # what the new structure has brought begins neutral
            tensor = before.get(name, after.get(name))
            made[name] = None if tensor is None else _float64(tensor)
            for edit in edits[name]:
                made[name] = _run(edit, made[name], read)
        for name, value in made.items():
            _write(model, name, value, after.get(name))


def _check_names(edits: dict[str, list[TensorEdit]], before: Tensors, after: Tensors) -> None:
    owner: dict[int, str] = {}
    for name, steps in edits.items():
        if name not in before and name not in after:
            raise PlanError(f"{steps[0].edit} of {name}: the model has no such tensor. Make a plan for this model.")
        for step in steps:
            for other in step.reads():
                if other not in before and not other.startswith(FITTED):
                    raise PlanError(f"{step.edit} of {name} reads {other}, which the model does not have.")
        if name in after and (other := owner.setdefault(id(after[name]), name)) != name:
            raise PlanError(f"{name} and {other} are one tied tensor, and the plan edits both; untie them first.")


def _run(edit: TensorEdit, value: torch.Tensor | None, read) -> torch.Tensor | None:
    try:
        return edit.apply(value, read)
    except (RuntimeError, IndexError, TypeError, AttributeError) as error:
        found = "no value yet" if value is None else f"shape {tuple(value.shape)}"
        raise PlanError(f"{edit.edit} does not fit {edit.tensor}, found with {found}: {error}") from error


def _write(model: nn.Module, name: str, value: torch.Tensor | None, target: torch.Tensor | None) -> None:
    path, _, leaf = name.rpartition(".")
    if value is None:
        if target is not None:
            # the name stays registered as None, which norms and linear layers read as "without"
            setattr(model.get_submodule(path), leaf, None)
    elif target is None:
        raise PlanError(f"{name} is given a value, but the new structure has no such tensor.")
    elif value.shape != target.shape:
        raise PlanError(f"{name}: the edits give shape {tuple(value.shape)}, the model has {tuple(target.shape)}.")
    else:
        target.data.copy_(value)


def _readers_first(edits: dict[str, list[TensorEdit]]) -> Iterator[list[str]]:
    """The edited tensors, each before those it reads, so that they still have their original values then.

    A norm's tensors, all of which may be made of all of them, come together.
    """
    norms = {name: step.module for name, steps in edits.items() for step in steps if isinstance(step, Initialise)}
    together: dict[str, list[str]] = {}
    for name in edits:
        together.setdefault(norms.get(name, name), []).append(name)
    order = TopologicalSorter({first: () for first in together})
    for first, names in together.items():
        read = {other for name in names for step in edits[name] for other in step.reads()} & edits.keys()
        for other in {norms.get(other, other) for other in read} - {first}:
            order.add(other, first)
    try:
        yield from [together[first] for first in order.static_order()]
    except CycleError as error:
        raise PlanError(f"edits read each other's tensors in a circle: {' -> '.join(error.args[1])}") from error


def _float64(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in float64, on the CPU so that every device gives the same bits (some have no float64 at all)."""
    return tensor.detach().to("meta" if tensor.is_meta else "cpu", torch.float64, copy=True)


def without_storage(model: nn.Module) -> nn.Module:
    """A copy of `model` whose tensors have shape and dtype but no values; ties are kept."""
    memo: dict[int, torch.Tensor] = {}
    for tensor in model.state_dict(keep_vars=True).values():
        empty = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
    return copy.deepcopy(model, memo)


def _config(model: nn.Module, key: str) -> tuple[object, str]:
    """The configuration object that holds `key` (dots lead into nested ones), and its name there."""
    try:
        return owner_of(model.config, key)
    except AttributeError as error:
        holder = type(error.obj).__name__
        raise PlanError(f"the plan sets {key}, but {holder} has no {error.name}.") from error


def _eps_attributes(model: nn.Module, plan: Plan) -> list[tuple[nn.Module, str, float]]:
    """The attributes of norms that take another eps: which module, by what name, and what they become."""
    found = [
        (edit, path, name) for edit in plan.config_edits() if isinstance(edit, SetEps) for path, name in edit.modules
    ]
    modules = dict(model.named_modules())
    for edit, path, name in found:
        if not isinstance(getattr(modules.get(path), name, None), float):
            raise PlanError(f"{path}.{name} was to become {edit.value:g}, and there is no such number in the model.")
    return [(modules[path], name, edit.value) for edit, path, name in found]


def _submodels(model: nn.Module) -> list[tuple[str, PreTrainedModel]]:
    return [(path, module) for path, module in model.named_modules() if isinstance(module, PreTrainedModel)]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
