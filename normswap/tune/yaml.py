"""YAML without its traps: no key twice, 1e-3 is a number, and `no` is a word. Values set by `key.sub=value`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from normswap.errors import RecipeError


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML has it, but for floats and booleans, which are those of 1.2, and for keys, which come once."""

    def construct_mapping(self, node, deep=False):
        seen: dict[Any, Any] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' is given twice, first in line {seen[key]}", key_node.start_mark
                )
            seen[key] = key_node.start_mark.line + 1
        return super().construct_mapping(node, deep)


_FLOAT = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
# `save_strategy: no`
_BOOL = "tag:yaml.org,2002:bool"
for _known in _Loader.yaml_implicit_resolvers.values():
    _known[:] = [(tag, pattern) for tag, pattern in _known if tag != _BOOL]
_Loader.add_implicit_resolver(_BOOL, re.compile("^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def read(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises RecipeError."""
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read: {error}.") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is no YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(found, dict):
        raise RecipeError(
            f"{path}: expected keys and values (model, surgery, stages, ...), found {type(found).__name__}."
        )
    return found


def dump(value: dict[str, Any]) -> str:
    """Plain data as YAML, in its own order."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)


def set_key(tree: dict[str, Any], override: str) -> None:
    """Set `key.sub=value` in place. What is on the way is made; items of lists are named by number, which the only one
    of a list does not need.

    Raises:
        RecipeError: no `=`, a value that is no YAML, or a key below something that has none.
    """
    path, equals, text = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise RecipeError(f"'{override}': expected key.sub=value, such as training.seed=1 or stages.0.tokens=100000.")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"'{override}': the value is no YAML: {' '.join(str(error).split())}.") from error
    at: Any = tree
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(at, list) and len(at) == 1 and not key.isdigit():
            at = at[0]  # one thing is meant as a list of one, and the other way round
        elif isinstance(at, dict) and key == "0" and at and depth and not last:
            continue
        if isinstance(at, list):
            if not key.isdigit() or int(key) >= len(at):
                raise RecipeError(f"'{override}': {'.'.join(keys[:depth])} is a list of {len(at)}; found item '{key}'.")
            key = int(key)
        elif not isinstance(at, dict):
            raise RecipeError(f"'{override}': {'.'.join(keys[:depth])} is {at!r}, which has no keys.")
        if last:
            held = at[key] if isinstance(at, list) else at.get(key)
            if depth == 0 and key == "model" and isinstance(held, dict) and isinstance(value, str):
                # another model, trained in the recipe's way; a revision is of the one that was named
                value = {name: kept for name, kept in held.items() if name != "revision"} | {"path": value}
            at[key] = value
            return
        below = at[key] if isinstance(at, list) else at.get(key)
        if below is None:
            below = {}
        elif isinstance(below, str) and depth == 0 and key == "model":
            below = {"path": below}  # the short form
        at[key] = below
        at = below
