"""An adapter of the source as one of the converted model: the same change, of other weights (`change`).

PEFT says which tensors the adapter holds on either model. Each of the source's has to be there and to fit, and each of
the converted model's is made; nothing is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from normswap.adapters.change import Change, Original, Tensors
from normswap.adapters.folder import MERGE, Adapter
from normswap.adapters.slots import LowRank, Slots, put_on, slots_of
from normswap.apply.live import apply_structure, without_storage
from normswap.checkpoint.keymap import KeyMap
from normswap.errors import RefusedError
from normswap.planning.plans import Plan


@dataclass(frozen=True)
class Carried:
    """An adapter and what became of it.

    Attributes:
        adapter: as it was read.
        before: its tensors by key in float64, what PEFT does not read left out.
        config: settings of the converted one.
        tensors: of the converted one, by key, in float64.
        dtypes: and in which dtype each is stored.
        changed: keys of those that are not as they were.
        replaced: names of the base's tensors that loading it overwrites.
    """

    adapter: Adapter
    before: Tensors
    config: dict[str, Any]
    tensors: Tensors
    dtypes: dict[str, torch.dtype]
    changed: tuple[str, ...]
    replaced: tuple[str, ...]


def carry(adapter: Adapter, structure: PreTrainedModel, keymap: KeyMap, plan: Plan, original: Original) -> Carried:
    """Carry an adapter over a conversion.

    Args:
        structure: the source's model, without weights.
        plan: the conversion.
        original: gives a tensor of the source by its name in the model, in float64.

    Raises:
        RefusedError: an adapter weight that has no counterpart, or that does not fit the source; it is named.
    """
    slots = slots_of(put_on(without_storage(structure), adapter.config, adapter.name), adapter.name)
    before = _fitting(adapter, slots, keymap, original)
    plan.check_complete()
    change = Change(adapter.name, slots, before, keymap, plan, original)
    config = _config(adapter, plan)
    later = _converted_slots(structure, plan, config, adapter.name)
    change.check_read(set(later.whole.values()))
    biases = {path: change.bias(found, set(later.whole.values())) for path, found in slots.low_rank.items()}
    if owing := [path for path, added in biases.items() if slots.low_rank[path].beta is None and added.any()]:
        config |= _with_biases(adapter, slots, slots.low_rank[owing[0]])
        later = _converted_slots(structure, plan, config, adapter.name)
    if odd := sorted(slots.low_rank.keys() ^ later.low_rank.keys()):
        raise RefusedError(
            f"the adapter {adapter.name} names other layers in the converted model than in the source ({odd[0]}): "
            f"list its target_modules one by one in adapter_config.json."
        )
    if lost := sorted(set(slots.whole.values()) - set(later.whole.values())):
        raise RefusedError(
            f"the adapter {adapter.name} trained {lost[0]}, and the converted model has no such tensor. "
            f"Keep it (--fold alone keeps norms' weights), or: {MERGE}"
        )
    made = _made(change, slots, later, biases)
    for key, value in made.items():
        if tuple(value.shape) != later.shapes[key]:
            raise RefusedError(
                f"the adapter {adapter.name}: {key} would become {tuple(value.shape)}, and the converted model takes "
                f"{later.shapes[key]}. {MERGE}"
            )
    return Carried(
        adapter,
        before,
        config,
        dict(sorted(made.items())),
        {key: _dtype(adapter, key) for key in made},
        tuple(sorted(k for k, v in made.items() if k not in before or not torch.equal(v, before[k]))),
        tuple(sorted({*slots.whole.values(), *later.whole.values()})),
    )


def _made(change: Change, slots: Slots, later: Slots, biases: Mapping[str, torch.Tensor]) -> Tensors:
    """Every tensor of the converted adapter, by key, in float64."""
    made: Tensors = {}
    for path, found in later.low_rank.items():
        made[found.a], made[found.b] = change.factors(slots.low_rank[path])
        if found.magnitude is not None:
            made[found.magnitude] = change.magnitude(slots.low_rank[path], made[found.a], made[found.b])
        if found.beta is not None:
            made[found.beta] = biases[path] / found.scaling if found.scaling else biases[path]
    made |= {key: change.whole(key, name) for key, name in later.whole.items()}
    made |= {key: change.rows(key, name) for key, (name, _) in later.rows.items()}
    return made


def _fitting(adapter: Adapter, slots: Slots, keymap: KeyMap, original: Original) -> Tensors:
    """The adapter's tensors in float64, each in its slot."""
    held = {}
    for key, tensor in adapter.tensors.items():
        if key in slots.ignored:
            continue
        if key not in slots.shapes and _is_the_base(adapter, key, tensor, keymap, original):
            continue
        if tuple(tensor.shape) != slots.shapes.get(key):
            raise RefusedError(
                f"the adapter {adapter.name} is not of this base: {key} has shape {tuple(tensor.shape)}, expected "
                f"{slots.shapes.get(key, 'no such tensor')}. Name the checkpoint that it was trained on."
            )
        held[key] = tensor.double()
    for key, (name, rows) in slots.rows.items():
        if not all(0 <= row < keymap.shapes[name][0] for row in rows):
            raise RefusedError(
                f"the adapter {adapter.name} is not of this base: {key} is of row {max(rows)}, and {name} has "
                f"{keymap.shapes[name][0]} rows. Name the checkpoint that it was trained on."
            )
    if lacking := sorted(slots.shapes.keys() - held.keys() - slots.ignored):
        raise RefusedError(
            f"the adapter {adapter.name} lacks {lacking[0]}, which its settings ask for on this base. Name the "
            f"checkpoint that it was trained on, or save the adapter again."
        )
    return held


