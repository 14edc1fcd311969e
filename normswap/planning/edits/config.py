"""Changes of a model's configuration."""

from __future__ import annotations

from typing import Any, Literal

from normswap.planning.edits.edit import Edit


class SetConfig(Edit):
    """One key of the configuration gets another value."""

    edit: Literal["set_config"] = "set_config"
    key: str
    value: Any
