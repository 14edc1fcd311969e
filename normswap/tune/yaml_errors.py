"""What is wrong with a recipe, in lines for a person: where, what was found, what was expected or meant."""

from __future__ import annotations

import types
from difflib import get_close_matches
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from typing_extensions import is_typeddict


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """One line for each fault that pydantic found in a `model`."""
    lines = []
    faults = error.errors()
    for fault in faults:
        if fault["type"] == "too_short" and any(f["loc"][:-1][: len(fault["loc"])] == fault["loc"] for f in faults):
            continue  # its items are counted without those that have faults of their own
        where = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            *above, name = fault["loc"]
            known = sorted(_keys(model, above))
            near = get_close_matches(str(name), known, 1)
            hint = f"did you mean '{near[0]}'?" if near else f"expected one of {', '.join(known)}"
            lines.append(f"  {where}: no such key; {hint}")
        elif fault["type"] == "missing":
            lines.append(f"  {where}: is missing")
        else:
            message = fault["msg"].removeprefix("Value error, ")
            found = "" if isinstance(fault["input"], dict | list | tuple | BaseModel) else f", found {fault['input']!r}"
            lines.append(f"  {where}: {message}{found}" if where else f"  {message}")
    return "\n".join(dict.fromkeys(lines))


def _keys(annotation: Any, loc: list[Any]) -> set[str]:
    """The keys that what stands at `loc` may have."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _keys(get_args(annotation)[0], loc)
    if origin in (Union, types.UnionType):
        # in unions that are told apart by `kind`, pydantic names the kind in the path
        members = get_args(annotation)
        tagged = [m for m in members if loc and isinstance(m, type) and _kind(m) == loc[0]]
        return set().union(*(_keys(m, loc[1:] if tagged else loc) for m in tagged or members))
    if origin in (tuple, list):
        return _keys(get_args(annotation)[0], loc[1:] if loc and isinstance(loc[0], int) else loc)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if not loc:
            return set(annotation.model_fields)
        field = annotation.model_fields.get(str(loc[0]))
        if field is None:
            return set()
        return _keys(field.annotation, loc[1:])
    if is_typeddict(annotation):
        return set(annotation.__annotations__)
    return set()


def _kind(model: type) -> str | None:
    field = getattr(model, "model_fields", {}).get("kind")
    return get_args(field.annotation)[0] if field is not None else None
