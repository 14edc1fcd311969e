"""Plans written by hand that move norms, and the moved models' mathematics written out as independent references."""

from normswap.planning.edits import Change
from normswap.source.methods import Method, place


def change(method: Method, kind: str, text: str, **more) -> Change:
    """A change of the first expression of `method` that reads `text`."""
    import ast

    nodes = [node for node in ast.walk(method.tree) if isinstance(node, ast.expr | ast.AugAssign)]
    found = sorted(place(node) for node in nodes if method.source(node) == text)
    return Change(kind=kind, span=found[more.pop("n", 0)], **more)
