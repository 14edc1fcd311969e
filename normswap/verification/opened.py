"""A checkpoint and what was made of it, opened to be compared: both in memory, or read from their files as they run.

A small model is loaded by transformers, as anyone would. A large one runs in memory that does not grow with it
(`verification.streamed`): its modules and keys are transformers' own, its weights are read where they are used.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from normswap.apply.layout import lay_out
from normswap.apply.live import apply_plan, apply_structure
from normswap.apply.modelling import load_generated
from normswap.apply.values import Values
from normswap.checkpoint.files import Checkpoint
from normswap.checkpoint.keymap import KeyMap
from normswap.checkpoint.source import Source
from normswap.errors import SourceError, VerificationError
from normswap.observe.run import make_eager
from normswap.planning.plans import Plan
from normswap.verification.checks import WRONG_FILES, check_files
from normswap.verification.run import coarsest_dtype, open_model
from normswap.verification.streamed import SMALL, Held, placeholder, read_on_use
from normswap.verification.weights import Planned, Stored, Weights

#: models with more parameters than this are not loaded: 64 MiB in float64
IN_MEMORY = 2**23
# What is compared at once of two files' tensors.
_VALUES_AT_ONCE = 2**22


class Opened(Protocol):
    """The original, the plan carried out on it, and the published folder.

    Attributes:
        on_disk: whether weights are read where they are used.
        structures: original and published model, to be looked at; they need have no values.
    """

    on_disk: bool
    structures: tuple[PreTrainedModel, PreTrainedModel]

    def as_stored(self, run: torch.dtype) -> tuple[nn.Module, nn.Module]:
        """Original and published model, with their weights as stored, computing in `run`."""

    def mathematics(self, run: torch.dtype) -> tuple[nn.Module, nn.Module]:
        """The original, and what the plan makes of it without rounding, computing in `run`."""

    def left_alone(self, run: torch.dtype) -> tuple[nn.Module, nn.Module]:
        """The original, and the published class with the plan's unrounded weights."""

    def check_files(self) -> int:
        """The folder holds the plan's results, rounded once; how many tensors were compared. VerificationError."""


def open_both(source: Source, plan: Plan, folder: Path, opened: ExitStack) -> Opened:
    """Open `source` and the unpublished `folder`, files until `opened` is closed."""
    checkpoint = opened.enter_context(Checkpoint.open(source.folder))
    structure = source.build()
    keymap = KeyMap.build(structure, checkpoint)
    size = sum(math.prod(info.shape) for info in checkpoint.tensors.values())
    if size <= IN_MEMORY or not _all_stored(structure, keymap):
        return InMemory(source, plan, folder)
    return OnDisk(source, plan, folder, checkpoint, keymap, opened)


class InMemory:
    """Both loaded by transformers."""

    on_disk = False

    def __init__(self, source: Source, plan: Plan, folder: Path):
        self._plan = plan
        self._original, self._result = open_model(source), open_published(folder, plan, source.model_class)
        self._converted: nn.Module | None = None
        self.structures = self._original, self._result

    def as_stored(self, run: torch.dtype) -> tuple[nn.Module, nn.Module]:
        models = self._original, self._result
        return tuple(m if coarsest_dtype(m) == run else copy.deepcopy(m).to(run) for m in models)

    def mathematics(self, run: torch.dtype) -> tuple[nn.Module, nn.Module]:
        self._original = self._original.to(run)
        self._converted = apply_plan(copy.deepcopy(self._original), self._plan)
        return self._original, self._converted

    def left_alone(self, run: torch.dtype) -> tuple[nn.Module, nn.Module]:
        self._result.to(run).load_state_dict(self._converted.state_dict())
        return self._original, self._result

    def check_files(self) -> int:
        return check_files(self._converted, self._result)


