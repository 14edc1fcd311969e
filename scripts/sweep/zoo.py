"""A small random model of every model type that transformers knows, and inputs for it.

Configurations are shrunk from their defaults by what their keys are called (`shrink.py`); where that is not enough,
`zoo.json` says what else a type needs: `config` (keys, nested), `class`, `inputs` (see `inputs_for`), `dtype`, `widths`
("equal": one for all), and `missing` (why it cannot be built here).
"""

from __future__ import annotations

import importlib
import inspect
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from normswap.observe.inputs import example_inputs
from normswap.observe.run import make_eager
from sweep.shrink import shrink

OVERRIDES: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("zoo.json").read_text())
#: which head of a type is built, first found; a base model after all of these
_TASKS = (
    "SPEECH_SEQ_2_SEQ SEQ_TO_SEQ_CAUSAL_LM IMAGE_TEXT_TO_TEXT MULTIMODAL_LM CAUSAL_LM_OR_MASKED_LM CTC TDT RNNT "
    "VISUAL_QUESTION_ANSWERING DOCUMENT_QUESTION_ANSWERING ZERO_SHOT_OBJECT_DETECTION OBJECT_DETECTION "
    "UNIVERSAL_SEGMENTATION INSTANCE_SEGMENTATION SEMANTIC_SEGMENTATION IMAGE_SEGMENTATION DEPTH_ESTIMATION "
    "ZERO_SHOT_IMAGE_CLASSIFICATION IMAGE_CLASSIFICATION VIDEO_CLASSIFICATION AUDIO_CLASSIFICATION "
    "TEXT_TO_SPECTROGRAM TEXT_TO_WAVEFORM TIME_SERIES_PREDICTION KEYPOINT_MATCHING KEYPOINT_DETECTION "
    "POSE_ESTIMATION IMAGE_TO_IMAGE IMAGE_MATTING MASK_GENERATION TABLE_QUESTION_ANSWERING "
    "SEQUENCE_CLASSIFICATION TOKEN_CLASSIFICATION QUESTION_ANSWERING PRETRAINING AUDIO_TOKENIZATION"
).split()


class CannotBuild(Exception):
    """This type has no model that could be built here; the message says why."""


def model_types() -> list[str]:
    """Every model type of transformers' configuration mapping, in its order."""
    return list(CONFIG_MAPPING_NAMES)


def tiny_config(model_type: str) -> PretrainedConfig:
    """The type's default configuration made small.

    Raises:
        CannotBuild: the type has no default configuration.
    """
    override = OVERRIDES.get(model_type, {})
    if "missing" in override:
        raise CannotBuild(override["missing"])
    config_class = CONFIG_MAPPING[model_type]
    try:
        stated = config_class(**_tuples(override.get("default", {})))
    except Exception as error:
        raise CannotBuild(f"no default configuration: {type(error).__name__}: {error}") from error
    default = stated.to_dict()
    small = _underived(stated, shrink(default, equal_widths=override.get("widths") == "equal"))
    changed = {key: value for key, value in small.items() if isinstance(value, dict) or value != default[key]}
    changed |= {k: v for k, v in override.get("default", {}).items() if k not in changed}
    return config_class(**_merged(changed, _tuples(override.get("config", {}))))


def model_class(model_type: str) -> type[PreTrainedModel]:
    """The class with the most specific head that transformers maps to the type, or one for its configuration class.

    Raises:
        CannotBuild: nothing in transformers is a model of this configuration.
    """
    named = OVERRIDES.get(model_type, {}).get("class")
    if named:
        return _find(named, model_type)
    for task in _TASKS:
        for mapping in _mappings(task):
            if model_type in mapping:
                found = mapping[model_type]
                return _find(found if isinstance(found, str) else found[0], model_type)
    found = modeling_auto.MODEL_MAPPING_NAMES.get(model_type) or modeling_auto.MODEL_FOR_BACKBONE_MAPPING_NAMES.get(
        model_type
    )
    if found:
        return _find(found if isinstance(found, str) else found[0], model_type)
    return _by_configuration(CONFIG_MAPPING[model_type])


def build(model_type: str, seed: int = 0) -> PreTrainedModel:
    """The small model: random, eager, in eval mode, float32, on the CPU.

    Raises:
        CannotBuild: see `tiny_config` and `model_class`.
    """
    torch.manual_seed(seed)
    try:
        config, cls = tiny_config(model_type), model_class(model_type)
        model = cls._from_config(config) if hasattr(cls, "_from_config") else cls(config)
    except ImportError as error:  # transformers' own message, of which the first sentence says what is missing
        raise CannotBuild(str(error).strip().partition(". ")[0]) from error
    if cls.forward is nn.Module.forward:
        raise CannotBuild(f"{cls.__name__} has no forward of its own; its parts run one after another")
    model = model.float().eval()
    make_eager(model)
    return randomise(model, seed)


