"""How a sum and the norms beside it become one call: the changes of a method's source."""

from __future__ import annotations

import ast
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from normswap.kernels.call import Form
from normswap.planning.edits import Change
from normswap.planning.rewrites.places import NoPlace, Place
from normswap.source.flow import Route
from normswap.source.methods import Method, place

#: the method of a fused norm for each form
METHODS: dict[Form, str] = {"add-norm": "add_norm", "norm-add": "norm_add", "norm-add-norm": "norm_add_norm"}


@dataclass(frozen=True)
class Beside:
    """A norm beside a sum: its path, its call, and how the method names it."""

    path: str
    call: Place
    name: str


@dataclass(frozen=True)
class Giver:
    """A norm that gives one side of a sum, `left` or `right`."""

    norm: Beside
    side: str


@dataclass(frozen=True)
class Reader:
    """A norm that reads a sum: by a variable, or (without a route) in its very call."""

    norm: Beside
    route: Route | None


def merged(
    found: Place,
    sides: Mapping[str, ast.AST],
    branch: str,
    giver: Giver | None,
    reader: Reader | None,
    form: Form,
    name: str,
) -> tuple[Change, ...]:
    """The changes that make one call of `form`.

    Args:
        found: the sum.
        sides: its expressions, `left` and `right`.
        branch: the side that is not the skip.
        name: a local variable that the method does not have.

    Raises:
        NoPlace: the sides would have to be evaluated in another order, which may matter.
    """
    side = _first(found, sides, branch, giver)
    first = (giver or reader).norm.name
    merge = found.change(f"merge-{side}", f"{first}.{METHODS[form]}")
    changes = [giver.norm.call.change("unwrap", giver.norm.name)] if giver else []
    changes.append(merge.model_copy(update={"argument": reader.norm.name if giver and reader else None}))
    if reader is None:
        return tuple(changes)
    call = reader.norm.call
    if reader.route is None:
        return (*changes, found.change("first"), call.change("unwrap", reader.norm.name))
    return (*changes, *(_in_one(found, call, reader.route) or _by_variable(found, call, reader.route, name)))


def _first(found: Place, sides: Mapping[str, ast.AST], branch: str, giver: Giver | None) -> str:
    """The side that a call takes first: the norm's, else the branch, if the order in which the two run may change."""
    side = giver.side if giver else branch
    nodes = dict(sides)
    if giver and nodes[side] is giver.norm.call.node:
        nodes[side] = given(giver.norm.call.node)
    acting = [node for node in nodes.values() if any(isinstance(n, ast.Call) for n in ast.walk(node))]
    if side == "left" or not acting or any(isinstance(node, ast.Name) for node in nodes.values()):
        return side
    if giver:
        raise NoPlace(
            f"{found.module}, {found.method.where}: the sides would change places, of which "
            f"`{found.method.source(acting[0])}` may do something.\n    {found.method.source(found.node)}"
        )
    return "left"


def _in_one(found: Place, call: Place, route: Route) -> list[Change] | None:
    """The assignment of the sum becomes that of the norm's result as well; None where more stands in between.

    `s = sum; r = s; s = norm(s)` as `s, r = ..`, `s = sum; s = norm(s)` as `s = ..[0]`, `s = sum; y = norm(s)` as
    `y, s = ..`.
    """
    made, used = _assignment(found), _assignment(call)
    if route.renames is None or used is None:
        return None
    target, result = made.targets[0].id, used.targets[0].id
    names = [rename.targets[0].id for rename in route.renames]
    read = {rename.value.id for rename in route.renames if isinstance(rename.value, ast.Name)}
    gone = [*route.renames, used] if result == target else [used]
    if not all(map(found.method.alone, gone)):
        return None
    changes = [Change(kind="remove", span=place(statement)) for statement in gone]
    if result != target:
        if result in names or result in read:
            return None
        return [found.change("before", result, made.targets[0]), *changes]
    if not names:
        return [found.change("first"), *changes]
    if len(names) > 1 or read != {target} or names[0] == target:
        return None
    return [found.change("behind", names[0], made.targets[0]), *changes]


def _by_variable(found: Place, call: Place, route: Route, name: str) -> list[Change]:
    """The norm's result in a variable of its own, from the sum to where the norm was called."""
    recall = call.change("recall-if" if route.forgets else "recall", name)
    if route.reshaped:
        recall = recall.model_copy(update={"argument": found.method.source(given(call.node))})
    forgets = [Change(kind="forget", span=span, name=name) for span in route.forgets]
    return [found.change("before", name, _assignment(found).targets[0]), recall, *forgets]


def new_name(method: Method, more: Collection[str]) -> str:
    """A local variable that neither a method nor `more` has."""
    nodes = list(ast.walk(method.tree))
    taken = {n.id for n in nodes if isinstance(n, ast.Name)} | {n.arg for n in nodes if isinstance(n, ast.arg)}
    number = 1
    while (name := "normed" if number == 1 else f"normed_{number}") in taken | set(more):
        number += 1
    return name


def given(call: ast.AST) -> ast.AST | None:
    """The one argument of a call."""
    match call:
        case ast.Call(args=[given], keywords=[]) if not isinstance(given, ast.Starred):
            return given
        case ast.Call(args=[], keywords=[ast.keyword(arg=str(), value=given)]):
            return given
    return None


def _assignment(found: Place) -> ast.Assign | None:
    """The statement `name = ..` whose whole right side is the expression at a place."""
    for node in ast.walk(found.method.tree):
        match node:
            case ast.Assign(targets=[ast.Name()], value=value) if value is found.node:
                return node
    return None