class OnDisk:
    """Both read from their files as they run."""

    on_disk = True

    def __init__(
        self, source: Source, plan: Plan, folder: Path, checkpoint: Checkpoint, keymap: KeyMap, opened: ExitStack
    ):
        self._source, self._plan = source, plan
        made = opened.enter_context(Checkpoint.open(folder))
        self._classes = source.model_class, published_class(folder, plan, source.model_class)
        self.structures = tuple(
            without_weights(cls, place) for cls, place in zip(self._classes, (source.folder, folder), strict=True)
        )
        self._stored = Stored(checkpoint, keymap), Stored(made, KeyMap.build(self.structures[1], made))
        layout = lay_out(checkpoint, keymap, plan, None)
        self._planned = Planned(Values(checkpoint, keymap, plan), layout, self._stored[0])

    def as_stored(self, run: torch.dtype) -> tuple[nn.Module, nn.Module]:
        return tuple(
            reading(cls, like, run, weights, as_loaded=True)
            for cls, like, weights in zip(self._classes, self.structures, self._stored, strict=True)
        )

    def mathematics(self, run: torch.dtype) -> tuple[nn.Module, nn.Module]:
        cls, like = self._classes[0], self.structures[0]
        return (
            reading(cls, like, run, self._stored[0]),
            reading(cls, like, run, self._planned, plan=self._plan),
        )

    def left_alone(self, run: torch.dtype) -> tuple[nn.Module, nn.Module]:
        return (
            reading(self._classes[0], self.structures[0], run, self._stored[0]),
            reading(self._classes[1], self.structures[1], run, self._planned),
        )

    def check_files(self) -> int:
        names = [*_by_tensor(self.structures[1]).values()]
        stored = self._stored[1]
        wrong = [own[0] for own in names if not _same(self._planned, stored, own)]
        if wrong:
            raise VerificationError(WRONG_FILES.format(len(wrong), wrong[0]))
        return len(names)


def _same(planned: Planned, stored: Stored, names: tuple[str, ...]) -> bool:
    """Whether a tensor of the published folder is what the plan makes, rounded once."""
    name, wanted = names[0], planned.name_of(names)
    shape = stored.shape(name)
    count = max(1, _VALUES_AT_ONCE // max(1, math.prod(shape[1:])))
    alone = shape and math.prod(shape) > _VALUES_AT_ONCE and planned.rows_alone(wanted)
    parts = [range(i, min(i + count, shape[0])) for i in range(0, shape[0], count)] if alone else [None]
    for part in parts:
        have = stored.read(name, part)
        if not torch.equal(planned.read(wanted, part).to(have.dtype), have):
            return False
    return True


def reading(
    cls: type[PreTrainedModel],
    like: PreTrainedModel,
    run: torch.dtype,
    weights: Weights,
    *,
    plan: Plan | None = None,
    as_loaded: bool = False,
) -> PreTrainedModel:
    """A model that reads its weights as it runs.

    Args:
        cls: its class.
        like: one of that class without values, with the dtypes that transformers loads its weights in.
        run: what it computes in.
        weights: where they are read.
        plan: changes its modules, after it was built.
        as_loaded: cut weights to the dtypes of `like` first.
    """
    model = _built(cls, like.config, coarsest_dtype(like))
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


def _all_stored(structure: PreTrainedModel, keymap: KeyMap) -> bool:
    """Whether the files hold all of a model, so that nothing is left for transformers to make."""
    return all(keymap.stored_group(name) is not None for name in structure.state_dict())


def without_weights(cls: type[PreTrainedModel], folder: Path) -> PreTrainedModel:
    """A folder's model as transformers loads it, on the meta device. Raises SourceError where weights are missing."""
    model, info = cls.from_pretrained(
        folder, dtype="auto", attn_implementation="eager", output_loading_info=True, device_map="meta"
    )
    _check_loaded(info)
    make_eager(model)
    return model.eval()


def published_class(folder: Path, plan: Plan, stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class that a user's process would take for the folder; `stock` is the source's."""
    return load_generated(folder) if plan.module_edits() else stock


def open_published(folder: Path, plan: Plan, stock: type[PreTrainedModel]) -> PreTrainedModel:
    """The folder's model by the class that a user's process would take, weights as stored; `stock` is the source's."""
    cls = published_class(folder, plan, stock)
    model, info = cls.from_pretrained(folder, dtype="auto", attn_implementation="eager", output_loading_info=True)
    _check_loaded(info)
    make_eager(model)
    return model.eval()


def _check_loaded(info: Mapping[str, object]) -> None:
    missing = sorted(info["missing_keys"])
    missing += [f"{key} {tuple(a)}, expected {tuple(b)}" for key, a, b in sorted(info["mismatched_keys"])]
    if missing:
        raise SourceError(f"the folder lacks {len(missing)} tensors its class needs: {', '.join(missing[:3])}.")
