"""The kinds of pixels and sound that a model takes, each with the ways to make it and what makes features of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from normswap.observe.inputs.needs import Needs, walk
from normswap.observe.inputs.pictures import pictures, regions, videos
from normswap.observe.inputs.sound import sounds

Inputs = dict[str, Any]
_PICTURES = ("pixel_values", "image_pixel_values", "flattened_patches")
#: what vision towers call their pixels when they stand alone
_TOWER_PICTURES = ("hidden_states", "image")
_SOUNDS = ("input_features", "input_values", "audio_values", "audio_input_features", "audio_mel")


@dataclass(frozen=True)
class Medium:
    """One kind of input: the ways to make it, and the paths of methods of the model that make features of it."""

    kind: str
    choices: list[Inputs]
    methods: list[str]


def media_of(needs: Needs) -> list[Medium]:
    """The kinds of pixels and sound that the model takes."""
    found = []
    pixels = _pixels(needs)
    if pixels:
        vision = _nested(
            needs, ("vision_config", "image_config", "vision", "visual_config"), ("patch_size", "image_size")
        )
        found.append(Medium("image", list(pictures(needs, vision, pixels)), _methods(needs, "image")))
    if "pixel_values_videos" in needs.taken:
        video = _nested(needs, ("video_config", "vision_config"), ("patch_size", "image_size"))
        found.append(Medium("video", list(videos(needs, video)), _methods(needs, "video")))
    if "visual_feats" in needs.taken:
        found.append(Medium("region", [regions(needs)], []))
    audio = _nested(needs, ("audio_config", "encoder_config", "speech_config"), ("num_mel_bins", "conv_stride"))
    names = [name for name in _SOUNDS if name in needs.taken]
    for name in names if needs.required.issuperset(names) else names[:1]:  # another form of the same sound if optional
        found.append(Medium("audio", list(sounds(needs, audio, name)), _methods(needs, "audio")))
    return [medium for medium in found if medium.choices and not _absent(needs, medium.kind)]


def _pixels(needs: Needs) -> str | None:
    """The name of the argument that pictures go into."""
    modalities = needs.model.input_modalities
    modalities = (modalities,) if isinstance(modalities, str) else modalities
    tower = "input_ids" not in needs.taken and (bool({"image", "video"} & {*modalities}) or "grid_thw" in needs.taken)
    names = _PICTURES + _TOWER_PICTURES if tower else _PICTURES
    return next((name for name in names if name in needs.taken), None)


def _absent(needs: Needs, kind: str) -> bool:
    """Whether the configuration says that there is no tower of this kind."""
    names = ("audio_config",) if kind == "audio" else ("vision_config",)
    return any(getattr(needs.config, name, needs) is None for name in names)


def _methods(needs: Needs, kind: str) -> list[str]:
    """Methods that make features of this kind: the model's own, and those of the models it wraps."""
    if "input_ids" not in needs.taken:
        return []
    name = f"get_{kind}_features"
    return [f"{path}.{name}".lstrip(".") for path, module in needs.model.named_modules() if hasattr(module, name)]


def _nested(needs: Needs, names: tuple[str, ...], keys: tuple[str, ...]) -> PretrainedConfig:
    """The configuration of the part that sees or hears: by its name, else the first that states one of `keys`."""
    named = (
        getattr(c, n) for c in walk(needs.config) for n in names if isinstance(getattr(c, n, None), PretrainedConfig)
    )
    return next(named, None) or next((c for c in walk(needs.config) if any(hasattr(c, k) for k in keys)), needs.config)
