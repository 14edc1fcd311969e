"""Pixels, frames and sound, in every layout that the signature and the configuration leave open."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from normswap.observe.inputs.needs import Needs, walk

Inputs = dict[str, Any]
#: sides tried where none is stated: two that differ, then squares for models that want them
_SIDES = ((64, 96), (64, 64), (128, 128), (224, 224))


@dataclass(frozen=True)
class Medium:
    """One kind of input: the ways to make it, and the model's own method that makes features of it."""

    kind: str
    choices: list[Inputs]
    method: str | None


def media_of(needs: Needs) -> list[Medium]:
    """The kinds of pixels and sound that the model takes."""
    found = []
    vision = _nested(needs, ("vision_config", "image_config", "vision", "visual_config"), ("patch_size", "image_size"))
    pixels = "pixel_values" if "pixel_values" in needs.taken else None
    modalities = needs.model.input_modalities
    modalities = (modalities,) if isinstance(modalities, str) else modalities
    seeing = bool({"image", "video"} & set(modalities)) or "grid_thw" in needs.taken
    if pixels is None and seeing and "input_ids" not in needs.taken:
        pixels = next((n for n in ("hidden_states", "image", "flattened_patches") if n in needs.taken), None)
    if pixels:
        found.append(Medium("image", list(_pictures(needs, vision, pixels)), _method(needs, "image")))
    if "pixel_values_videos" in needs.taken:
        video = _nested(needs, ("video_config", "vision_config"), ("patch_size", "image_size"))
        found.append(Medium("video", list(_videos(needs, video)), _method(needs, "video")))
    sound = next((n for n in ("input_features", "input_values", "audio_values") if n in needs.taken), None)
    if sound:
        audio = _nested(needs, ("audio_config", "encoder_config", "speech_config"), ("num_mel_bins", "conv_stride"))
        found.append(Medium("audio", list(_sounds(needs, audio, sound)), _method(needs, "audio")))
    return [medium for medium in found if medium.choices and not _absent(needs, medium.kind)]


def _absent(needs: Needs, kind: str) -> bool:
    """Whether the configuration says that there is no tower of this kind."""
    names = ("audio_config",) if kind == "audio" else ("vision_config",)
    return any(getattr(needs.config, name, needs) is None for name in names)


def _method(needs: Needs, kind: str) -> str | None:
    """The path of the method that makes features of this kind: the model's own, or that of the model it wraps."""
    if "input_ids" not in needs.taken:
        return None
    name = f"get_{kind}_features"
    return next((f"{path}.{name}".lstrip(".") for path, m in needs.model.named_modules() if hasattr(m, name)), None)


def _nested(needs: Needs, names: tuple[str, ...], keys: tuple[str, ...]) -> PretrainedConfig:
    """The configuration of the part that sees or hears: by its name, else the first that states one of `keys`."""
    named = (
        getattr(c, n) for c in walk(needs.config) for n in names if isinstance(getattr(c, n, None), PretrainedConfig)
    )
    return next(named, None) or next((c for c in walk(needs.config) if any(hasattr(c, k) for k in keys)), needs.config)


def _pair(value: Any) -> tuple[int, int] | None:
    if isinstance(value, dict):
        value = [value.get("height", value.get("shortest_edge")), value.get("width", value.get("shortest_edge"))]
    if isinstance(value, list | tuple):
        return (
            (int(value[-2]), int(value[-1]))
            if len(value) >= 2 and all(value)
            else (int(value[0]),) * 2
            if value
            else None
        )
    return (int(value), int(value)) if value else None


def _sides(needs: Needs, config: PretrainedConfig) -> list[tuple[int, int]]:
    stated = _pair(needs.stated("image_size", "img_size", "input_size", "resolution", "crop_size", within=config))
    return [stated, *_SIDES[1:]] if stated else list(_SIDES)


def _patch(needs: Needs, config: PretrainedConfig) -> tuple[int, int, int, int]:
    """Channels, frames and sides of one patch."""
    channels = needs.stated("num_channels", "in_channels", "in_chans", "input_channels", within=config, default=3)
    size = _pair(needs.stated("patch_size", "patch_sizes", within=config)) or (4, 4)
    frames = needs.stated("temporal_patch_size", "tubelet_size", within=config, default=1)
    frames = frames[0] if isinstance(frames, list | tuple) else frames
    return channels if isinstance(channels, int) else 3, int(frames), *size


