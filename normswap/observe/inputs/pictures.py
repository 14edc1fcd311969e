"""Pixels of pictures and films, in every layout that the signature and the configuration leave open."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from normswap.observe.inputs.needs import Needs, widths

Inputs = dict[str, Any]
#: sides tried where none is stated: two that differ, then squares for models that want them
_SIDES = ((64, 96), (64, 64), (128, 128), (224, 224))


@dataclass(frozen=True)
class _Patch:
    """One patch: its channels, frames, height and width, and how many of them are merged into one along each side."""

    channels: int
    frames: int
    tall: int
    broad: int
    merge: int

    @classmethod
    def of(cls, needs: Needs, config: PretrainedConfig) -> _Patch:
        channels = needs.stated("num_channels", "in_channels", "in_chans", "input_channels", within=config, default=3)
        tall, broad = _pair(needs.stated("patch_size", "patch_sizes", within=config)) or (4, 4)
        frames = needs.stated("temporal_patch_size", "tubelet_size", "patch_temporal", within=config, default=1)
        merge = needs.stated("spatial_merge_size", "merge_kernel_size", "merge_size", within=config, default=1)
        return cls(channels if isinstance(channels, int) else 3, _first(frames), tall, broad, _first(merge))

    @property
    def area(self) -> int:
        """Numbers in the patch of one picture."""
        return self.channels * self.tall * self.broad


def pictures(needs: Needs, config: PretrainedConfig, name: str) -> Iterator[Inputs]:
    """Pixels for the argument `name`: the layouts that the other arguments of the forward speak for come first."""
    patch = _Patch.of(needs, config)
    if name == "flattened_patches":
        yield from _with_places_inside(needs, patch, name)
        return
    table = next((n for n in ("image_grid_thw", "grid_thw", "image_grid_hw", "grid_hw") if n in needs.taken), None)
    if table:
        yield from _listed(needs, patch, name, table, 1)
    if "target_sizes" in needs.taken:
        yield from _strip(needs, patch, name, "target_sizes")
    if "spatial_shapes" in needs.taken:
        yield from _padded(needs, patch, name)
    places = next((n for n in ("pixel_position_ids", "image_position_ids") if n in needs.taken), None)
    if places:
        yield from _with_places_beside(needs, patch, name, places)
    for side in _sides(needs, config):
        yield from _whole(needs, config, name, side)
        count = (side[0] // patch.tall) * (side[1] // patch.broad)
        yield {name: needs.randn(needs.batch, count, patch.area)}
        yield {name: needs.randn(needs.batch * count, patch.area)}
    if name == "hidden_states":  # what another part of the model made of the pixels
        yield from ({name: needs.randn(needs.batch, needs.length, width)} for width in widths(config))


def videos(needs: Needs, config: PretrainedConfig) -> Iterator[Inputs]:
    """Films for `pixel_values_videos`: patches in one list, a strip of patches, or frames before or after channels."""
    name, patch = "pixel_values_videos", _Patch.of(needs, config)
    table = next((n for n in ("video_grid_thw", "grid_thw") if n in needs.taken), None)
    if table:
        yield from _listed(needs, patch, name, table, 2)
        return
    if "target_sizes_videos" in needs.taken:
        yield from _strip(needs, patch, name, "target_sizes_videos")
    stated = needs.stated("num_frames", "frames_per_clip", within=config)
    for side in _sides(needs, config):
        for frames in dict.fromkeys(n for n in (stated, 2, 4, 8) if isinstance(n, int)):
            yield {name: needs.randn(needs.batch, frames, patch.channels, *side)}
            yield {name: needs.randn(needs.batch, patch.channels, frames, *side)}


def regions(needs: Needs) -> Inputs:
    """Features of regions of a picture that another model found, with the corners of each."""
    width = needs.stated("visual_feat_dim", "hidden_size")
    corners = torch.rand(needs.batch, needs.target, 4, generator=needs.generator)
    return {"visual_feats": needs.randn(needs.batch, needs.target, width), "visual_pos": corners}


def _listed(needs: Needs, patch: _Patch, name: str, table: str, frames: int) -> Iterator[Inputs]:
    """Patches of all pictures in one list, with a table of how many there are of each in time, height and width.

    A patch is flat, with its frames or without, or has its axes; the list may have an axis of batches, of one or all;
    its entries, and those of the table, may be blocks of merged patches with the channels last.
    """
    merge = patch.merge
    for grid in _grids(merge, frames):
        each = grid[0] * grid[1] * grid[2]
        count = needs.batch * each
        beside: Inputs = {table: torch.tensor([grid[-2:] if table.endswith("_hw") else grid] * needs.batch)}
        sizes = "video_merge_sizes" if name.endswith("videos") else "image_merge_sizes"
        beside |= {n: torch.full((needs.batch,), merge) for n in ("merge_sizes", sizes) if n in needs.taken}
        for shape in (
            (count, patch.frames * patch.area),
            (count, patch.channels, patch.tall, patch.broad),
            (count, patch.area),
            (needs.batch, each, patch.frames * patch.area),
            (1, count, patch.channels, patch.tall, patch.broad),
            (count // merge**2, merge * patch.tall, merge * patch.broad, patch.channels),
            (count, merge * patch.tall, merge * patch.broad, patch.channels),
        ):
            yield {name: needs.randn(*shape), **beside}


def _grids(merge: int, frames: int) -> list[tuple[int, int, int]]:
    """Patches in time, height and width: whole merged patches, and taller than wide where that is allowed."""
    sides = [(2 * merge, 3 * merge), (4 * merge, 4 * merge)] if merge > 1 else [(2, 4), (4, 6), (4, 4), (8, 8)]
    return [(frames, high, wide) for high, wide in sides]


def _strip(needs: Needs, patch: _Patch, name: str, table: str) -> Iterator[Inputs]:
    """All patches of all pictures side by side in one strip, a patch high, with the height and width of each."""
    for high, wide in ((4, 8), (8, 8)):
        strip = needs.randn(1, patch.channels, patch.tall, patch.broad * high * wide * needs.batch)
        yield {name: strip, table: torch.tensor([[high, wide]] * needs.batch, dtype=torch.int32)}


def _padded(needs: Needs, patch: _Patch, name: str) -> Iterator[Inputs]:
    """As many patches of each picture as of the largest, with the height and width of each and a mask."""
    for _, high, wide in _grids(patch.merge, 1):
        yield {
            name: needs.randn(needs.batch, high * wide, patch.area),
            "spatial_shapes": torch.tensor([[high, wide]] * needs.batch),
            "pixel_attention_mask": torch.ones(needs.batch, high * wide, dtype=torch.long),
        }


def _with_places_beside(needs: Needs, patch: _Patch, name: str, places: str) -> Iterator[Inputs]:
    """Flat patches, with the column and row of each in an argument of its own."""
    for high, wide in [(4, 4), (4, 6), (6, 6), (12, 12)]:
        grid = torch.cartesian_prod(torch.arange(wide), torch.arange(high)).expand(needs.batch, -1, -1)
        yield {name: needs.randn(needs.batch, high * wide, patch.area), places: grid}


def _with_places_inside(needs: Needs, patch: _Patch, name: str) -> Iterator[Inputs]:
    """Flat patches that begin with their row and column."""
    for count in (6, 16):
        rows = torch.arange(1, count + 1).reshape(1, count, 1).expand(needs.batch, count, 1).float()
        for area in dict.fromkeys((patch.area, 3 * patch.tall * patch.broad)):
            yield {name: torch.cat([rows, rows, needs.randn(needs.batch, count, area)], -1)}


def _whole(needs: Needs, config: PretrainedConfig, name: str, side: tuple[int, int]) -> Iterator[Inputs]:
    """Whole pictures: frames of a film where a number of them is stated, one picture, one in tiles, several."""
    channels = _Patch.of(needs, config).channels
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
    """What goes with whole pictures: their sizes, the same in finer pixels, which pixels count."""
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


def _sides(needs: Needs, config: PretrainedConfig) -> list[tuple[int, int]]:
    stated = _pair(needs.stated("image_size", "img_size", "input_size", "resolution", "crop_size", within=config))
    return [stated, *_SIDES[1:]] if stated else list(_SIDES)


def _first(value: Any) -> int:
    return int(value[0] if isinstance(value, list | tuple) else value)


def _pair(value: Any) -> tuple[int, int] | None:
    """Height and width from a number, a list or a dictionary; None where nothing is stated."""
    if isinstance(value, dict):
        value = [value.get(side, value.get("shortest_edge")) for side in ("height", "width")]
    if not isinstance(value, list | tuple):
        value = [value]
    if not value or not all(value):
        return None
    return (int(value[-2]), int(value[-1])) if len(value) > 1 else (int(value[0]),) * 2
