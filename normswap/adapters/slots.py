"""What an adapter holds, told by PEFT itself: its settings are put on a model without weights, and its layers are read.

Every tensor of the adapter has a key and a meaning, a slot: a factor of a low-rank change, the bias of one, a tensor
of the model that was trained as a whole (`modules_to_save`, biases), or some rows of an embedding.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from normswap.adapters.folder import MERGE
from normswap.errors import RefusedError

#: what PEFT puts before the name of a module of the base
_PREFIX = "base_model.model."
NAME = "default"


@dataclass(frozen=True)
class LowRank:
    """A change `s B A` of a weight, computed beside its layer, or added to the weight itself (`target_parameters`).

    Attributes:
        path: of the layer.
        weight: name of the weight.
        a, b: keys of the factors; rank is the first axis of A and the second of B.
        beta: key of the bias of B, None: it has none. The layer's output gains `s` times it.
        magnitude: key of m, None: there is none. With it the weight is `m (W + s B A)`, each of its rows, the weights
            of one output, divided by their length first (DoRA; Liu et al., ICML 2024).
        scaling: s.
        axes: per axis of the layer's weight the factor, `a` or `b`, and which of its axes lies along it.
        ends: which axes of the weight lie along the last axis of the layer's output, and of its input; None: none does.
        stack: how many weights the tensor is a stack of (experts); each has factors of its own, which lie in A one
            after another and in B interleaved.
        beside: whether it is computed beside the layer.
    """

    path: str
    weight: str
    a: str
    b: str
    beta: str | None
    magnitude: str | None
    scaling: float
    axes: Mapping[int, tuple[str, int]]
    ends: tuple[int | None, int | None]
    stack: int = 1
    beside: bool = True

    @property
    def bias(self) -> str | None:
        """Name of the layer's bias, where B could have one."""
        return f"{self.path}.bias" if self.beside else None

    def delta(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """`s B A` in the weight's own layout."""
        if 0 not in self.axes:  # a stack
            a, b = a.unflatten(0, (self.stack, -1)), b.unflatten(1, (-1, self.stack)).permute(2, 0, 1)
            made = self.scaling * (b @ a)
            return made if self.axes[1][0] == "b" else made.mT
        made = self.scaling * torch.tensordot(b.flatten(1), a, 1)
        return made if self.axes[0][0] == "b" else made.T

    def lengths(self, weight: torch.Tensor) -> torch.Tensor:
        """The length of what makes each output, `(out, 1)` or `(1, out)` as it lies in the weight of a linear map."""
        return weight.norm(dim=self.ends[1], keepdim=True)


@dataclass
class Slots:
    """The slots of an adapter on one model.

    Attributes:
        low_rank: by path of the layer.
        whole: per key the name of the model's tensor that it replaces.
        rows: per key the name of the embedding's weight, and which rows of it.
        shapes: of every key.
        ignored: keys that PEFT writes and does not read.
    """

    low_rank: dict[str, LowRank] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)
    rows: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    ignored: set[str] = field(default_factory=set)


def put_on(model: nn.Module, config: Mapping[str, Any], name: str):
    """`model` with new, untrained layers as the adapter's settings ask for; of `model` nothing is left as it was.

    Raises:
        RefusedError: PEFT does not take the settings for this model.
    """
    from peft import LoraConfig, PeftModel

    device = next(model.parameters()).device
    known = {f.name for f in dataclasses.fields(LoraConfig)}
    settings = {key: value for key, value in config.items() if key in known}
    try:
        settings = LoraConfig(**settings)
        made = _class(settings.task_type, PeftModel)
        options = {"autocast_adapter_dtype": False}
        options = {key: v for key, v in options.items() if key in inspect.signature(PeftModel.__init__).parameters}
        with warnings.catch_warnings(), torch.device(device):
            warnings.simplefilter("ignore")
            return made(model, settings, NAME, **options).eval()
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, re.error) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RefusedError(
            f"the adapter {name} cannot be put on a {type(model).__name__}: {reason:.300} Is it of this base? Its "
            f"settings are in its adapter_config.json."
        ) from error


def _class(task: str | None, usual: type) -> type:
    """The class by which PEFT would load an adapter of that task: some train a model's head without being asked."""
    from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING as classes

    return classes.get(task, usual)


