"""Which tensors of a checkpoint make which parameters of a model, as transformers itself would decide.

Loading renames keys, adds or strips the base model's prefix, and merges or splits tensors (one tensor per expert in the
file, one per layer in the model). All of that is asked of transformers, for the keys that the headers really hold, and
nothing is assumed from a name. What maps to nothing in the model is kept as a group without targets.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)

from normswap.checkpoint.files import Checkpoint
from normswap.errors import PlanError, SourceError
from normswap.paths import blurred

Tensors = dict[str, torch.Tensor]

SAVE_MERGED = "Save the model with save_pretrained(save_original_format=False), and convert that."


@dataclass(frozen=True)
class Group:
    """Tensors that are converted together.

    Attributes:
        sources: keys in the checkpoint, in the order in which transformers collects them.
        targets: names in the model; empty where the model has no place for the source.
        converter: what makes the targets from the sources; None for a tensor that is at most renamed.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    converter: WeightConverter | None = None


class KeyMap:
    """The mapping between one checkpoint's keys and one model's names; made by `KeyMap.build`.

    Attributes:
        groups: every tensor of the checkpoint in exactly one group.
        group_of: the group that makes a model name, for each name that is stored (an alias of a tied parameter that
            is not in the file is absent).
        shapes: the shape of every parameter and saved buffer of the model, aliases included.
    """

    def __init__(self, model: PreTrainedModel):
        mapping = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._by_pattern = {pattern: entry for entry in self._converters for pattern in entry.source_patterns}
        self._model = model
        self._known: Tensors = model.state_dict()
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._known.items()}
        self._names: dict[str, tuple[str, ...]] = _alias_groups(model)
        self.groups: list[Group] = []
        self.group_of: dict[str, Group] = {}

    @classmethod
    def build(cls, model: PreTrainedModel, checkpoint: Checkpoint) -> KeyMap:
        """Map every tensor of `checkpoint` onto `model`, which may be on the meta device; no weights are read.

        Raises:
            SourceError: two tensors claim one parameter, or what they make does not fit the parameter's shape.
        """
        keymap = cls(model)
        sources: dict[str, list[str]] = defaultdict(list)
        made_by: dict[str, WeightConverter | None] = {}
        # In transformers' own order: some renamings wait for an earlier key, and experts are stacked in this order.
        for key in sorted(checkpoint.tensors, key=dot_natural_key):
            target, converter = keymap._forward(key)
            if target is None:
                keymap.groups.append(Group((key,), ()))
            elif sources[target] and (converter is None or made_by[target] is not converter):
                raise SourceError(
                    f"{checkpoint.folder}: expected one tensor for the parameter {target}, found {sources[target][0]} "
                    f"and {key}. transformers would drop one of them: remove the stale one from the checkpoint."
                )
            else:
                sources[target].append(key)
                made_by[target] = converter
        for target, keys in sources.items():
            keymap._add(Group(tuple(keys), (target,), made_by[target]), checkpoint)
        return keymap

    def check_complete(self, what: str) -> None:
        """Raise SourceError where `what`, the checkpoint, and its configuration are not of one model.

        Every parameter has to be stored, or it would be random. Stored tensors that the model has no place for are
        another matter (heads for other uses), unless the model has their like: then these are layers beyond its last.
        """
        lacking = [
            name
            for name, _ in self._model.named_parameters()
            if self.stored_group(name) is None and not _matches(name, self._model._keys_to_ignore_on_load_missing)
        ]
        if lacking:
            raise SourceError(
                f"{what} does not hold all weights of {type(self._model).__name__}: {len(lacking)} are missing "
                f"({', '.join(lacking[:3])}), which would be random. Get the complete checkpoint, or the config.json "
                f"that belongs to it."
            )
        like = {blurred(key) for group in self.groups if group.targets for key in group.sources}
        beyond = [
            key
            for group in self.groups
            if not group.targets
            for key in group.sources
            if blurred(key) in like and not _matches(key, self._model._keys_to_ignore_on_load_unexpected)
        ]
        if beyond:
            raise SourceError(
                f"{what} holds {len(beyond)} tensors of layers that its configuration does not have ({beyond[0]}): "
                f"config.json is not of these weights. Fetch both again."
            )

    def names_of(self, name: str) -> tuple[str, ...]:
        """Every name the model has for the parameter or buffer `name`, itself included; `(name,)` if it has none."""
        return self._names.get(name, (name,))

    def stored_group(self, name: str) -> Group | None:
        """The group that makes the parameter `name`, found through its aliases; None when the file does not hold it."""
        return next((self.group_of[alias] for alias in (name, *self.names_of(name)) if alias in self.group_of), None)

    def to_model(self, group: Group, tensors: Tensors) -> Tensors:
        """The group's model tensors by name, from all its source tensors by key. Values keep their dtype."""
        if group.converter is None:
            return {name: tensors[key] for key in group.sources for name in group.targets}
        converter = deepcopy(group.converter)
        for key in group.sources:
            _, pattern = self._rename(key)
            converter.add_tensor(group.targets[0], key, pattern, tensors[key])
        return self._run(converter, group.targets[0])

    def to_source(self, group: Group, tensors: Tensors) -> Tensors:
        """The group's source tensors by key, from all its model tensors by name: the reverse of `to_model`.

        Raises:
            PlanError: transformers cannot undo the conversion, or undoing it gives other keys than the file has.
        """
        if group.converter is None:
            return {key: tensors[name] for key in group.sources for name in group.targets}
        where = f"the parameters {', '.join(group.targets)}, stored as {', '.join(group.sources[:4])}"
        keys = {apply_renamings(key, self._renamings): key for key in group.sources}
        try:
            reverse = group.converter.reverse_transform()
            for name in group.targets:
                # The model's name may have gained or lost the base model's prefix after the conversion.
                renamed, pattern = reverse.rename_source_key(name)
                if pattern is None:
                    raise ValueError(f"{reverse} does not match {name}")
                reverse.add_tensor(renamed, name, pattern, tensors[name])
            made = self._run(reverse, renamed)
        except Exception as error:  # operations of transformers raise what they like
            raise PlanError(
                f"{where}, cannot be written back in the checkpoint's own form: {error}. {SAVE_MERGED}"
            ) from error
        found = {self._source_key(name, keys): tensor for name, tensor in made.items()}
        if found.keys() != set(group.sources):
            raise PlanError(
                f"{where}: expected the reverse conversion to give these keys, found {', '.join(list(made)[:4])}. "
                f"{SAVE_MERGED}"
            )
        return found

    def key_for_new(self, name: str) -> str:
        """The key under which a model parameter that the file does not hold is to be stored, so that loading finds it.

        The parameter is named as its nearest relative in the file is: what that one's key has in place of the start of
        its model name, this one gets too.

        Raises:
            PlanError: no such key leads back to `name`.
        """
        taken = {key for group in self.groups for key in group.sources}
        for candidate in self._candidates(name):
            target, converter = self._forward(candidate, name)
            if target == name and converter is None and candidate not in taken:
                return candidate
        raise PlanError(
            f"no key could be found under which transformers would load the new parameter {name}; "
            "leave it out of the plan."
        )

    def _add(self, group: Group, checkpoint: Checkpoint) -> None:
        """Check a group against the model by running its conversion on tensors without data."""
        sources = {key: _meta(checkpoint, key) for key in group.sources}
        try:
            made = self.to_model(group, sources)
        except Exception as error:  # operations of transformers raise what they like
            raise SourceError(
                f"{checkpoint.folder}: transformers cannot make {group.targets[0]} from {len(sources)} tensors "
                f"({', '.join(group.sources[:4])}): {error}. Are some missing? Fetch the checkpoint again."
            ) from error
        for name, tensor in made.items():
            expected = self.shapes.get(name, tensor.shape)
            if tensor.shape != expected:
                raise SourceError(
                    f"{checkpoint.folder}: {', '.join(group.sources[:4])}: expected {name} of shape {expected} "
                    f"by the configuration, found {tuple(tensor.shape)}; config.json is not of these weights."
                )
        group = Group(group.sources, tuple(made), group.converter)
        self.groups.append(group)
        self.group_of.update(dict.fromkeys(made, group))

    def _forward(self, key: str, new: str | None = None) -> tuple[str | None, WeightConverter | None]:
        """Where loading puts `key`: the (first) name in the model, or None, and the converter it goes through."""
        known = self._known if new is None else {**self._known, new: torch.empty(0)}
        prefix = self._model.base_model_prefix
        name, pattern = self._rename(key, known)
        if name not in known and key in known:
            name, pattern = rename_source_key(key, [], [], prefix, known)
        if name not in known:
            return None, None
        return name, self._by_pattern[pattern] if pattern is not None else None

    def _rename(self, key: str, known: Tensors | None = None) -> tuple[str, str | None]:
        known = self._known if known is None else known
        return rename_source_key(key, self._renamings, self._converters, self._model.base_model_prefix, known)

    def _run(self, converter: WeightConverter, first: str) -> Tensors:
        made = converter.convert(first, model=self._model, config=self._model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def _source_key(self, name: str, keys: dict[str, str]) -> str | None:
        prefix = f"{self._model.base_model_prefix}."
        return keys.get(name) or keys.get(name.removeprefix(prefix)) or keys.get(prefix + name)

    def _candidates(self, name: str) -> list[str]:
        relatives = sorted(
            (target for target, group in self.group_of.items() if group.converter is None),
            key=lambda target: -shared_start(target, name),
        )
        found = [_named_like(name, target, self.group_of[target].sources[0]) for target in relatives]
        return list(dict.fromkeys([*found, name]))


def _alias_groups(model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
    names: dict[int, list[str]] = defaultdict(list)
    for named in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in named:
            names[id(tensor)].append(name)
    return {name: tuple(group) for group in names.values() for name in group}


def _matches(name: str, patterns: Iterable[str] | None) -> bool:
    return any(re.search(pattern, name) for pattern in patterns or ())


def _meta(checkpoint: Checkpoint, key: str) -> torch.Tensor:
    info = checkpoint.tensors[key]
    return torch.empty(info.shape, dtype=info.dtype, device="meta")


def shared_start(a: str, b: str) -> int:
    """How many leading parts two dotted names share."""
    pairs = list(zip(a.split("."), b.split("."), strict=False))
    return next((i for i, (x, y) in enumerate(pairs) if x != y), len(pairs))


def _named_like(name: str, target: str, key: str) -> str:
    """`name` with its start replaced as in `target` -> `key`: `m.h.0.b` is `h.0.b` where `m.h.0.w` is `h.0.w`."""
    there, here = target.split("."), key.split(".")
    while there and here and there[-1] == here[-1]:
        there.pop()
        here.pop()
    parts = name.split(".")
    return ".".join(here + parts[len(there) :]) if parts[: len(there)] == there else name
