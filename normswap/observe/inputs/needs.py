"""What a model asks for: the parameters of its forward, the sizes its configuration states, sizes that are free."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch.utils._pytree import tree_map
from transformers import PretrainedConfig, PreTrainedModel

from normswap.errors import ObserveError

#: parameters of a forward that steer it, or hold what it would compute itself
_NOT_DATA = (
    "return_",
    "output_",
    "use_",
    "past_key",
    "cache",
    "labels",
    "inputs_embeds",
    "position_ids",
    "kwargs",
    "args",
)
#: words in the keys of sizes that a vector may have
_WIDTHS = ("hidden_size", "d_model", "n_embd", "dim", "width", "channels", "input_size", "output_size", "embed_size")

_SOME = torch.full((), 0.5)  # not 0, which may mean padding
_MOST = 2**27  # random numbers of one input; those of a film have 2**24


@dataclass(frozen=True)
class Needs:
    """What `model.forward` takes and the sizes to make it in."""

    model: PreTrainedModel
    taken: frozenset[str]
    required: frozenset[str]
    batch: int
    length: int
    target: int
    generator: torch.Generator
    annotations: dict[str, str]

    @classmethod
    def of(cls, model: PreTrainedModel) -> Needs:
        try:
            parameters = inspect.signature(model.forward).parameters
        except (TypeError, ValueError):
            parameters = {}
        named = [p for p in parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        if not named or getattr(model.forward, "__name__", "") == "_forward_unimplemented":
            raise ObserveError(
                f"{type(model).__name__} has no forward of its own; its parts run one after another. "
                f"Give one of the parts."
            )
        sizes = {size for p in model.parameters() for size in p.shape}
        free = (n for n in count(3) if n not in sizes and all(n % k for k in range(2, n)))
        batch, length, target = next(free), next(free), next(free)
        return cls(
            model,
            frozenset(p.name for p in named),
            frozenset(p.name for p in named if p.default is p.empty),
            1 if takes_one_row(model) else batch,
            length,
            target,
            torch.Generator().manual_seed(0),
            {p.name: _annotation(p) for p in named},
        )

    @property
    def config(self) -> PretrainedConfig:
        return self.model.config

    def stated(self, *names: str, within: PretrainedConfig | None = None, default: Any = None) -> Any:
        """The first of `names` that the configuration, or one nested in it, gives a value for; `within` comes first."""
        for config in itertools.chain(walk(within) if within else (), walk(self.config)):
            for name in names:
                value = getattr(config, name, None)
                if value is not None:
                    return value
        return default

    def randn(self, *shape: int) -> torch.Tensor:
        """Stands for random numbers until `drawn` makes them: candidates that are not taken cost no memory."""
        return _SOME.expand(shape)

    def drawn(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """`inputs` with random numbers where they were only announced."""
        return tree_map(self._drawn, inputs)

    def _drawn(self, value: Any) -> Any:
        announced = isinstance(value, torch.Tensor) and value.data_ptr() == _SOME.data_ptr()
        if announced and value.numel() > _MOST:
            raise ObserveError(
                f"{type(self.model).__name__} takes inputs of shape {tuple(value.shape)}, by its configuration, which "
                f"is more than {_MOST} numbers. Pass `inputs`, keyword arguments of its forward for one small batch, "
                "to the library call, or look in config.json for a number that is far too large."
            )
        return torch.randn(value.shape, generator=self.generator) if announced else value

    def ids(self, *shape: int) -> torch.Tensor:
        """Small ids, more than one, none of which the configuration gives a meaning of its own."""
        special = set(special_ids(self.config))
        plain = [n for n in range(1, 64) if n not in special][:2] or [1, 2]
        return torch.tensor(plain)[torch.arange(max(1, torch.Size(shape).numel())) % len(plain)].reshape(shape)

    def optional(self, made: set[str]) -> list[str]:
        """Tensors that the model may take besides those in `made`."""
        steering = ("labels", "token_type_ids", "mask", "head_mask", "logits_to_keep")
        return [
            name
            for name in self.annotations
            if name in self.taken - self.required - made
            and "Tensor" in self.annotations[name]
            and not name.endswith(steering)
            and not any(part in name for part in _NOT_DATA)
        ]

    def switches(self) -> dict[str, bool]:
        return {"use_cache": False} if "use_cache" in self.taken else {}


def _annotation(parameter: inspect.Parameter) -> str:
    """The type as written, without modules; empty where none is."""
    if parameter.annotation is parameter.empty:
        return ""
    kind = parameter.annotation
    return (kind.__name__ if isinstance(kind, type) else str(kind)).replace("torch.", "")


def widths(config: PretrainedConfig) -> list[int]:
    """Every number of channels that the configuration states, or one nested in it, outer ones first."""
    stated = (
        value
        for part in walk(config)
        for key, value in vars(part).items()
        if type(value) is int and any(word in key for word in _WIDTHS) and "head_dim" not in key
    )
    return list(dict.fromkeys(value for value in stated if 1 < value < 1 << 16))


def takes_one_row(model: PreTrainedModel) -> bool:
    """Heads that pool the last token need to know what padding is, or batches of one."""
    return getattr(model.config, "pad_token_id", None) is None and not model.can_generate()


def walk(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """The configuration and those nested in it, outer ones first."""
    level = [config]
    while level:
        yield from level
        level = [v for c in level for v in vars(c).values() if isinstance(v, PretrainedConfig)]


def special_ids(config: PretrainedConfig) -> Iterator[int]:
    """Every id that the configuration names."""
    for part in walk(config):
        for name, value in vars(part).items():
            if name.endswith(("token_id", "token_index", "_token", "_id", "token_ids")):
                yield from (v for v in (value if isinstance(value, list) else [value]) if type(v) is int)