def _merge(needs: Needs, config: PretrainedConfig) -> int:
    merge = needs.stated("spatial_merge_size", "merge_kernel_size", "merge_size", within=config, default=1)
    return int(merge[0] if isinstance(merge, list | tuple) else merge)


def _grid(needs: Needs, config: PretrainedConfig, frames: int) -> list[tuple[int, int, int]]:
    """Patches in time, height and width: whole merged patches, and taller than wide where that is allowed."""
    merge = _merge(needs, config)
    sides = [(2 * merge, 3 * merge), (4 * merge, 4 * merge)] if merge > 1 else [(2, 4), (4, 6), (4, 4), (8, 8)]
    return [(frames, high, wide) for high, wide in sides]


def _flattened(needs: Needs, config: PretrainedConfig, name: str, grid_name: str, frames: int) -> Iterator[Inputs]:
    """Patches of all pictures in one list, with a table of how many there are of each."""
    channels, deep, tall, broad = _patch(needs, config)
    for grid in _grid(needs, config, frames):
        count = needs.batch * grid[0] * grid[1] * grid[2]
        table = torch.tensor([grid[-2:] if grid_name.endswith("_hw") else grid] * needs.batch)
        extra = {
            n: torch.full((needs.batch,), _merge(needs, config))
            for n in ("merge_sizes", "image_merge_sizes")
            if n in needs.taken
        }
        for shape in ((channels * deep * tall * broad,), (channels, tall, broad), (channels * tall * broad,)):
            yield {name: needs.randn(count, *shape), grid_name: table, **extra}
        yield {
            name: needs.randn(needs.batch, count // needs.batch, channels * deep * tall * broad),
            grid_name: table,
            **extra,
        }


def _pictures(needs: Needs, config: PretrainedConfig, name: str) -> Iterator[Inputs]:
    grid_name = next((n for n in ("image_grid_thw", "grid_thw", "image_grid_hw", "grid_hw") if n in needs.taken), None)
    if grid_name:
        yield from _flattened(needs, config, name, grid_name, 1)
    channels, _, tall, broad = _patch(needs, config)
    if "spatial_shapes" in needs.taken:
        for _, high, wide in _grid(needs, config, 1):
            yield {
                name: needs.randn(needs.batch, high * wide, channels * tall * broad),
                "spatial_shapes": torch.tensor([[high, wide]] * needs.batch),
                "pixel_attention_mask": torch.ones(needs.batch, high * wide, dtype=torch.long),
            }
    position = next((n for n in ("pixel_position_ids", "image_position_ids") if n in needs.taken), None)
    if position:
        for _, high, wide in [(1, 4, 4), (1, 4, 6), (1, 6, 6), (1, 12, 12)]:
            places = torch.cartesian_prod(torch.arange(wide), torch.arange(high)).expand(needs.batch, -1, -1)
            yield {name: needs.randn(needs.batch, high * wide, channels * tall * broad), position: places}
    if name == "flattened_patches":
        rows = torch.arange(1, 7).reshape(1, 6, 1).expand(needs.batch, 6, 1).float()
        yield {name: torch.cat([rows, rows, needs.randn(needs.batch, 6, channels * tall * broad)], -1)}
        return
    for side in _sides(needs, config):
        yield from _unflattened(needs, config, name, side)
        yield {name: needs.randn(needs.batch, (side[0] // tall) * (side[1] // broad), channels * tall * broad)}


def _unflattened(needs: Needs, config: PretrainedConfig, name: str, side: tuple[int, int]) -> Iterator[Inputs]:
    """Whole pictures: frames of a film where a number of them is stated, one picture, one in tiles, several."""
    channels, *_ = _patch(needs, config)
    if "aspect_ratio_ids" in needs.taken:
        tiles = needs.stated("max_num_tiles", within=config, default=4)
        yield {
            name: needs.randn(needs.batch, 1, tiles, channels, *side),
            "aspect_ratio_ids": torch.ones(needs.batch, 1, dtype=torch.long),
            "aspect_ratio_mask": torch.ones(needs.batch, 1, tiles, dtype=torch.long),
        }
    frames = needs.stated("num_frames", within=config)
    leads = [(needs.batch,), *((needs.batch, n) for n in (1, 3, 5, 2))]
    if isinstance(frames, int):
        leads.insert(0, (needs.batch, frames))
    if needs.stated("image_grid_pinpoints") is not None:  # the whole picture and its tiles, two of them first
        leads.insert(0, (needs.batch, 3))
    for lead in leads:
        companions = _companions(needs, side, lead)
        if len(lead) == 1 and companions:
            yield {name: needs.randn(*lead, channels, *side)}
        yield {name: needs.randn(*lead, channels, *side), **companions}


def _companions(needs: Needs, side: tuple[int, int], lead: tuple[int, ...]) -> Inputs:
    extra: Inputs = {}
    if "image_sizes" in needs.taken:
        extra["image_sizes"] = torch.tensor([side] * lead[0])
    if "high_res_pixel_values" in needs.taken:
        fine = needs.stated("high_res_vision_config", default=needs.config)
        high, wide = _sides(needs, fine)[0]
        extra["high_res_pixel_values"] = needs.randn(*lead, 3, high, wide)
    if "pixel_attention_mask" in needs.taken:
        extra["pixel_attention_mask"] = torch.ones(*lead, *side, dtype=torch.long)
    return extra


def _videos(needs: Needs, config: PretrainedConfig) -> Iterator[Inputs]:
    name = "pixel_values_videos"
    grid_name = next((n for n in ("video_grid_thw", "grid_thw") if n in needs.taken), None)
    if grid_name:
        for choice in _flattened(needs, config, name, grid_name, 2):
            if "video_merge_sizes" in needs.taken:
                choice["video_merge_sizes"] = choice.pop(
                    "image_merge_sizes", torch.full((needs.batch,), _merge(needs, config))
                )
            yield choice
        return
    channels, *_ = _patch(needs, config)
    stated = needs.stated("num_frames", "frames_per_clip", within=config)
    for side in _sides(needs, config):
        for frames in dict.fromkeys(n for n in (stated, 2, 4, 8) if isinstance(n, int)):
            yield {name: needs.randn(needs.batch, frames, channels, *side)}
            if "video_grid_thw" not in needs.taken:
                yield {name: needs.randn(needs.batch, channels, frames, *side)}


def _sounds(needs: Needs, config: PretrainedConfig, name: str) -> Iterator[Inputs]:
    """Spectra with the channels first or last, or samples with or without an axis of channels."""
    bins = needs.stated(
        "num_mel_bins", "feature_size", "input_feat_per_channel", "mel_dim", "n_mels", "input_dim", within=config
    )
    positions = needs.stated("max_source_positions", within=config)
    lengths = [2 * positions] if isinstance(positions, int) and positions < 4000 else []
    lengths += [needs.stated("max_length", "spec_size", within=config), 64, 96, 128, 256, 400]
    lengths = list(dict.fromkeys(n for n in lengths if isinstance(n, int)))
    samples = [3200, 16000, 48000]
    channels = needs.stated("audio_channels", within=config, default=1)
    widths = [bins] if isinstance(bins, int) else [128, 80]
    spectra = [
        shape
        for n in lengths
        for width in widths
        for shape in ((needs.batch, n, width), (needs.batch, width, n), (needs.batch, 1, n, width))
    ]
    waves = [shape for n in samples for shape in ((needs.batch, n), (needs.batch, channels, n), (needs.batch, n, 1))]
    for shape in spectra if name == "input_features" else waves + spectra:
        time = next((n for n in shape[1:] if n in lengths or n in samples), shape[-1])
        yield {name: needs.randn(*shape), **_masks(needs, time)}


def _masks(needs: Needs, time: int) -> Inputs:
    names = ["input_features_mask", "feature_attention_mask", "padding_mask", "input_values_mask", "audio_mel_mask"]
    if "input_ids" not in needs.taken:
        names.append("attention_mask")
    extra: Inputs = {
        n: torch.ones(needs.batch, time, dtype=torch.long) for n in names if n in needs.taken and n != "padding_mask"
    }
    if "audio_feature_lengths" in needs.taken:
        extra["audio_feature_lengths"] = torch.full((needs.batch,), time)
    return extra
