"""Spectra and samples of sound, in every layout that the signature and the configuration leave open."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PretrainedConfig

from normswap.observe.inputs.needs import Needs

Inputs = dict[str, Any]
#: numbers of samples: a fifth of a second, and what codecs and long strides need
_SAMPLES = (3200, 16000, 48000)
#: numbers of frames, tried where none is stated
_FRAMES = (64, 96, 128, 256, 400)
_BINS = (
    "num_mel_bins feature_size input_feat_per_channel mel_dim n_mels input_dim input_size input_feat_size "
    "feature_projection_input_dim num_chroma d_model"
).split()
_MASKS = ("input_features_mask", "feature_attention_mask", "input_values_mask", "audio_mel_mask", "mask")


def sounds(needs: Needs, config: PretrainedConfig, name: str) -> Iterator[Inputs]:
    """Sound for the argument `name`, with its masks and lengths."""
    stated = (needs.stated(key, within=config) for key in _BINS)
    bins = list(dict.fromkeys(n for n in stated if type(n) is int))[:3] or [128, 80]
    bins += [4 * bins[0]]  # four frames stacked
    if "feature_lens" in needs.taken:
        yield from _in_one_row(needs, config, name, bins)
    waves = [(shape, n) for n in _SAMPLES for shape in _waves(needs, config, n)]
    spectra = [(shape, n) for n in _lengths(needs, config) for width in bins for shape in _spectra(needs, n, width)]
    for shape, time in waves + spectra if "values" in name else spectra + waves:
        beside = _beside(needs, time)
        yield {name: needs.randn(*shape), **beside}
        bare = {key: value for key, value in beside.items() if key in needs.required}
        if bare.keys() != beside.keys():  # some take their mask in the form that attention takes it
            yield {name: needs.randn(*shape), **bare}


def _lengths(needs: Needs, config: PretrainedConfig) -> list[int]:
    """Numbers of frames: those that make as many positions as there are, then what is stated, then usual ones."""
    positions = needs.stated("max_source_positions", within=config)
    fitting = [2 * positions] if isinstance(positions, int) and positions < 4000 else []
    stated = needs.stated("max_length", "spec_size", within=config)
    return list(dict.fromkeys([*fitting, *([stated] if type(stated) is int else []), *_FRAMES]))


def _spectra(needs: Needs, frames: int, bins: int) -> Iterator[tuple[int, ...]]:
    """Bins last, bins first, or with an axis for one channel."""
    yield needs.batch, frames, bins
    yield needs.batch, bins, frames
    yield needs.batch, 1, frames, bins


def _waves(needs: Needs, config: PretrainedConfig, samples: int) -> Iterator[tuple[int, ...]]:
    """Samples alone, with channels before them, or in frames of one."""
    channels = needs.stated("audio_channels", within=config, default=1)
    yield needs.batch, samples
    yield needs.batch, channels, samples
    yield needs.batch, samples, 1


def _in_one_row(needs: Needs, config: PretrainedConfig, name: str, bins: list[int]) -> Iterator[Inputs]:
    """The frames of all rows one after another, with the length of each, before and after the first convolutions."""
    for width, frames in itertools.product(bins, _lengths(needs, config)):
        lengths = torch.full((needs.batch,), frames)
        after = {"aftercnn_lens": (lengths - 1) // 2 + 1} if "aftercnn_lens" in needs.taken else {}
        yield {name: needs.randn(width, needs.batch * frames), "feature_lens": lengths, **after}


def _beside(needs: Needs, time: int) -> Inputs:
    """Masks that let all of `time` through, and lengths."""
    names = _MASKS if "input_ids" in needs.taken else (*_MASKS, "attention_mask")
    mask = torch.ones(needs.batch, time, dtype=torch.long)
    extra: Inputs = {
        name: mask.bool() if "Bool" in needs.annotations[name] or name == "mask" else mask
        for name in names
        if name in needs.taken
    }
    if "audio_feature_lengths" in needs.taken:
        extra["audio_feature_lengths"] = torch.full((needs.batch,), time)
    if "chunk_sample_lengths" in needs.taken:
        hop = needs.stated("hop_length", default=160)
        extra["chunk_sample_lengths"] = torch.full((needs.batch,), time * hop)
    return extra
