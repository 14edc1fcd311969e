"""Changes of a method's source."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from normswap.planning.edits.bounds import Attribute, Dotted
from normswap.planning.edits.modules import ModuleEdit


class Change(BaseModel):
    """One change of a method's source, at one expression.

    Insertions and deletions at its ends:

    - `unwrap`: the call of a norm becomes its first argument;
    - `wrap`: `x` becomes `self.name(x)`; where the expression is a statement `x += y`, that becomes
      `x = self.name(x + y)`;
    - `scale`: `x` becomes `self.name * x`, in parentheses where the source needs them;
    - `left`, `right`: the product `x * y` (of `left`, the quotient `x / y` too) becomes that side of it;
    - `enter`: `argument = self.name(argument)` becomes the first statement of the method.

    A sum that a method of a norm makes, and what that gives beside the sum:

    - `merge-left`, `merge-right`: the sum `x + y` becomes `self.name(x, y)`, of `merge-right` `self.name(y, x)`; with
      an argument, `self.name(x, y, self.argument)`;
    - `first`: `x` becomes `x[0]`;
    - `before`, `behind`: the target of an assignment, `x = ..`, becomes `name, x = ..` or `x, name = ..`;
    - `remove`: the statement that begins at the span is gone, and a comment in its place;
    - `recall`: the expression becomes the local variable `name`, with an argument `name.reshape(argument.shape)`;
    - `recall-if`: `x` becomes what `recall` makes of it, where `name` is not None, else it stays;
    - `forget`: `name = None` becomes the statement before the one that begins at the span.

    Attributes:
        span: line, column, end line, end column of the expression. Lines count from the first line of the method
            (its first decorator, if it has any), columns in UTF-8 bytes, both from 0; as Python's syntax tree has them.
        name: attribute of the module: a norm or a number; of a merge, dotted, a method of one; of `before`
            and what follows it, a local variable.
        argument: of `enter`, the parameter's name; of a merge, a norm; of `recall`, a local variable.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal[
        "unwrap",
        "wrap",
        "scale",
        "left",
        "right",
        "enter",
        "merge-left",
        "merge-right",
        "first",
        "before",
        "behind",
        "remove",
        "recall",
        "recall-if",
        "forget",
    ]
    span: tuple[int, int, int, int] | None = None
    name: Dotted | None = None
    argument: Dotted | None = None


class Rewrite(ModuleEdit):
    """A method of the module is its class's own with `changes` in its source.

    Attributes:
        method: name of the method.
        digest: of the source the changes were made for; another version of the class is refused.
    """

    edit: Literal["rewrite"] = "rewrite"
    method: Attribute
    changes: tuple[Change, ...]
    digest: str
