"""What a name or a size in a plan may be. A plan is data that may come from anyone, and what it says gets into code."""

from __future__ import annotations

import keyword
from typing import Annotated

from pydantic import AfterValidator, Field


def _attribute(name: str) -> str:
    for part in name.split("."):
        if not part.isidentifier() or keyword.iskeyword(part) or part.startswith("__"):
            raise ValueError(f"expected a name of an attribute, found {ascii(name):.100}")
    return name


def _one_attribute(name: str) -> str:
    if "." in name:
        raise ValueError(f"expected the name of one attribute, found {ascii(name):.100}")
    return _attribute(name)


#: of an attribute, with dots those of nested ones
Dotted = Annotated[str, AfterValidator(_attribute)]
Attribute = Annotated[str, AfterValidator(_one_attribute)]
#: along an axis of a norm or a bias; no model has an axis of 67 million channels
MAX_SIZE = 2**26
Size = Annotated[int, Field(ge=1, le=MAX_SIZE)]
