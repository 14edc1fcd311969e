"""Series in time, embeddings and whatever else a forward cannot do without."""

from __future__ import annotations

from typing import Any

import torch

from normswap.observe.inputs.needs import Needs

Inputs = dict[str, Any]
_WIDTHS = ("hidden_size", "d_model", "embed_dim", "n_embd", "dim", "encoder_hidden_size", "input_dim", "latent_dim")


def other_parts(needs: Needs, made: set[str]) -> list[list[Inputs]]:
    """Ways to make inputs that are neither ids nor pixels nor sound, those in `made` aside."""
    parts = []
    if "past_values" in needs.taken:
        parts.append(_series(needs))
    if "states" in needs.taken and "actions" in needs.taken:
        parts.append([_trajectory(needs)])
    made = made | {name for choices in parts for choice in choices for name in choice}
    for name in sorted(needs.required - made):
        choices = _embedding(needs, name)
        if choices:
            parts.append(choices)
    if "visual_feats" in needs.taken:
        width = needs.stated("visual_feat_dim", default=needs.stated(*_WIDTHS))
        places = torch.rand(needs.batch, needs.target, 4, generator=needs.generator)
        parts.append([{"visual_feats": needs.randn(needs.batch, needs.target, width), "visual_pos": places}])
    return parts


def _series(needs: Needs) -> list[Inputs]:
    context = needs.stated("context_length", default=needs.length)
    lags = max(needs.stated("lags_sequence", default=[0]) or [0])
    ahead = needs.stated("prediction_length", default=needs.target) or needs.target
    channels = needs.stated("num_input_channels", "input_size", default=1)
    past = context + lags
    features = needs.stated("num_time_features", default=0) or 0
    known: Inputs = {
        "past_time_features": needs.randn(needs.batch, past, features),
        "past_observed_mask": torch.ones(needs.batch, past),
        "future_values": needs.randn(needs.batch, ahead),
        "future_time_features": needs.randn(needs.batch, ahead, features),
        "past_values_padding": torch.zeros(needs.batch, past, dtype=torch.long),
    }
    required = {
        name: value
        for name, value in known.items()
        if name in needs.required or "time_features" in name or name == "future_values"
    }
    required = {name: value for name, value in required.items() if name in needs.taken}
    if "past_time_features" not in needs.taken:
        required.pop("future_values", None)
    flat, wide = needs.randn(needs.batch, past), needs.randn(needs.batch, past, channels)
    padding = {"past_values_padding": known["past_values_padding"]} if "past_values_padding" in needs.taken else {}
    order = (flat, wide) if channels == 1 else (wide, flat)
    return [{"past_values": series, **required, **padding} for series in order]


def _trajectory(needs: Needs) -> Inputs:
    states, actions = needs.stated("state_dim", default=4), needs.stated("act_dim", default=2)
    steps = torch.arange(needs.length).expand(needs.batch, needs.length)
    return {
        "states": needs.randn(needs.batch, needs.length, states),
        "actions": needs.randn(needs.batch, needs.length, actions),
        "rewards": needs.randn(needs.batch, needs.length, 1),
        "returns_to_go": needs.randn(needs.batch, needs.length, 1),
        "timesteps": steps,
        "attention_mask": torch.ones(needs.batch, needs.length, dtype=torch.long),
    }


def _embedding(needs: Needs, name: str) -> list[Inputs]:
    """Embeddings of every width that the configuration states, where the name says that it is one."""
    if name in ("inputs_embeds", "query_embeds", "hidden_states", "spectrogram", "mel_spectrogram", "latents"):
        keys = _WIDTHS if "spec" not in name else ("num_mel_bins", "model_in_dim", "mel_dim")
        widths = dict.fromkeys(v for key in keys if isinstance(v := needs.stated(key), int))
        return [
            {name: needs.randn(*shape)}
            for width in widths
            for shape in ((needs.batch, needs.length, width), (needs.batch, width, needs.length))
        ]
    if name == "attention_mask":
        return [{name: torch.ones(needs.batch, needs.length, dtype=torch.long)}]
    return []
