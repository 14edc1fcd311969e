"""What a configuration asks for that is no number of a model: other code, other files, weights that wait for scales."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from normswap.errors import SourceError

_QUANTISED = ("quantization_config", "compression_config")
# transformers fetches what these name from the Hub and runs it, whether code is trusted or not
_KERNELS = ("attn_implementation", "experts_implementation", "_attn_implementation", "_experts_implementation")


def check_demands(name: str, raw: dict[str, Any], trust_remote_code: bool) -> None:
    """Refuse a configuration that cannot be met, or may not be without `trust_remote_code`.

    Args:
        raw: what `config.json` says.

    Raises:
        SourceError: the checkpoint is quantised, names kernels of the Hub, or other configuration files.
    """
    for config in _nested(raw):
        for key in _QUANTISED:
            if config.get(key):
                said = config[key]
                method = said.get("quant_method", "unknown") if isinstance(said, dict) else said
                raise SourceError(
                    f"{name} is quantised ({method!s:.60}): its weights cannot be edited exactly. Convert the "
                    f"unquantised checkpoint it was made from, then quantise the result."
                )
        for key in _KERNELS:
            if not trust_remote_code and _names_code(config.get(key)):
                raise SourceError(
                    f"{name}: config.json has {key} {config[key]!r:.100}, code that would be fetched and run. If you "
                    "trust it, add --trust-remote-code, or take the key away."
                )
    if "configuration_files" in raw:
        raise SourceError(
            f"{name}: config.json names other files to read in its place (configuration_files). Save the one that is "
            "meant as config.json."
        )


def _nested(raw: Any) -> Iterator[dict[str, Any]]:
    """The configuration and all that are nested in it."""
    waiting = [raw]
    while waiting:
        config = waiting.pop()
        yield config
        waiting += [part for part in config.values() if isinstance(part, dict)]


def _names_code(value: Any) -> bool:
    values = value.values() if isinstance(value, dict) else [value]
    return any(isinstance(one, str) and "/" in one for one in values)
