"""What a plan makes of a checkpoint's files, found from headers alone: every tensor's place, shape and dtype.

Edits are run on tensors without data, so whatever they do to a shape is known, and whatever does not fit is refused,
before a byte is read or written.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from typing import Literal

import torch

from normswap.checkpoint.files import Checkpoint
from normswap.checkpoint.header import TensorInfo, nbytes_of
from normswap.checkpoint.keymap import SAVE_MERGED, Group, KeyMap, shared_start
from normswap.errors import PlanError
from normswap.planning.edits import FITTED, Drop, Read, TensorEdit, Untie
from normswap.planning.plans import Plan

#: tensors that calibration fitted, or that were kept for the way back, by name, without their values
Likes = Mapping[str, torch.Tensor]
What = Literal["copied", "cast", "edited", "added", "removed"]

# What can be edited or cast. Integers are codes, and 8-bit floats are quantised values that wait for a scale.
REAL = {torch.float64, torch.float32, torch.float16, torch.bfloat16}


@dataclass(frozen=True)
class TensorChange:
    """What becomes of one tensor of the checkpoint.

    Attributes:
        key: its name in the files.
        names: the model names it makes or helps to make.
        what: the change.
        shard: the file it lies in.
        shape, dtype: in the destination; as they were, when it is removed.
        bytes_before, bytes_after: size of its data in the source and in the destination.
    """

    key: str
    names: tuple[str, ...]
    what: What
    shard: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class WriteSummary:
    """What a plan does, or did, to a checkpoint.

    Attributes:
        tensors: by checkpoint key, in the order of the files; removed ones included.
        untied: model names that become parameters of their own.
        hashes: SHA-256 of each file written; empty for a preview.
    """

    tensors: dict[str, TensorChange]
    untied: tuple[str, ...]
    hashes: dict[str, str]

    @property
    def bytes_before(self) -> int:
        return sum(tensor.bytes_before for tensor in self.tensors.values())

    @property
    def bytes_after(self) -> int:
        return sum(tensor.bytes_after for tensor in self.tensors.values())

    @property
    def parameters_added(self) -> int:
        return self._parameters("added")

    @property
    def parameters_removed(self) -> int:
        return self._parameters("removed")

    def _parameters(self, what: What) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values() if tensor.what == what)


@dataclass(frozen=True)
class Job:
    """Tensors that are computed together.

    Attributes:
        group: where the values come from; None for a tensor that the source does not hold.
        edits: by model name, in order.
        keys: the destination's keys.
    """

    group: Group | None
    edits: dict[str, tuple[TensorEdit, ...]]
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """The files to write.

    Attributes:
        shards: by file name, the tensors in the order of their data.
        jobs: what is computed; every other tensor is copied or cast.
        copies: model names of one tied parameter that the source stores more than once, and that must agree.
        summary: the same, for people.
    """

    shards: dict[str, list[TensorChange]]
    jobs: list[Job]
    copies: list[tuple[str, ...]]
    summary: WriteSummary


def lay_out(source: Checkpoint, keymap: KeyMap, plan: Plan, dtype: torch.dtype | None) -> Layout:
    """The files that `plan` makes of `source`, with real tensors stored as `dtype` (None: as they are).

    Raises:
        PlanError: an edit names a tensor the checkpoint does not hold, does not fit its shape, or cannot be stored.
    """
    changes = _by_parameter(keymap, plan)
    edits = {name: change for names, change in changes.items() for name in names if name in keymap.group_of}
    made = {fill.tensor: fill for edit in plan.module_edits() for fill in edit.makes()}
    for name in (name for name in made if name not in keymap.shapes):
        changes[(name,)] = (made[name], *changes.get((name,), ()))

    fitted = plan.fitted_likes()
    jobs: list[Job] = []
    after: dict[str, TensorChange] = {}
    for group in keymap.groups:
        touched = {name: edits[name] for name in group.targets if name in edits}
        for entry in _entries(source, keymap, group, touched, dtype, fitted):
            after[entry.key] = entry
        if keys := tuple(key for key in group.sources if after[key].what == "edited"):
            jobs.append(Job(group, touched, keys))

    shards = {shard.name: [after[info.key] for info in shard.tensors] for shard in source.shards}
    for names, change in changes.items():
        if not any(name in keymap.group_of for name in names) and not _never_stored(names, keymap, change):
            job, entry = _new(source, keymap, change, dtype, made.keys(), fitted)
            jobs.append(job)
            shards[entry.shard].append(entry)
    tensors = {entry.key: entry for entries in shards.values() for entry in entries}
    return Layout(
        {name: _aligned([e for e in entries if e.what != "removed"]) for name, entries in shards.items()},
        jobs,
        [stored for names in changes if len(stored := tuple(n for n in names if n in keymap.group_of)) > 1],
        WriteSummary(tensors, tuple(e.tensor for e in plan.edits if isinstance(e, Untie)), {}),
    )


def _never_stored(names: tuple[str, ...], keymap: KeyMap, edits: tuple[TensorEdit, ...]) -> bool:
    """Whether what is dropped is a tensor of the model that the files lack: counts of batches came late to torch."""
    return names[0] in keymap.shapes and all(isinstance(edit, Drop) for edit in edits)


def _by_parameter(keymap: KeyMap, plan: Plan) -> dict[tuple[str, ...], tuple[TensorEdit, ...]]:
    """Edits by parameter, a parameter being the names that share it in the edited model.

    An alias stands for the shared parameter until it is untied. When the file holds the shared parameter under the
    name that is untied, what stays tied has to be stored too, and begins as a copy.
    """
    own: dict[str, None] = {}
    edits: dict[tuple[str, ...], list[TensorEdit]] = defaultdict(list)
    for edit in plan.edits:
        if not isinstance(edit, TensorEdit):
            continue
        names = keymap.names_of(edit.tensor)
        if isinstance(edit, Untie):
            if edit.source not in names or edit.source == edit.tensor:
                raise PlanError(
                    f"expected {edit.tensor} to be tied to {edit.source}, found it tied to "
                    f"{', '.join(n for n in names if n != edit.tensor) or 'nothing'}. The plan is of another model or "
                    "configuration: make it again."
                )
            own[edit.tensor] = None
        edits[(edit.tensor,) if edit.tensor in own else names].append(edit)

    def still_tied(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name for name in names if name not in own)

    found = {names if len(names) == 1 else still_tied(names): tuple(listed) for names, listed in edits.items()}
    bereft = {still_tied(keymap.names_of(name)): name for name in own}
    for names, holder in bereft.items():
        if names and not any(name in keymap.group_of for name in names):
            found[names] = (Untie(tensor=names[0], source=holder), *found.get(names, ()))
    return found


def _entries(
    source: Checkpoint,
    keymap: KeyMap,
    group: Group,
    edits: dict[str, tuple[TensorEdit, ...]],
    dtype: torch.dtype | None,
    fitted: Likes,
) -> list[TensorChange]:
    """What becomes of each of a group's stored tensors."""
    infos = [source.tensors[key] for key in group.sources]
    entries = [_entry(info, group.targets, dtype) for info in infos]
    if not edits:
        return entries
    if group.converter is None and all(isinstance(edit, Drop) for edit in edits[group.targets[0]]):
        return [_removed(entries[0], infos[0])]  # whatever its dtype: a count of batches
    if len({info.dtype for info in infos}) > 1 or infos[0].dtype not in REAL:
        found = ", ".join(sorted({str(info.dtype) for info in infos}))
        raise PlanError(
            f"{', '.join(edits)}: expected one of float64, float32, float16 or bfloat16 to edit, found {found} in "
            f"{infos[0].shard}. Dequantise the checkpoint first."
        )
    shapes = {name: _shape_after(name, keymap, edits.get(name, ()), fitted) for name in group.targets}
    if group.converter is None:
        shape = shapes[group.targets[0]]
        if shape is None:
            return [_removed(entries[0], infos[0])]
        return [_edited(entries[0], shape)]
    for name, shape in shapes.items():
        if shape != keymap.shapes[name]:
            raise PlanError(
                f"{name}: expected its edits to keep the shape {keymap.shapes[name]}, since it is stored in parts "
                f"({', '.join(group.sources[:3])}), found {shape or 'that they remove it'}. {SAVE_MERGED}"
            )
    back = keymap.to_source(group, {name: _meta(shape) for name, shape in shapes.items()})
    for info in infos:
        if tuple(back[info.key].shape) != info.shape:
            raise PlanError(
                f"{info.key}: expected shape {info.shape} from undoing the conversion of {', '.join(group.targets)}, "
                f"found {tuple(back[info.key].shape)}. {SAVE_MERGED}"
            )
    return [_edited(entry, entry.shape) for entry in entries]


