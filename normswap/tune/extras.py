"""What recipes need beside normswap's own requirements."""

from __future__ import annotations

from importlib.util import find_spec

from normswap.errors import RecipeError

_NEEDED = ("accelerate", "datasets", "matplotlib")


def check() -> None:
    """Raises RecipeError where a package is not installed."""
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise RecipeError(f"recipes need {', '.join(missing)}: pip install 'normswap[tune]'.")


def is_main_process() -> bool:
    """Whether this is the one of several processes that speaks."""
    from accelerate import PartialState

    return PartialState().is_main_process
