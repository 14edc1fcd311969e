"""Classes made of stock classes with changed methods, from the text that also goes into the modelling file."""

from __future__ import annotations
import __future__

import hashlib
import inspect
import linecache
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from normswap.errors import PlanError, RefusedError
from normswap.norms.centred import plain_class
from normswap.planning.edits import Change, Rewrite
from normswap.source.methods import Method, reindented
from normswap.source.render import rewrite

PREFIX = "Rewritten"
# one class for each text, so that layers, models and copies of them share it
_BUILT: dict[tuple[str, type], type] = {}


@dataclass(frozen=True)
class Rewritten:
    """A subclass of a stock class in which some methods are the stock ones with changes.

    Pickled, it keeps the changes and makes the texts anew.

    Attributes:
        name: of the new class.
        base: the stock class.
        changed: of each method its name, the changes, and the digest of the source that they are for.
        methods: by name, the text of each method as the class has it.
        names: what the texts take from the modules that they come from, and which module that is.
        lazy: whether annotations are left unevaluated.
        about: what was changed, for the docstring.
        disguised: whether those who look for classes by name (FSDP, device maps) take it for its base.
    """

    name: str
    base: type
    changed: tuple[tuple[str, tuple[Change, ...], str], ...]
    methods: Mapping[str, str]
    names: Mapping[str, tuple[str, object]]
    lazy: bool
    about: str = "norms in other places"
    disguised: bool = False

    def __reduce__(self):
        return _again, (self.name, self.base, self.changed, {"about": self.about, "disguised": self.disguised})

    def __deepcopy__(self, memo: dict) -> Rewritten:
        return self

    @property
    def is_model(self) -> bool:
        return issubclass(self.base, PreTrainedModel)

    @cached_property
    def text(self) -> str:
        """The class statement."""
        about = f'    """{self.base.__name__} with {self.about}: lines that are `# changed` or `# removed`."""'
        if self.is_model:
            stock = self.base.__name__
            about += (
                "\n\n    # what transformers knows of a model it finds by these"
                f"\n    __module__, __qualname__ = {stock}.__module__, {stock}.__qualname__"
            )
        methods = "\n\n".join(method.rstrip("\n") for method in self.methods.values())
        return f"class {self.name}({self.base.__name__}):\n{about}\n\n{methods}\n"

    def build(self) -> type:
        """The class itself. Tracebacks and `inspect.getsource` find its text."""
        key = self.text, self.base
        if key not in _BUILT:
            _BUILT[key] = self._build()
        return _BUILT[key]

    def _build(self) -> type:
        # decorators look for the model's name in the path of the file that a method is in; no file has this very name
        digest = hashlib.sha256(self.text.encode()).hexdigest()
        file = f"<{inspect.getfile(self.base)}:{self.name}:{digest[:12]}>"
        # without a time, the cache is never checked against a file
        linecache.cache[file] = (len(self.text), None, self.text.splitlines(keepends=True), file)
        flags = __future__.annotations.compiler_flag if self.lazy else 0
        namespace = {name: value for name, (_, value) in self.names.items()}
        namespace |= {self.base.__name__: self.base, "__name__": self.base.__module__}
        exec(compile(self.text, file, "exec", flags, dont_inherit=True), namespace)
        made = namespace[self.name]
        if self.disguised:
            made.__name__ = self.base.__name__
        if self.is_model:
            # and by this, how to convert a checkpoint's keys; the modelling file registers its own names for that
            made.__name__ = self.base.__name__
            for name in self.methods:
                inspect.unwrap(vars(made)[name]).__qualname__ = f"{made.__qualname__}.{name}"
        return made


def rewritten_classes(
    model: nn.Module, edits: Iterable[Rewrite], prefix: str = PREFIX, **attributes: Any
) -> dict[str, Rewritten]:
    """The class that each module gets, by path. Modules of one class with the same changes get the same one.

    Args:
        prefix: of the names of the classes.
        attributes: of every `Rewritten`.

    Raises:
        PlanError: the plan was made for another source than the installed one, or does not fit it.
        RefusedError: a method's source cannot be had.
    """
    wanted: dict[str, dict[str, Rewrite]] = {}
    for edit in edits:
        if edit.method in wanted.setdefault(edit.module, {}):
            raise PlanError(
                f"{edit.module}: two edits rewrite its method {edit.method}; expected one with all changes."
            )
        wanted[edit.module][edit.method] = edit
    made: dict[tuple, Rewritten] = {}
    counts: dict[str, int] = {}
    found = {}
    for path, methods in wanted.items():
        base = plain_class(type(model.get_submodule(path)))
        key = (base, *((name, edit.changes, edit.digest) for name, edit in sorted(methods.items())))
        if key not in made:
            number = counts[base.__name__] = counts.get(base.__name__, 0) + 1
            name = f"{prefix}{base.__name__}" + (str(number) if number > 1 else "")
            changed = tuple((e.method, e.changes, e.digest) for _, e in sorted(methods.items()))
            made[key] = _again(name, base, changed, attributes)
        found[path] = made[key]
    return found


def _again(name: str, base: type, changed: tuple, attributes: Mapping[str, Any]) -> Rewritten:
    return replace(_rewritten(name, base, changed), **attributes)


def _rewritten(name: str, base: type, changed: tuple[tuple[str, tuple[Change, ...], str], ...]) -> Rewritten:
    texts, names, lazy = {}, {}, set()
    for method_name, changes, digest in changed:
        method = Method.of(base, method_name)
        if method.digest != digest:
            raise PlanError(
                f"{method.where}: expected the source that the plan was made for (SHA-256 {digest[:12]}..), found "
                f"another ({method.digest[:12]}..): the installed version of its library is not the one the plan was "
                f"made with. Make the plan again, or install that version.\n{method.text}"
            )
        texts[method_name] = reindented(rewrite(method, changes), 4)
        lazy.add(method.lazy_annotations)
        for key, value in method.global_names().items():
            if names.setdefault(key, (method.function.__module__, value))[1] is not value:
                raise RefusedError(f"{method.where}: {key} is another thing in {names[key][0]}.")
    if names.get(base.__name__, ("", base))[1] is not base:
        raise RefusedError(f"{base.__name__}: a method names the class itself, which was rewritten before.")
    if len(lazy) > 1:
        raise RefusedError(f"{base.__name__}: its methods come from modules that treat annotations differently.")
    return Rewritten(name, base, changed, texts, names, lazy == {True})