def inputs_for(model: PreTrainedModel) -> dict[str, Any]:
    """Keyword arguments of the forward: what normswap makes, with what `zoo.json` says in place of it or beside it.

    An input in `zoo.json` is `{"kind": ids | float | full | values | const, "shape", "low", "high", "value"}`; null
    leaves it out.
    """
    said = OVERRIDES.get(model.config.model_type, {}).get("inputs", {})
    generator = torch.Generator().manual_seed(0)
    made = {name: spec and _input(spec, generator) for name, spec in said.items()}
    inputs = made if said.get("*", 0) is None else {**example_inputs(model), **made}
    return {name: value for name, value in inputs.items() if value is not None}


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter of `model` a value that a mistake would show in; in place, and returned.

    Gains (1-D weights) become 1 + 0.3 randn, one in four of them negative, or 0.3 randn where they start at 0 (the
    `1 + w` form); biases of norms 0.2 randn, other biases 0.1 randn; running means 0.5 randn, running variances
    within 0.5 .. 2. Weights of two and more axes, each reading n values, become randn / sqrt(n) + 1 / n: an output is
    as large as its input however deep the model, and every value written into a stream has a mean along it.

    Call it on a freshly initialised model: the gain's form is told by its initial value.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(tensor):
        return torch.randn(tensor.shape, generator=generator).to(tensor.dtype)

    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        gain = own.get("weight")
        is_norm = (gain is not None and gain.ndim == 1) or "norm" in type(module).__name__.lower()
        for name, parameter in own.items():
            if not parameter.is_floating_point():
                continue
            if parameter.ndim >= 2:
                read = _values_read(module, parameter)
                parameter.copy_(min(0.5, read**-0.5) * randn(parameter) + min(0.5, 1 / read))
            elif "bias" in name:
                parameter.copy_((0.2 if is_norm else 0.1) * randn(parameter))
            else:
                one_plus = bool((parameter == 0).all())
                parameter.copy_((0 if one_plus else 1) + 0.3 * randn(parameter))
                if is_norm and not one_plus:  # what passes positive gains alone (an activation) must not be mistaken
                    parameter.mul_(torch.where(torch.rand(parameter.shape, generator=generator) < 0.25, -1, 1))
        for name, buffer in module.named_buffers(recurse=False):
            if name == "running_mean":
                buffer.copy_(0.5 * randn(buffer))
            elif name == "running_var":
                buffer.copy_(0.5 + 1.5 * torch.rand(buffer.shape, generator=generator).to(buffer.dtype))
    return model


def _values_read(module: nn.Module, weight: nn.Parameter) -> int:
    """How many values an output of `weight` is a sum of (a row's width, for tables and bare parameters)."""
    if not isinstance(module, nn.modules.conv._ConvNd):
        return weight.shape[-1]
    return weight.numel() // weight.shape[1 if module.transposed else 0]


def _mappings(task: str) -> list[dict[str, Any]]:
    if task == "CAUSAL_LM_OR_MASKED_LM":  # encoders can be built as decoders: masked first
        return [modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    names = (f"MODEL_FOR_{task}_MAPPING_NAMES", f"MODEL_FOR_{task}_NAMES")
    return [getattr(modeling_auto, name) for name in names if hasattr(modeling_auto, name)]


def _find(name: str, model_type: str) -> type[PreTrainedModel]:
    found = getattr(transformers, name, None)
    if found is not None:
        return found
    for module in _modelling_modules(CONFIG_MAPPING[model_type]):
        if hasattr(module, name):
            return getattr(module, name)
    raise CannotBuild(f"transformers has no class {name}")


def _modelling_modules(config_class: type[PretrainedConfig]) -> list[Any]:
    package = importlib.import_module(config_class.__module__.rpartition(".")[0])
    names = sorted(p.stem for p in Path(package.__file__).parent.glob("modeling_*.py"))
    return [importlib.import_module(f"{package.__name__}.{name}") for name in names]


def _by_configuration(config_class: type[PretrainedConfig]) -> type[PreTrainedModel]:
    """The model beside the configuration that says it is of that configuration: the most derived with a forward."""
    found = [
        cls
        for module in _modelling_modules(config_class)
        for cls in vars(module).values()
        if inspect.isclass(cls)
        and issubclass(cls, PreTrainedModel)
        and cls.__module__ == module.__name__
        and cls.config_class is config_class
        and cls.forward is not nn.Module.forward
    ]
    if not found:
        raise CannotBuild(f"transformers has no model of {config_class.__name__}")
    return max(found, key=lambda cls: ("For" in cls.__name__, len(inspect.getsource(cls))))


def _input(spec: dict[str, Any], generator: torch.Generator) -> Any:
    kind, shape = spec["kind"], spec.get("shape")
    if kind == "ids":
        return torch.randint(spec.get("low", 0), spec["high"], shape, generator=generator)
    if kind == "float":
        return torch.randn(shape, generator=generator)
    if kind == "uniform":
        return torch.rand(shape, generator=generator)
    if kind == "full":
        return torch.full(shape, spec.get("value", 1))
    return torch.tensor(spec["value"]) if kind == "values" else spec["value"]


def _underived(config: PretrainedConfig, small: dict[str, Any]) -> dict[str, Any]:
    """Without the keys that configurations derive from others: they derive them again from the small ones."""
    stated = {field.name for field in fields(config)}
    stored = {config.attribute_map.get(name, name) for name in stated}
    kept = stated | stored | {"model_type", "out_features", "out_indices", "image_size"}
    parts = {key: part for key, part in vars(config).items() if isinstance(part, PretrainedConfig)}
    small = {k: v for k, v in small.items() if k in kept or isinstance(v, bool | str)}  # flags do not shrink
    return {k: _underived(parts[k], v) if k in parts else v for k, v in small.items()}


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = {
        key: _merged(base[key], over[key])
        for key in base.keys() & over.keys()
        if isinstance(base[key], dict) and isinstance(over[key], dict)
    }
    return {**base, **over, **both}


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple(value["tuple"]) if value.keys() == {"tuple"} else {k: _tuples(v) for k, v in value.items()}
    return [_tuples(v) for v in value] if isinstance(value, list) else value