def _new(
    source: Checkpoint,
    keymap: KeyMap,
    edits: tuple[TensorEdit, ...],
    dtype: torch.dtype | None,
    made: Set[str],
    fitted: Likes,
) -> tuple[Job, TensorChange]:
    """A tensor that the source does not hold.

    It is stored in the dtype of the tensor that it is put beside; a count that was kept, in its own.
    """
    name = edits[0].tensor
    if not (edits[0].creates or name in made):
        raise PlanError(
            f"{name}: {edits[0].edit} expects this tensor in {source.folder}, found none. The plan is of another "
            "checkpoint: make it again."
        )
    shape = _shape_after(name, keymap, edits, fitted, exists=False)
    if shape is None:
        raise PlanError(f"{name}: expected its edits to make it, found that they leave nothing: {edits!r}.")
    info = _beside(source, keymap, edits)
    stored = _entry(info, (name,), dtype)
    kept = [fitted[other].dtype for edit in edits for other in edit.fitted()]
    if counts := [own for own in kept if not own.is_floating_point]:
        stored = replace(stored, dtype=counts[0])
    key = keymap.key_for_new(name)
    entry = replace(_edited(stored, shape), key=key, what="added", bytes_before=0)
    return Job(None, {name: edits}, (key,)), entry


def _beside(source: Checkpoint, keymap: KeyMap, edits: tuple[TensorEdit, ...]) -> TensorInfo:
    """The stored tensor that a new one is put beside.

    Of an alias, the parameter it was; else its nearest relative by name, or what it is made from.
    """
    name = edits[0].tensor
    reads = [source.tensors[keymap.stored_group(other).sources[0]] for edit in edits for other in edit.reads()]
    if isinstance(edits[0], Untie):
        return reads[0]
    stored = ((target, source.tensors[group.sources[0]]) for target, group in keymap.group_of.items())
    real = [(shared_start(target, name), info) for target, info in stored if info.dtype in REAL]
    near = max(real, key=lambda pair: pair[0], default=(0, None))
    found = near[1] if near[0] or not reads else reads[0]
    if found is None:
        raise PlanError(f"{name}: expected a tensor of real numbers in {source.folder} to store it like, found none.")
    return found


