"""What an expression of a model's source is made of: sums, products, numbers, and the helpers that it calls."""

from __future__ import annotations

import ast
import linecache

from normswap.observe.trace import Frame
from normswap.source.methods import Method, place


def summands(node: ast.AST) -> tuple[ast.AST, ast.AST] | None:
    """Left and right of a sum of two, in the order in which torch gets them."""
    if isinstance(node, ast.Call) and any(isinstance(argument, ast.Starred) for argument in node.args):
        return None
    match node:
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return left, right
        case ast.AugAssign(target=target, op=ast.Add(), value=value):
            return target, value
        case ast.Call(func=ast.Attribute(attr="add", value=ast.Name(id="torch")), args=[left, right], keywords=[]):
            return left, right
        case ast.Call(func=ast.Attribute(attr="add" | "add_", value=left), args=[right], keywords=[]):
            return left, right
    return None


def factors(node: ast.AST) -> dict[str, ast.AST]:
    """The sides of a product or quotient."""
    match node:
        case ast.BinOp(left=left, op=ast.Mult() | ast.Div(), right=right):
            return {"left": left, "right": right}
    return {}


def is_number(method: Method, node: ast.AST) -> bool:
    """Whether an expression is made of numbers, names of the source file and what the module holds, and nothing that
    the method makes: it is the same in each pass, and nothing else happens in it.
    """
    own, known = method.tree.args.args[0].arg, method.global_names()
    stored = [n for n in ast.walk(method.tree) if isinstance(getattr(n, "ctx", None), ast.Store)]
    attributes = {n.attr for n in stored if isinstance(n, ast.Attribute)}
    names = {n.id for n in stored if isinstance(n, ast.Name)}
    for inner in ast.walk(node):
        match inner:
            case ast.Name(id=name) if name in names or (name != own and name not in known):
                return False
            case ast.Attribute(attr=name) if name in attributes:
                return False
            case ast.Name() | ast.Attribute() | ast.Constant() | ast.Subscript() | ast.BinOp() | ast.UnaryOp():
                continue
            case ast.operator() | ast.unaryop() | ast.expr_context():
                continue
            case _:
                return False
    return True


def first_of(tree: ast.AST, call: ast.AST) -> ast.AST | None:
    """`call(..)[0]` in the tree, None where the call stands without."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and node.value is call and isinstance(node.slice, ast.Constant):
            return node if node.slice.value == 0 else None
    return None


def passed(function: ast.FunctionDef, side: ast.AST | None, call: ast.AST) -> ast.AST | None:
    """The argument of `call` that `side`, a name in the function it calls, stands for."""
    if not isinstance(side, ast.Name) or not isinstance(call, ast.Call):
        return None
    names = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
    stores = [n for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    if side.id not in names or any(n.id == side.id for n in stores):
        return None
    position = names.index(side.id)
    if position < len(call.args):
        return call.args[position]
    return next((word.value for word in call.keywords if word.arg == side.id), None)


def helper(frame: Frame) -> tuple[ast.FunctionDef | None, ast.AST | None]:
    """The helper function that a frame stands in, and the expression in it."""
    tree = ast.parse("".join(linecache.getlines(frame.span.file)) or "pass")
    name = frame.span.function.rpartition(".")[2]
    where = (frame.span.line, frame.span.column, frame.span.end_line, frame.span.end_column)
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and function.name == name:
            for node in ast.walk(function):
                if isinstance(node, ast.expr | ast.AugAssign) and place(node) == where:
                    return function, node
    return None, None
