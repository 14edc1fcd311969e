"""The recipes that come with normswap, and where a recipe's file is."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from normswap.errors import RecipeError


def shipped() -> dict[str, Path]:
    """The recipes that come with normswap, by name."""
    folder = Path(__file__).parents[1] / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find(name: str | Path) -> Path:
    """The file of a recipe, given that or the name of a shipped one. Raises RecipeError."""
    known = shipped()
    if str(name) in known:
        return known[str(name)]
    if not Path(name).is_file():
        near = get_close_matches(str(name), known, 1)
        meant = f" Did you mean {near[0]}?" if near else ""
        raise RecipeError(
            f"{name} is no file, and no recipe that comes with normswap ({', '.join(known) or 'none'}).{meant}"
        )
    return Path(name)
