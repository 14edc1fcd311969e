"""One method of a class as its source has it: text, syntax tree, and the names it takes from its module."""

from __future__ import annotations
import __future__

import ast
import builtins
import dis
import hashlib
import inspect
import textwrap
from dataclasses import dataclass
from functools import cached_property
from types import CodeType, FunctionType

from normswap.errors import RefusedError
from normswap.norms.centred import plain_class
from normswap.observe.trace import Span


@dataclass(frozen=True)
class Method:
    """A method where it is defined.

    Attributes:
        owner: the class that defines it.
        name: of the method.
        function: the function itself, without its decorators.
        text: its source as it stands in the file, decorators and indentation included.
        first_line: number of the text's first line in the file, from 1.
        tree: its definition. Lines count from 0, the first line of `text`; columns are UTF-8 bytes of the file's lines.
            These are the positions of a `Change`.
    """

    owner: type
    name: str
    function: FunctionType
    text: str
    first_line: int
    tree: ast.FunctionDef

    @classmethod
    def of(cls, owner: type, name: str) -> Method:
        """The method `name` of the class `owner`, found where its MRO defines it (centring around it apart).

        Raises:
            RefusedError: its source cannot be had, or is not all of it: no file, made by other code, a closure.
        """
        bases = plain_class(owner).__mro__
        holder = next((base for base in bases if name in vars(base)), None)
        if holder is None:
            raise RefusedError(f"{owner.__name__} has no method {name}: expected one to change the source of.")
        where = f"{holder.__module__}.{holder.__qualname__}.{name}"
        function = inspect.unwrap(vars(holder)[name])
        if not isinstance(function, FunctionType):
            raise RefusedError(f"{where} is a {type(function).__name__}: expected a method written in Python.")
        # a class may hold a wrapped form of its base's method, made when the class was
        told = function.__module__, function.__qualname__
        defining = next((base for base in bases if told == (base.__module__, f"{base.__qualname__}.{name}")), None)
        if defining is None:
            raise RefusedError(
                f"{where} is {'.'.join(told)}: expected a method that stands in its own class. A decorator that hides "
                "what it wraps, or an assignment, put another function there."
            )
        where = f"{defining.__module__}.{defining.__qualname__}.{name}"
        try:
            lines, first = inspect.getsourcelines(function)
            text = "".join(lines)
            tree = _definition(text)
        except (OSError, TypeError, SyntaxError, IndexError) as error:
            raise RefusedError(f"{where}: its source cannot be read ({error}); expected it in a file.") from error
        if not isinstance(tree, ast.FunctionDef) or tree.name != name:
            raise RefusedError(f"{where}: expected `def {name}` in its source, found:\n{text}")
        method = cls(defining, name, function, text, first, tree)
        method._check_whole()
        return method

    @property
    def digest(self) -> str:
        """SHA-256 of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def where(self) -> str:
        return f"{self.owner.__module__}.{self.owner.__qualname__}.{self.name}"

    @cached_property
    def data(self) -> bytes:
        """The text in UTF-8; its positions are those of the tree."""
        return self.text.encode()

    @cached_property
    def _starts(self) -> list[int]:
        starts = [0]
        for line in self.data.splitlines(keepends=True):
            starts.append(starts[-1] + len(line))
        return starts

    def offset(self, line: int, column: int) -> int:
        """Where a position of the tree lies in `data`."""
        return self._starts[line] + column

    def source(self, node: ast.AST) -> str:
        """The text that `node` covers."""
        line, column, end_line, end_column = place(node)
        return self.data[self.offset(line, column) : self.offset(end_line, end_column)].decode()

    def begins_line(self, node: ast.AST) -> bool:
        """Whether nothing stands before a node on its first line."""
        return not self.data[self.offset(node.lineno, 0) : self.offset(node.lineno, node.col_offset)].strip()

    def alone(self, node: ast.AST) -> bool:
        """Whether nothing but a comment stands beside a node on its lines."""
        _, _, end_line, end_column = place(node)
        after = self.data[self.offset(end_line, end_column) :].split(b"\n")[0].strip()
        return self.begins_line(node) and (not after or after.startswith(b"#"))

    def locate(self, span: Span) -> ast.expr | ast.AugAssign:
        """The expression that a call in the trace stands at, or the statement `x += y` of a sum in place.

        Raises:
            RefusedError: the span lies elsewhere, or is no whole expression of this method.
        """
        code = self.function.__code__
        if span.file == code.co_filename and span.function == code.co_qualname:
            line, end_line = span.line - self.first_line, span.end_line - self.first_line
            found = self.at((line, span.column, end_line, span.end_column))
            if found is not None:
                return found
        raise RefusedError(
            f"{self.where}: expected a whole expression at line {span.line}, columns {span.column} to "
            f"{span.end_column}, of {span.file} ({span.function}), and found none in this method:\n{self.text}"
        )

    def at(self, position: tuple[int, int, int, int]) -> ast.expr | ast.AugAssign | None:
        """The expression, or sum in place, at exactly this position of the tree."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.expr | ast.AugAssign) and position in (place(node), _reported(node)):
                return node
        return None

    def global_names(self) -> dict[str, object]:
        """What the text takes from its module, by name: in the body, in decorators, annotations and defaults.

        Raises:
            RefusedError: the module does not have a name that the text asks for when it is read.
        """
        arguments = self.tree.args
        outside = [*self.tree.decorator_list, *arguments.defaults, *filter(None, arguments.kw_defaults)]
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
        outside += [a.annotation for a in every if a is not None and a.annotation]
        outside += [self.tree.returns] if self.tree.returns else []
        needed = [name for node in outside for name in _reads(node)]
        found = self.function.__globals__
        missing = [n for n in needed if n not in found and not hasattr(builtins, n)]
        if missing and not self.lazy_annotations:
            raise RefusedError(
                f"{self.where}: its signature or decorators use {missing[0]}, which {self.function.__module__} lacks: "
                f"expected names of the module alone:\n{self.text}"
            )
        # annotations of local variables are read by nobody but people and their tools
        local = [n.annotation for n in ast.walk(self.tree) if isinstance(n, ast.AnnAssign)]
        names = [*needed, *_lookups(self.function.__code__)]
        names += [name for node in local for name in _reads(node)]
        if "super" in names:
            names.append(self.owner.__name__)
        return {n: found[n] for n in dict.fromkeys(names) if n in found}

    @property
    def lazy_annotations(self) -> bool:
        """Whether its module leaves annotations unevaluated."""
        return bool(self.function.__code__.co_flags & __future__.annotations.compiler_flag)

    def _check_whole(self) -> None:
        """Refuse what means something else in another class."""
        free = set(self.function.__code__.co_freevars) - {"__class__"}
        if free or "<locals>" in self.owner.__qualname__:
            raise RefusedError(
                f"{self.where} uses {', '.join(sorted(free)) or 'what is around it'} of a function around its class: "
                f"expected names of its module alone:\n{self.text}"
            )
        for node in ast.walk(self.tree):
            bound = getattr(node, "attr", getattr(node, "id", ""))
            if bound == "__class__" and isinstance(node, ast.Name) or bound.startswith("__") and bound[-2:] != "__":
                raise RefusedError(
                    f"{self.where} uses {bound}, which is bound to its class, at line "
                    f"{self.first_line + node.lineno}: it would mean something else in a class made of its text."
                )


