"""Changes of a model's configuration."""

from __future__ import annotations

from typing import Literal

from normswap.planning.edits.bounds import Attribute, Dotted
from normswap.planning.edits.edit import Edit


class SetConfig(Edit):
    """One key of the configuration gets another value."""

    edit: Literal["set_config"] = "set_config"
    key: Dotted
    value: bool | int | float


class SetEps(SetConfig):
    """One key of the configuration that is the eps of norms gets another value, and so do the norms of a live model.

    Attributes:
        modules: path of each norm, and the attribute that holds its eps.
    """

    edit: Literal["set_eps"] = "set_eps"
    value: float
    modules: tuple[tuple[str, Attribute], ...]
