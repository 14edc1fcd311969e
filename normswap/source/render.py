"""A method's new text: `Change`s made in its source, everything else as it stands there.

Changes are made at single expressions. Expressions are put together from the inside out, so changes may stand inside
each other; of several changes of one expression the first listed is the innermost. Parentheses come only where the new
text would group otherwise without them.
"""

from __future__ import annotations

import ast
import difflib
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from normswap.errors import PlanError
from normswap.planning.edits import Change
from normswap.source.expressions import summands
from normswap.source.methods import Method, place

WIDTH = 120

# how tightly expressions hold together, as Python's grammar orders them
_TEST, _OR, _AND, _NOT, _COMPARE, _BITOR, _BITXOR, _BITAND, _SHIFT, _SUM, _TERM, _FACTOR, _POWER, _AWAIT, _ATOM = range(
    15
)
_OPERATORS: dict[type, tuple[int, str]] = {
    ast.BitOr: (_BITOR, "|"),
    ast.BitXor: (_BITXOR, "^"),
    ast.BitAnd: (_BITAND, "&"),
    ast.LShift: (_SHIFT, "<<"),
    ast.RShift: (_SHIFT, ">>"),
    ast.Add: (_SUM, "+"),
    ast.Sub: (_SUM, "-"),
    ast.Mult: (_TERM, "*"),
    ast.Div: (_TERM, "/"),
    ast.FloorDiv: (_TERM, "//"),
    ast.Mod: (_TERM, "%"),
    ast.MatMult: (_TERM, "@"),
    ast.Pow: (_POWER, "**"),
}
# changes that leave a part of an expression, and what they expect
_LEAVES = {"unwrap": "a call with an argument", "left": "a product or quotient", "right": "a product"}
_MERGES = ("merge-left", "merge-right")
_TARGETS = ("before", "behind")
# changes that put something else in an expression's place
_REPLACES = ("recall", "recall-if")
# stand for the parentheses of calls that were put in, until lines are laid out
_OPEN, _CLOSE = "\ue000", "\ue001"


@dataclass(frozen=True)
class _Text:
    """New source of an expression, and how tightly it holds together."""

    text: str
    holds: int

    def within(self, needed: int) -> str:
        return self.text if self.holds >= needed else f"({self.text})"


def rewrite(method: Method, changes: Sequence[Change], mark: str = "# changed") -> str:
    """The text of `method` with `changes` made, indented as in its file.

    Args:
        changes: of the expressions at their spans.
        mark: comment on the lines that differ.

    Raises:
        PlanError: a change does not fit the source.
    """
    text = _marked(method.text, _Rewriter(method, changes).run(), mark)
    try:
        compile("if True:\n" + text if text[:1].isspace() else text, "<rewritten>", "exec")
    except SyntaxError as error:
        raise PlanError(f"{method.where}: the changes {list(changes)} leave no valid source:\n{text}") from error
    return text