def slots_of(peft_model, name: str) -> Slots:
    """The slots of the adapter on a model that `put_on` gave.

    Raises:
        RefusedError: a layer whose change is not two factors beside a linear map, an embedding or a convolution.
    """
    from peft import get_peft_model_state_dict
    from peft.tuners.lora.layer import LoraLayer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = get_peft_model_state_dict(peft_model, adapter_name=NAME, save_embedding_layers=False)
    found = Slots(shapes={key: tuple(tensor.shape) for key, tensor in tensors.items()})
    base = peft_model.get_base_model()
    names = {key: key.removeprefix(_PREFIX) for key in tensors}
    for path, module in base.named_modules():
        if isinstance(module, LoraLayer):
            found.low_rank[path] = _low_rank(path, module, tensors, name)
    taken = {key for change in found.low_rank.values() for key in (change.a, change.b, change.beta, change.magnitude)}
    for key in names.keys() - taken:
        _whole_or_rows(found, key, names[key], base, name)
    return found


def _low_rank(path: str, layer, tensors: Mapping[str, torch.Tensor], name: str) -> LowRank:
    from peft.tuners.lora import layer as kinds

    start = f"{_PREFIX}{path}."
    a, b, weight, more = "lora_A.weight", "lora_B.weight", f"{path}.weight", {}
    if isinstance(layer, kinds.Embedding):
        a, b, axes, ends = "lora_embedding_A", "lora_embedding_B", {0: ("a", 1), 1: ("b", 0)}, (1, None)
    elif isinstance(layer, kinds.Linear):
        axes, ends = {0: ("b", 0), 1: ("a", 1)}, (0, 1)
        if layer.fan_in_fan_out:
            axes, ends = {0: axes[1], 1: axes[0]}, (1, 0)
    elif isinstance(layer, kinds._ConvNd):
        axes, ends = {0: ("b", 0)}, (None, None)
        if layer.get_base_layer().groups == 1:  # else A reads all channels, and the weight those of a group
            axes |= {axis: ("a", axis) for axis in range(1, layer._kernel_dim)}
    elif isinstance(layer, getattr(kinds, "ParamWrapper", ())):
        # several of one layer are nested
        weight, more = f"{path.removesuffix('.base_layer')}.{layer.parameter_name}", {"beside": False}
        axes, ends = {0: ("b", 0), 1: ("a", 1)}, (None, None)
        if layer.get_param().ndim == 3:
            more["stack"], (out, into) = layer.num_experts, (axes[0], axes[1])
            axes = {1: out, 2: into} if layer._did_swap_in_out_features else {1: into, 2: out}
    else:
        raise RefusedError(
            f"the adapter {name} changes {path} by a {type(layer).__name__}, which is not carried. {MERGE}"
        )
    if (lacking := next((key for key in (start + a, start + b) if key not in tensors), None)) is not None:
        raise RefusedError(f"the adapter {name} has no {lacking}: PEFT keeps this layer in another form. {MERGE}")
    beta, magnitude = (key if key in tensors else None for key in (f"{start}lora_B.bias", f"{start}{_MAGNITUDE}"))
    if magnitude is not None and not isinstance(layer, kinds.Linear):
        raise RefusedError(f"the adapter {name} has {magnitude}, of no linear map, which is not carried. {MERGE}")
    return LowRank(path, weight, start + a, start + b, beta, magnitude, float(layer.scaling[NAME]), axes, ends, **more)


_MAGNITUDE = "lora_magnitude_vector"
_ROWS = ".token_adapter.trainable_tokens_delta"


def _whole_or_rows(found: Slots, key: str, name: str, base: nn.Module, adapter: str) -> None:
    if name.endswith(_ROWS):
        path = name.removesuffix(_ROWS)
        indices = base.get_submodule(path).token_adapter.token_indices[NAME]
        found.rows[key] = f"{path}.weight", tuple(int(index) for index in indices)
    elif ".modules_to_save." in f".{name}" or ".original_module." in f".{name}":
        found.ignored.add(key)  # a trained bias of a module that is stored as a whole
    elif "lora_" in name:
        raise RefusedError(f"the adapter {adapter} holds {key}, which is of no layer that is known here. {MERGE}")
    else:
        found.whole[key] = name.replace(".base_layer.", ".")