def _is_the_base(adapter: Adapter, key: str, tensor: torch.Tensor, keymap: KeyMap, original: Original) -> bool:
    """Whether it is a copy of the base's own embedding, which PEFT saves with an adapter of it."""
    name = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
    if keymap.stored_group(name) is None:
        return False
    own = original(name)
    roundings = (tensor.dtype, torch.bfloat16, torch.float16)  # the base may have been loaded in half precision
    if own.shape == tensor.shape and any(torch.equal(own.to(dtype).to(tensor.dtype), tensor) for dtype in roundings):
        return True
    raise RefusedError(
        f"the adapter {adapter.name} brings a {name} of its own, which is not the base's (it was resized or trained). "
        f"{MERGE}"
    )


def _converted_slots(structure: PreTrainedModel, plan: Plan, config: Mapping[str, Any], name: str) -> Slots:
    converted = without_storage(structure)
    apply_structure(converted, plan)
    return slots_of(put_on(converted, config, name), name)


def _config(adapter: Adapter, plan: Plan) -> dict[str, Any]:
    """The converted adapter's settings."""
    config = {**adapter.config, "base_model_name_or_path": None, "revision": None}
    if plan.module_edits():
        config["auto_mapping"] = None  # the class is in the converted folder now
    return config


def _with_biases(adapter: Adapter, slots: Slots, owing: LowRank) -> dict[str, Any]:
    """Settings by which B has a bias. Raises RefusedError where PEFT does not take them."""
    without = {found.path: "embedding" for found in slots.low_rank.values() if "lora_embedding" in found.a}
    without |= {found.path: "expert" for found in slots.low_rank.values() if not found.beside}
    if without:
        path, what = next(iter(without.items()))
        raise RefusedError(
            f"the adapter {adapter.name} cannot be carried: {owing.b} has to have a bias, for a norm's bias is folded "
            f"into {owing.path}, and PEFT has none in an adapter that changes an {what} ({path}). {MERGE}"
        )
    if owing.magnitude is not None:
        raise RefusedError(
            f"the adapter {adapter.name} cannot be carried: {owing.b} has to have a bias, for a norm's bias is folded "
            f"into {owing.path}, and PEFT has none beside magnitudes (use_dora). {MERGE}"
        )
    return {"lora_bias": True, "init_lora_weights": True}


def _dtype(adapter: Adapter, key: str) -> torch.dtype:
    """The dtype a tensor is stored in: its own, a new bias's that of its factor, another new one's that of any."""
    beside = adapter.tensors.get(key, adapter.tensors.get(key.removesuffix("bias") + "weight"))
    return (next(iter(adapter.tensors.values())) if beside is None else beside).dtype