class _Rewriter:
    def __init__(self, method: Method, changes: Sequence[Change]):
        self.method = method
        self.entering = [change for change in changes if change.kind == "enter"]
        self.forgetting: dict[ast.AST, list[Change]] = {}
        self.removed: set[ast.AST] = set()
        self.own: dict[ast.AST, list[Change]] = {}
        for change in changes:
            if change.kind == "forget":
                self.forgetting.setdefault(self._statement_at(change), []).append(change)
            elif change.kind == "remove":
                self.removed.add(self._statement_at(change, alone=True))
            elif change.kind != "enter":
                self.own.setdefault(self._target(change), []).append(change)
        # a call without arguments looks for the class that the text stands in, which will be another one
        self.supers = {node for node in ast.walk(method.tree) if _is_super(node)}
        self.parents = {child: node for node in ast.walk(method.tree) for child in ast.iter_child_nodes(node)}
        for node in self.own:
            self._check_reachable(node)

    def _target(self, change: Change) -> ast.AST:
        node = change.span and self.method.at(change.span)
        if not node:
            raise PlanError(
                f"{self.method.where}: {change.kind} expects an expression at {change.span}, found none there in:\n"
                f"{self.method.text}"
            )
        if change.kind in _LEAVES:
            if _left(change, node) is None:
                raise PlanError(
                    f"{self.method.where}: {change.kind} expects {_LEAVES[change.kind]}, found "
                    f"{self.method.source(node)}"
                )
        elif change.kind == "first":
            return node
        elif change.name is None:
            raise PlanError(f"{self.method.where}: {change.kind} needs the name of an attribute or variable.")
        if change.kind in _MERGES and (isinstance(node, ast.AugAssign) or summands(node) is None):
            raise PlanError(f"{self.method.where}: {change.kind} expects a sum, found {self.method.source(node)}")
        if change.kind in _TARGETS and not (isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)):
            raise PlanError(f"{self.method.where}: {change.kind} expects a target, found {self.method.source(node)}")
        return node

    def _statement_at(self, change: Change, alone: bool = False) -> ast.stmt:
        """The statement that begins where a change says, on a line of its own; `alone`, nothing comes behind it."""
        for node in ast.walk(self.method.tree):
            if isinstance(node, ast.stmt) and change.span and place(node)[:2] == change.span[:2]:
                if self.method.alone(node) if alone else self.method.begins_line(node):
                    return node
        raise PlanError(
            f"{self.method.where}: {change.kind} expects a statement that begins a line at {change.span}, found none "
            f"there in:\n{self.method.text}"
        )

    def _check_reachable(self, node: ast.AST) -> None:
        """Refuse changes of what another change deletes, and inside of strings."""
        while (parent := self.parents.get(node)) is not None:
            left = [_left(change, parent) for change in self.own.get(parent, ()) if change.kind in _LEAVES]
            gone = any(not (node is rest or isinstance(node, ast.keyword) and node.value is rest) for rest in left)
            gone |= parent in self.removed or any(change.kind in _REPLACES for change in self.own.get(parent, ()))
            if gone or isinstance(parent, ast.JoinedStr):
                raise PlanError(
                    f"{self.method.where}: a change inside {self.method.source(parent)}, of which it leaves nothing."
                )
            node = parent

    def run(self) -> str:
        tree = self.method.tree
        return _laid_out(self._between(0, len(self.method.data), _placed_children(tree), tree))

    # -- expressions -----------------------------------------------------------------------------------------------

    def _touched(self, node: ast.AST) -> bool:
        parts = self.own, self.supers, self.forgetting, self.removed
        return any(inner in part for inner in ast.walk(node) for part in parts)

    def _between(self, start: int, end: int, nodes: list[ast.AST], parent: ast.AST) -> str:
        """Source from `start` to `end` with the changed ones of `nodes`, which lie there, in their new form."""
        data, parts = self.method.data, []
        cuts = [(*self._extent(node), node) for node in nodes if hasattr(node, "lineno") and self._touched(node)]
        if parent is self.method.tree and self.entering:
            at = self._entrance()
            cuts.append((at, at, self._entering()))
        for node in self.forgetting.keys() & set(nodes):
            at = self._extent(node)[0]
            cuts.append((at, at, self._forgetting(node)))
        for first, last, node in sorted(cuts, key=lambda cut: cut[:2]):
            new = node if isinstance(node, str) else self._in_place(node, parent)
            parts += [data[start:first].decode(), new]
            start = last
        return "".join([*parts, data[start:end].decode()])

    def _extent(self, node: ast.AST) -> tuple[int, int]:
        line, column, end_line, end_column = place(node)
        return self.method.offset(line, column), self.method.offset(end_line, end_column)

    def _in_place(self, node: ast.AST, parent: ast.AST) -> str:
        if not isinstance(node, ast.expr):
            return self._statement(node)
        new = self._expression(node)
        if self._parenthesised(node):
            return new.text
        text = new.within(_needed(parent, node, self.parents))
        if text == new.text and not self._bracketed(node) and not _stands_alone(text):
            return f"({text})"
        return text

    def _expression(self, node: ast.expr) -> _Text:
        new = _Text(self._inside(node), _holds(node))
        for change in self.own.get(node, ()):
            if change.kind in _LEAVES:
                new = self._expression(_left(change, node))
            elif change.kind in _MERGES:
                new = self._merged(change, node)
            else:
                new = _applied(change, new)
        return new

    def _merged(self, change: Change, node: ast.expr) -> _Text:
        """A call of a method instead of a sum."""
        given = [self._expression(side).within(_TEST) for side in summands(node)]
        given = given[::-1] if change.kind == "merge-right" else given
        given += [f"self.{change.argument}"] if change.argument else []
        return _Text(f"self.{change.name}{_OPEN}{', '.join(given)}{_CLOSE}", _ATOM)

    def _inside(self, node: ast.AST) -> str:
        if node in self.supers:
            return f"super({self.method.owner.__name__}, {self.method.tree.args.args[0].arg})"
        start, end = self._extent(node)
        return self._between(start, end, _placed_children(node), node)

    def _statement(self, node: ast.AST) -> str:
        if node in self.removed:
            return _removal(node)
        if isinstance(node, ast.AugAssign) and (node in self.own or self._touched(node.target)):
            return self._sum_in_place(node)
        text = self._inside(node)
        if isinstance(node, ast.Assign) and _says_nothing(text) and self._has_siblings(node):
            return _removal(node)
        return text

    def _sum_in_place(self, node: ast.AugAssign) -> str:
        """`x += y` as `x = x + y`, with the changes of `x`, of `y` and of the sum."""
        target = self.method.source(node.target)
        holds, sign = _OPERATORS[type(node.op)]
        left, right = self._expression(node.target), self._expression(node.value)
        if holds == _POWER:
            raise PlanError(f"{self.method.where}: expected a sum, found {self.method.source(node)}")
        new = _Text(f"{left.within(holds)} {sign} {right.within(holds + 1)}", holds)
        for change in self.own.get(node, ()):
            new = _applied(change, new)
        return f"{target} = {new.text}" if _stands_alone(new.text) else f"{target} = ({new.text})"

    def _has_siblings(self, node: ast.stmt) -> bool:
        parent = self.parents[node]
        blocks = (getattr(parent, name, ()) for name in ("body", "orelse", "finalbody"))
        return any(node in block and len(block) > 1 for block in blocks)

    def _parenthesised(self, node: ast.expr) -> bool:
        """Whether parentheses of its own stand around an expression."""
        start, end = self._extent(node)
        data = self.method.data
        before, after = data[:start].rstrip(), data[end:].lstrip()
        if not before.endswith(b"(") or not after.startswith(b")"):
            return False
        parent = self.parents[node]
        return not (isinstance(parent, ast.Call | ast.keyword) and node is not getattr(parent, "func", None))

    def _bracketed(self, node: ast.AST) -> bool:
        """Whether a line may end inside `node` without a backslash: brackets of another expression are open there."""
        while isinstance(node, ast.expr | ast.keyword):
            parent = self.parents[node]
            if isinstance(node, ast.expr) and self._parenthesised(node):
                return True
            if isinstance(parent, ast.Call) and node is not parent.func:
                return True
            if isinstance(parent, ast.Subscript) and node is not parent.value:
                return True
            if isinstance(parent, ast.List | ast.Dict | ast.Set):
                return True
            if isinstance(parent, ast.Tuple) and self.method.source(parent).startswith("("):
                return True
            node = parent
        return False

    # -- statements that come before others -------------------------------------------------------------------------

    def _forgetting(self, node: ast.stmt) -> str:
        margin = " " * node.col_offset
        return "".join(f"{change.name} = None\n{margin}" for change in self.forgetting[node])

    def _entering(self) -> str:
        """The statements that come first."""
        arguments = self.method.tree.args
        known = [a.arg for a in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]]
        margin = " " * self.method.tree.body[0].col_offset
        text = ""
        for change in self.entering:
            if change.argument not in known:
                raise PlanError(
                    f"{self.method.where}: enter expects an argument {change.argument}, found {', '.join(known)}."
                )
            text += f"{change.argument} = self.{change.name}{_OPEN}{change.argument}{_CLOSE}\n{margin}"
        return text

    def _entrance(self) -> int:
        """Where the first statement after the docstring begins."""
        first, *others = self.method.tree.body
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and others:
            first = others[0]
        if first.lineno == self.method.tree.lineno:
            raise PlanError(
                f"{self.method.where}: enter expects a body on lines of its own, found:\n{self.method.text}"
            )
        return self.method.offset(first.lineno, first.col_offset)


