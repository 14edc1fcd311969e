"""Where a value is in a method's local variables, statement by statement, from its assignment to an expression.

What a trace saw of one pass is true of the branches that this pass took. In others the value may be changed, so that
it counts as forgotten where they begin.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from normswap.errors import RefusedError
from normswap.source.methods import Method, place

Position = tuple[int, int, int, int]
#: per local variable that holds the value, whether it is in another shape there; None where no path goes on
_Held = dict[str, bool] | None
_RESHAPES = ("view", "reshape")
_LEAVES = (ast.Return, ast.Raise, ast.Continue, ast.Break)
#: statements that have no others in them, and go on to the next
SIMPLE = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr, ast.Delete, ast.Pass, ast.Assert)


class Lost(RefusedError):
    """The value cannot be followed to where it is wanted."""


@dataclass(frozen=True)
class Route:
    """How a value comes to the expression that reads it.

    Attributes:
        reshaped: it has been through `view` or `reshape`.
        forgets: positions of statements before which it is to be forgotten, so that whoever kept something made of it
            makes that anew: where branches begin that the pass did not take, and before a branch that makes it.
        renames: the statements on the way, where all they do is to give it more names; None where there are others.
    """

    reshaped: bool
    forgets: tuple[Position, ...]
    renames: tuple[ast.Assign, ...] | None = None


class Flow:
    """Values in the local variables of one method.

    Args:
        ran: lines of the method's tree at which the pass made calls.
    """

    def __init__(self, method: Method, ran: Collection[int]):
        self.method, self.ran = method, ran
        self.parents = {child: node for node in ast.walk(method.tree) for child in ast.iter_child_nodes(node)}
        self.forgets: list[Position] = []

    def statement(self, node: ast.AST) -> ast.stmt:
        """The statement that an expression stands in."""
        while not isinstance(node, ast.stmt):
            node = self.parents[node]
        return node

    def standing(self, node: ast.AST) -> list[tuple[ast.AST, list[ast.stmt], int]]:
        """The lists of statements that a node stands in, from the method's own inwards: what has the list, the list,
        and the number of the statement.
        """
        found = []
        while node is not self.method.tree:
            owner = self.parents[node]
            for name in ("body", "orelse", "finalbody"):
                block = getattr(owner, name, None)
                if isinstance(block, list) and any(node is statement for statement in block):
                    found.append((owner, block, next(i for i, other in enumerate(block) if other is node)))
            node = owner
        return found[::-1]

    def route(self, made: ast.Assign, read: ast.Name) -> Route:
        """From the assignment `name = value` to `read`, a later expression.

        Raises:
            Lost: `read` may be something else than the value.
        """
        start, end = self.standing(made), self.standing(read)
        depth = 0
        while depth < min(len(start), len(end)) and start[depth][1:] == end[depth][1:]:
            depth += 1
        if depth == min(len(start), len(end)) or start[depth][1] is not end[depth][1]:
            raise Lost("they stand in branches of which one is taken")
        (_, block, first), (*_, last) = start[depth], end[depth]
        if first > last:
            raise Lost("the norm stands before the sum")
        inside, outside = start[depth + 1 :], end[depth + 1 :]
        if odd := next((owner for owner, *_ in (*inside, *outside) if not isinstance(owner, ast.If)), None):
            raise Lost(f"a `{_word(odd)}` begins or ends between them")
        self.forgets = [place(block[first])] if inside else []
        (target,) = made.targets
        held: _Held = {target.id: False}
        for _, inner, index in reversed(inside):
            held = self._through(inner[index + 1 :], held)
        held = self._through(block[first + 1 : last], held)
        for owner, inner, index in outside:
            held = self._through(inner[:index], self._without(held, owner.test))
        held = self._without(held, *(n for n in ast.walk(self.statement(read)) if isinstance(n, ast.NamedExpr)))
        if read.id not in (held or {}):
            raise Lost(f"`{read.id}` is given another value between them")
        between = block[first + 1 : last]
        plain = not inside and not outside and all(map(_renames, between)) and set(map(type, between)) <= {ast.Assign}
        return Route(held[read.id], tuple(self.forgets), tuple(between) if plain else None)

    def _through(self, statements: Iterable[ast.stmt], held: _Held) -> _Held:
        for statement in statements:
            if held is not None:
                held = self._step(statement, held)
        return held

    def _step(self, statement: ast.stmt, held: dict[str, bool]) -> _Held:
        match statement:
            case ast.Assign(targets=[ast.Name(id=target)], value=ast.Name(id=source)) if source in held:
                return {**held, target: held[source]}
            case ast.Assign(
                targets=[ast.Name(id=target)],
                value=ast.Call(func=ast.Attribute(value=ast.Name(id=source), attr=attribute)),
            ) if source in held and attribute in _RESHAPES:
                return {**held, target: True}
            case ast.If(test=test, body=body, orelse=orelse):
                held = self._without(held, test)
                ends = [end for end in (self._branch(body, held), self._branch(orelse, held)) if end is not None]
                return {n: shaped for n, shaped in ends[0].items() if ends[-1].get(n) is shaped} if ends else None
        if isinstance(statement, _LEAVES):
            return None
        if isinstance(statement, SIMPLE):
            return self._without(held, statement)
        if _named(statement) & held.keys():
            raise Lost(f"a `{_word(statement)}` between them uses `{', '.join(_named(statement) & held.keys())}`")
        return held

    def _branch(self, block: list[ast.stmt], held: dict[str, bool]) -> _Held:
        named = {name for statement in block for name in _named(statement)}
        if not named & held.keys() or all(map(_renames, block)):
            return self._through(block, held)
        if len(block) == 1 and isinstance(block[0], ast.If):  # an `elif`, or as good as one
            if any(_named(n) & held.keys() for n in ast.walk(block[0].test) if isinstance(n, ast.Call)):
                raise Lost("a condition between them calls something with it")
            return self._step(block[0], held)
        if any(block[0].lineno <= line <= block[-1].end_lineno for line in self.ran):
            return self._through(block, held)
        if not isinstance(block[-1], _LEAVES):
            self._forget(block)
        return None

    def _forget(self, block: list[ast.stmt]) -> None:
        first = block[0]
        if not self.method.begins_line(first):
            raise Lost("a branch between them begins on the line of its condition")
        self.forgets.append(place(first))

    @staticmethod
    def _without(held: _Held, *nodes: ast.AST) -> _Held:
        """Less the variables that `nodes` give another value."""
        inner = [n for node in nodes for n in ast.walk(node) if isinstance(n, ast.Name)]
        stored = {n.id for n in inner if not isinstance(n.ctx, ast.Load)}
        return None if held is None else {name: shaped for name, shaped in held.items() if name not in stored}


def _named(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def _renames(statement: ast.stmt) -> bool:
    """Whether a statement gives a variable the value of another, or a constant, and does nothing else."""
    match statement:
        case ast.Assign(targets=[ast.Name()], value=ast.Name() | ast.Constant()):
            return True
        case ast.Pass() | ast.Expr(value=ast.Constant()):
            return True
    return False


def _word(node: ast.AST) -> str:
    return {ast.FunctionDef: "def", ast.ExceptHandler: "except"}.get(type(node), type(node).__name__.lower())
