"""Series in time, and trajectories of states and actions."""

from __future__ import annotations

from typing import Any

import torch

from normswap.observe.inputs.needs import Needs

Inputs = dict[str, Any]


def series_parts(needs: Needs) -> list[list[Inputs]]:
    """Ways to make a series, or a trajectory, if the model takes one."""
    parts = []
    if "past_values" in needs.taken:
        parts.append(_series(needs))
    if "states" in needs.taken and "actions" in needs.taken:
        parts.append([_trajectory(needs)])
    return parts


def _series(needs: Needs) -> list[Inputs]:
    """The past as far as the lags reach, with or without an axis of channels, and what is known of the future."""
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
    """States, actions and rewards, one of each per step."""
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
