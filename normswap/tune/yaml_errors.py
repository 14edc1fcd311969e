"""What is wrong with a recipe, in lines for a person: where, what was found, what was expected or meant."""

from __future__ import annotations

import re
import types
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ValidationError
from typing_extensions import is_typeddict

#: what was expected, by the type of a fault of pydantic's; filled in from its context
_EXPECTED = {
    "literal_error": "{expected}",
    "union_tag_invalid": "`kind` to be one of {expected_tags}",
    "union_tag_not_found": "keys and values, among them `kind`",
    "model_attributes_type": "keys and values",
    "model_type": "keys and values",
    "dict_type": "keys and values",
    "tuple_type": "a list",
    "is_instance_of": "a list",
    "too_short": "one item at least",
    "string_type": "text",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "greater_than": "more than {gt}",
    "greater_than_equal": "{ge} or more",
    "less_than": "less than {lt}",
    "less_than_equal": "{le} or less",
}


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """One line for each fault that pydantic found in a `model`; members of a union make one line together."""
    said: dict[str, list[str]] = {}
    expected: dict[str, tuple[list[str], str]] = {}
    faults = error.errors()
    for fault in faults:
        if fault["type"] == "too_short" and any(f["loc"][:-1][: len(fault["loc"])] == fault["loc"] for f in faults):
            continue  # its items are counted without those that have faults of their own
        path, keys = _place(model, fault["loc"])
        where = ".".join(map(str, path))
        lines = said.setdefault(where, [])
        if fault["type"] == "extra_forbidden":
            lines.append(f"no such key; {_meant(str(path[-1]), sorted(_place(model, fault['loc'][:-1])[1]))}")
        elif fault["type"] == "missing":
            lines.append("is missing")
        elif fault["type"] in _EXPECTED:
            words = _EXPECTED[fault["type"]].format(**fault.get("ctx", {}))
            words += f" ({', '.join(sorted(keys))})" if words == "keys and values" and keys else ""
            expected.setdefault(where, ([], _found(fault)))[0].append(words)
        else:
            lines += [f"{line}{_found(fault)}" for line in fault["msg"].removeprefix("Value error, ").split("\n")]
    for where, (words, found) in expected.items():
        said[where].append(f"expected {', or '.join(dict.fromkeys(words))}{found}")
    return "\n".join(f"  {where}: {line}" if where else f"  {line}" for where in said for line in said[where])


def _found(fault: Any) -> str:
    """What stands there, and what of the words expected it is close to."""
    value = fault["input"]
    if isinstance(value, BaseModel):
        return ""
    if isinstance(value, dict | list | tuple):
        tag = fault.get("ctx", {}).get("tag")
        if tag is None and value:
            return f", found {_kind_of(value)}" if fault["type"] in ("tuple_type", "string_type") else ""
        value = tag if tag is not None else value
    known = re.findall(r"'([^']*)'", _EXPECTED.get(fault["type"], "").format(**fault.get("ctx", {})))
    near = get_close_matches(str(value), known, 1)
    return f", found {value!r}" + (f"; did you mean '{near[0]}'?" if near else "")


def _kind_of(value: Any) -> str:
    return "keys and values" if isinstance(value, dict) else "a list"


def _meant(name: str, known: list[str]) -> str:
    near = get_close_matches(name, known, 1)
    return f"did you mean '{near[0]}'?" if near else f"expected one of {', '.join(known)}"


def _place(annotation: Any, loc: Sequence[Any], path: tuple[Any, ...] = ()) -> tuple[tuple[Any, ...], set[str]]:
    """Where `loc` is in the file, without the members of unions that pydantic names in it; and the keys it may have."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _place(get_args(annotation)[0], loc, path)
    if origin in (Union, types.UnionType):
        members = [member for member in get_args(annotation) if member is not type(None)]
        if len(members) > 1 and loc:  # then the member is named
            label, *loc = loc
            members = [m for m in members if _kind(m) == label] or members
        places = [_place(member, loc, path) for member in members]
        return places[0][0], set().union(*(keys for _, keys in places))
    if origin in (tuple, list):
        if loc and isinstance(loc[0], int):
            return _place(get_args(annotation)[0], loc[1:], (*path, loc[0]))
        return (*path, *loc), set()
    fields = _fields(annotation)
    if not loc:
        return path, set(fields)
    if loc[0] in fields:
        return _place(fields[loc[0]], loc[1:], (*path, loc[0]))
    return (*path, *loc), set()


def _fields(annotation: Any) -> dict[str, Any]:
    """Of a model or a typed dictionary, its keys and what they hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {name: field.annotation for name, field in annotation.model_fields.items()}
    return get_type_hints(annotation) if is_typeddict(annotation) else {}


def _kind(model: Any) -> str | None:
    field = getattr(model, "model_fields", {}).get("kind")
    return get_args(field.annotation)[0] if field is not None else None