def _removal(node: ast.stmt) -> str:
    return textwrap.shorten(f"# removed: {ast.unparse(node)}", WIDTH - node.col_offset)


def _is_super(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super" and not node.args


def _left(change: Change, node: ast.AST) -> ast.expr | None:
    """What a change that takes away leaves of an expression, None where it is of another form."""
    match change.kind, node:
        case "unwrap", ast.Call():
            return _argument(node)
        case "left", ast.BinOp(left=left, op=ast.Mult() | ast.Div()):
            return left
        case "right", ast.BinOp(op=ast.Mult(), right=right):
            return right
    return None


def _argument(node: ast.AST) -> ast.expr | None:
    """What a call of one norm is given: its first argument."""
    if not isinstance(node, ast.Call):
        return None
    given = [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg is not None)]
    return given[0] if given and not isinstance(given[0], ast.Starred) else None


def _placed_children(node: ast.AST) -> list[ast.AST]:
    """Children that have a place in the text, through those that have none."""
    found = []
    for child in ast.iter_child_nodes(node):
        found += [child] if hasattr(child, "lineno") else _placed_children(child)
    return found


def _applied(change: Change, inner: _Text) -> _Text:
    match change.kind:
        case "wrap":
            return _Text(f"self.{change.name}{_OPEN}{inner.text}{_CLOSE}", _ATOM)
        case "first":
            return _Text(f"{inner.within(_ATOM)}[0]", _ATOM)
        case "before":
            return _Text(f"{change.name}, {inner.text}", _ATOM)
        case "behind":
            return _Text(f"{inner.text}, {change.name}", _ATOM)
        case "recall" | "recall-if":
            text = change.name
            text += f".reshape{_OPEN}{change.argument}.shape{_CLOSE}" if change.argument else ""
            if change.kind == "recall":
                return _Text(text, _ATOM)
            return _Text(f"{inner.within(_OR)} if {change.name} is None else {text}", _TEST)
    return _Text(f"self.{change.name} * {inner.within(_FACTOR)}", _TERM)


