"""What recipes need beside normswap's own requirements."""

from __future__ import annotations

from importlib.util import find_spec

from normswap.errors import RecipeError

_NEEDED = ("accelerate", "datasets", "matplotlib")


def missing() -> list[str]:
    """The packages that are not installed."""
    return [name for name in _NEEDED if find_spec(name) is None]


def check() -> None:
    """Raises RecipeError where a package is not installed."""
    if names := missing():
        raise RecipeError(f"recipes need {', '.join(names)}: pip install 'normswap[tune]'.")
