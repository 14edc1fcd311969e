"""What became of adapters, in lines for a person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def adapter_lines(adapters: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each record of `adapters.publish_adapters`."""
    return [_line(adapter) for adapter in adapters]


def _line(adapter: Mapping[str, Any]) -> str:
    said = f"adapter {adapter['name']}: {len(adapter['changed'])} of {adapter['tensors']} tensors changed"
    if adapter["biased"]:
        said += ", and biases of B added (lora_bias), for norms' biases that were folded"
    measured = adapter["measured"]
    if measured is None:
        return f"{said}; NOT VERIFIED"
    stored = "" if measured["stored"] is None else f", as stored {measured['stored']:.1e}"
    return (
        f"{said}; worst error {measured['error']:.1e} in {measured['dtype']}{stored}, of outputs that it changes by "
        f"{measured['effect']:.1e}"
    )