def place(node: ast.AST) -> tuple[int, int, int, int]:
    """Line, column, end line and end column of a node, as a `Change` has them."""
    return node.lineno, node.col_offset, node.end_lineno, node.end_col_offset


def _reported(node: ast.AST) -> tuple[int, int, int, int] | None:
    """Where Python says a call `x.name(..)` stands whose `name` is on a later line than `x`: it begins at the name."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return None
    name = node.func
    return name.end_lineno, name.end_col_offset - len(name.attr.encode()), node.end_lineno, node.end_col_offset


def _definition(text: str) -> ast.stmt:
    """The one definition in `text`, with lines from 0 and the columns of the file."""
    if text[:1].isspace():
        block = ast.parse("if True:\n" + text).body[0].body
        return ast.increment_lineno(block[0], -2)
    return ast.increment_lineno(ast.parse(text).body[0], -1)


def _reads(node: ast.expr) -> list[str]:
    """Names that an expression takes from around it."""
    return _lookups(compile(ast.Expression(node), "<expression>", "eval"))


def _lookups(code: CodeType) -> list[str]:
    """Names that `code`, and functions inside it, look up in the module."""
    names = [step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")]
    return names + [n for inner in code.co_consts if isinstance(inner, CodeType) for n in _lookups(inner)]


def reindented(text: str, spaces: int) -> str:
    """`text` with its block moved to `spaces` columns."""
    found = len(text) - len(text.lstrip(" "))
    if found == spaces:
        return text
    return textwrap.indent(textwrap.dedent(text), " " * spaces)
