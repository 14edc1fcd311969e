"""Changes of a method's source."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from normswap.planning.edits.modules import ModuleEdit


class Change(BaseModel):
    """One change of a method's source. All are insertions and deletions at the ends of one expression.

    - `unwrap`: the call of a norm becomes its first argument;
    - `wrap`: `x` becomes `self.name(x)`; where the expression is a statement `x += y`, that becomes
      `x = self.name(x + y)`;
    - `scale`: `x` becomes `self.name * x`, in parentheses where the source needs them;
    - `left`, `right`: the product `x * y` (of `left`, the quotient `x / y` too) becomes that side of it;
    - `enter`: `argument = self.name(argument)` becomes the first statement of the method.

    Attributes:
        span: line, column, end line, end column of the expression. Lines count from the first line of the method
            (its first decorator, if it has any), columns in UTF-8 bytes, both from 0; as Python's syntax tree has them.
        name: attribute of the module: a norm or a number.
        argument: of `enter`, the parameter's name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["unwrap", "wrap", "scale", "left", "right", "enter"]
    span: tuple[int, int, int, int] | None = None
    name: str | None = Field(default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    argument: str | None = Field(default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")


class Rewrite(ModuleEdit):
    """A method of the module is its class's own with `changes` in its source.

    Attributes:
        method: name of the method.
        digest: of the source the changes were made for; another version of the class is refused.
    """

    edit: Literal["rewrite"] = "rewrite"
    method: str
    changes: tuple[Change, ...]
    digest: str