def _shape_after(
    name: str, keymap: KeyMap, edits: tuple[TensorEdit, ...], fitted: Likes, exists: bool = True
) -> tuple[int, ...] | None:
    """The shape that edits leave, by running them without data; None when they remove the tensor."""

    def read(other: str) -> torch.Tensor:
        if other.startswith(FITTED):
            if other.removeprefix(FITTED) not in fitted:
                raise PlanError(f"{name}: expected {other.removeprefix(FITTED)} beside the plan, found no such tensor.")
            return _meta(tuple(fitted[other.removeprefix(FITTED)].shape))
        if keymap.stored_group(other) is None:
            raise PlanError(f"{name}: the plan makes it from {other}, which the checkpoint does not hold.")
        return _meta(keymap.shapes[other])

    value, reading = (_meta(keymap.shapes[name]) if exists else None), Read(read)
    for edit in edits:
        before = None if value is None else tuple(value.shape)
        try:
            with torch.device("meta"):
                value = edit.apply(value, reading)
        except (RuntimeError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise PlanError(
                f"{name} of shape {before}: {edit!r} does not fit it ({error}); make the plan again."
            ) from error
    return None if value is None else tuple(value.shape)


def _meta(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float64, device="meta")


def _entry(info: TensorInfo, names: tuple[str, ...], dtype: torch.dtype | None) -> TensorChange:
    """A tensor that no edit touches."""
    stored = dtype if dtype is not None and info.dtype in REAL else info.dtype
    what: What = "copied" if stored == info.dtype else "cast"
    size = nbytes_of(stored, info.shape)
    return TensorChange(info.key, names, what, info.shard, info.shape, stored, info.nbytes, size)


def _edited(entry: TensorChange, shape: tuple[int, ...]) -> TensorChange:
    return replace(entry, what="edited", shape=shape, bytes_after=nbytes_of(entry.dtype, shape))


def _removed(entry: TensorChange, info: TensorInfo) -> TensorChange:
    return replace(entry, what="removed", shape=info.shape, dtype=info.dtype, bytes_after=0)


def _aligned(entries: list[TensorChange]) -> list[TensorChange]:
    """The order given, unless a tensor would start where its dtype cannot be mapped: then the library's own order."""
    offset = 0
    for entry in entries:
        if offset % entry.dtype.itemsize:
            return sorted(entries, key=lambda e: -e.dtype.itemsize)
        offset += entry.bytes_after
    return entries