def _holds(node: ast.expr) -> int:
    """How tightly an expression holds together."""
    match node:
        case ast.NamedExpr() | ast.Yield() | ast.YieldFrom() | ast.Starred():
            return -1
        case ast.Tuple():
            # with parentheses of its own they are part of it
            return _ATOM
        case ast.Lambda() | ast.IfExp():
            return _TEST
        case ast.BoolOp():
            return _OR if isinstance(node.op, ast.Or) else _AND
        case ast.UnaryOp():
            return _NOT if isinstance(node.op, ast.Not) else _FACTOR
        case ast.Compare():
            return _COMPARE
        case ast.BinOp():
            return _OPERATORS[type(node.op)][0]
        case ast.Await():
            return _AWAIT
    return _ATOM


def _needed(parent: ast.AST, node: ast.expr, parents: dict[ast.AST, ast.AST]) -> int:
    """How tightly an expression in the place of `node` has to hold together."""
    match parent:
        case ast.BinOp(op=ast.Pow()):
            return _AWAIT if node is parent.left else _FACTOR
        case ast.BinOp():
            holds = _OPERATORS[type(parent.op)][0]
            return holds if node is parent.left else holds + 1
        case ast.UnaryOp():
            return _NOT if isinstance(parent.op, ast.Not) else _FACTOR
        case ast.BoolOp():
            return _holds(parent) + 1
        case ast.Compare():
            return _COMPARE + 1
        case ast.IfExp():
            return _TEST if node is parent.orelse else _OR
        case ast.Attribute() | ast.Await():
            return _ATOM
        case ast.Call() if node is parent.func:
            return _ATOM
        case ast.Subscript() if node is parent.value:
            return _ATOM
        case ast.Starred():
            return _BITOR
        case ast.comprehension():
            return _OR
    return _TEST


def _stands_alone(text: str) -> bool:
    """Whether an expression may stand on several lines as it is, by brackets of its own."""
    try:
        ast.parse(f"x = {_plain(text)}")
    except SyntaxError:
        return False
    return True


def _says_nothing(text: str) -> bool:
    """Whether a statement is `x = x`."""
    match ast.parse(_plain(text)).body:
        case [ast.Assign(targets=[ast.Name(id=target)], value=ast.Name(id=value))]:
            return target == value
    return False


# -- layout ------------------------------------------------------------------------------------------------------------


def _plain(text: str) -> str:
    return text.replace(_OPEN, "(").replace(_CLOSE, ")")


def _laid_out(text: str) -> str:
    """`text` with lines that are too long broken inside the parentheses of a call that was put in."""
    done, waiting = [], text.split("\n")
    while waiting:
        line = waiting.pop(0)
        cut = _outermost_call(line) if len(line) > WIDTH else None
        if cut is None:
            done.append(_plain(line))
            continue
        first, last = cut
        margin = " " * (len(line) - len(line.lstrip()))
        waiting[:0] = [
            f"{_plain(line[:first])}(",
            f"{margin}    {line[first + 1 : last]}",
            f"{margin}){line[last + 1 :]}",
        ]
    return "\n".join(done)


def _outermost_call(line: str) -> tuple[int, int] | None:
    depth, first = 0, line.find(_OPEN)
    for i, letter in enumerate(line):
        depth += (letter == _OPEN) - (letter == _CLOSE)
        if letter == _CLOSE and depth == 0 <= first < i:
            return first, i
    return None


def _marked(before: str, after: str, mark: str) -> str:
    """`after` with a comment on the first line of each run of lines that differs from `before`."""
    old, new = before.split("\n"), after.split("\n")
    shown = list(new)
    for kind, _, _, start, _ in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind not in ("replace", "insert"):
            continue
        line = new[start]
        if line.lstrip().startswith("#") or line.endswith(mark) or (start and new[start - 1].strip() == mark):
            continue  # it says so already
        margin = line[: len(line) - len(line.lstrip())]
        ends_inside = line.endswith("\\") or "#" in line
        long = len(line) + 2 + len(mark) > WIDTH
        shown[start] = f"{margin}{mark}\n{line}" if long or ends_inside else f"{line}  {mark}"
    return "\n".join(shown)
