"""Checkpoints whose models read their weights from disk as they run, or that are loaded where they are small.

A small model is loaded by transformers, as anyone would. A large one runs in memory that does not grow with it
(`verification.streamed`): its class, modules, keys and dtypes are those that transformers finds when it loads the
folder, which it does without reading a weight; the weights are read where they are used.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from normswap.apply.layout import lay_out
from normswap.apply.live import apply_structure
from normswap.apply.values import Values
from normswap.checkpoint.files import Checkpoint
from normswap.checkpoint.keymap import KeyMap
from normswap.checkpoint.source import Source
from normswap.errors import VerificationError
from normswap.observe.run import make_eager
from normswap.planning.plans import Plan
from normswap.verification.checks import WRONG_FILES
from normswap.verification.loaded import coarsest_dtype, open_model
from normswap.verification.streamed import SMALL, Held, placeholder, read_on_use
from normswap.verification.weights import Planned, Stored, Weights

#: models with more parameters than this are not loaded: 64 MiB in float64
IN_MEMORY = 2**23
# What is compared at once of two files' tensors.
_VALUES_AT_ONCE = 2**22


class Loaded:
    """A checkpoint's model in memory.

    Attributes:
        like: the model.
    """

    on_disk = False

    def __init__(self, like: PreTrainedModel):
        self.like = like

    def model(self, run: torch.dtype) -> PreTrainedModel:
        """The model itself, computing in `run` from now on."""
        return self.like.to(run)


class FromDisk:
    """A checkpoint whose models read their weights as they run.

    Attributes:
        like: its model without values, as transformers loads it on the meta device.
        stored: its weights.
    """

    on_disk = True

    def __init__(self, like: PreTrainedModel, folder: Path, opened: ExitStack):
        self.like = like
        self._checkpoint = opened.enter_context(Checkpoint.open(folder))
        self._keymap = KeyMap.build(like, self._checkpoint)
        self.stored = Stored(self._checkpoint, self._keymap)

    def planned(self, plan: Plan) -> Planned:
        """What `plan` makes of its weights."""
        layout = lay_out(self._checkpoint, self._keymap, plan, None)
        return Planned(Values(self._checkpoint, self._keymap, plan), layout, self.stored)

    def model(self, run: torch.dtype, weights: Weights | None = None, plan: Plan | None = None) -> PreTrainedModel:
        """A model that reads its weights as it runs, computing in `run`.

        Args:
            weights: what it reads; None: those stored, in the dtypes that transformers would load them in.
            plan: changes its modules, after it was built.
        """
        return reading(self.like, run, weights or self.stored, plan=plan, as_loaded=weights is None)

    def check(self, planned: Planned) -> int:
        """The files hold what `planned` says, rounded once; how many tensors that are. Raises VerificationError."""
        names = [*_by_tensor(self.like).values()]
        wrong = [own[0] for own in names if not _same(planned, self.stored, own)]
        if wrong:
            raise VerificationError(WRONG_FILES.format(len(wrong), wrong[0]))
        return len(names)


def open_either(source: Source, opened: ExitStack, *, in_memory: bool = False) -> Loaded | FromDisk:
    """Open `source`, its files until `opened` is closed; a large one `in_memory` as well, if that is asked for."""
    if in_memory or not is_large(source):
        return Loaded(open_model(source))
    return FromDisk(open_model(source, device_map="meta"), source.folder, opened)


def is_large(source: Source) -> bool:
    """Whether a checkpoint is better read as it runs, and can be: its files hold all of the model."""
    with Checkpoint.open(source.folder) as checkpoint:
        if sum(math.prod(info.shape) for info in checkpoint.tensors.values()) <= IN_MEMORY:
            return False
        structure = source.build()
        keymap = KeyMap.build(structure, checkpoint)
        return all(keymap.stored_group(name) is not None for name in structure.state_dict())


def _same(planned: Planned, stored: Stored, names: tuple[str, ...]) -> bool:
    """Whether a tensor of the published folder is what the plan makes, rounded once."""
    whole = None
    for part in planned.parts(planned.name_of(names), _VALUES_AT_ONCE):
        if part.axis == 0 and part.range:
            have = stored.read(names[0], part.range)
        else:
            whole = stored.read(names[0]) if whole is None else whole
            have = whole.narrow(part.axis, part.range.start, len(part.range)) if part.range else whole
        if not torch.equal(part.values.to(have.dtype), have):
            return False
    return True


def reading(
    like: PreTrainedModel, run: torch.dtype, weights: Weights, *, plan: Plan | None = None, as_loaded: bool = False
) -> PreTrainedModel:
    """A model that reads its weights as it runs.

    Args:
        like: one of its class without values, with the dtypes that transformers loads its weights in.
        run: what it computes in.
        weights: where they are read.
        plan: changes its modules, after it was built.
        as_loaded: cut weights to the dtypes of `like` first.
    """
    model = _built(type(like), like.config, coarsest_dtype(like))
    if plan is not None:
        apply_structure(model, plan)
    make_eager(model.eval())
    dtypes = {name: tensor.dtype for name, tensor in like.state_dict().items()} if as_loaded else {}
    held: dict[int, Held] = {}
    tensors = model.state_dict(keep_vars=True)
    for names in _by_tensor(model).values():
        name = weights.name_of(names)
        tensor = tensors[names[0]]
        through = dtypes.get(names[0])
        if isinstance(tensor, nn.Parameter) and tensor.numel() > SMALL:
            own = placeholder(tuple(tensor.shape), run)
            held[id(own)] = Held(weights, name, through)
        else:
            value = weights.read(name)
            value = value if through is None else value.to(through)
            own = value.to(run) if value.is_floating_point() else value.clone()
            own = nn.Parameter(own, requires_grad=False) if isinstance(tensor, nn.Parameter) else own
        for path in names:
            module, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(module), leaf, own)
    for buffer_name, buffer in list(model.named_buffers()):
        if buffer.is_floating_point() and buffer.dtype != run:
            module, _, leaf = buffer_name.rpartition(".")
            setattr(model.get_submodule(module), leaf, buffer.to(run))
    read_on_use(model, held)
    return model


def _built(cls: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model with buffers, which some compute and no file holds, and with parameters that have no values."""

    def without_values(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)

    handle = nn.modules.module.register_module_parameter_registration_hook(without_values)
    try:
        return cls._from_config(copy.deepcopy(config), dtype=dtype, attn_implementation="eager")
    finally:
        handle.remove()


def _by_tensor(model: nn.Module) -> Mapping[int, tuple[str, ...]]:
    """The names of each saved tensor of a model, those that share it together."""
    found: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), []).append(name)
    return {key: tuple(names) for key, names in found.items()}
