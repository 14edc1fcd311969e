"""Module edits as the modelling file states them: tables of module paths, folded over layers, and what puts them in."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from normswap.apply import rebuild
from normswap.apply.folding import fold
from normswap.norms.centred import CentredInput, CentredOutput, centre_input, centre_output
from normswap.norms.kinds import MODULES
from normswap.norms.normed import NormedOutput, norm_output
from normswap.planning.edits import (
    AddNorm,
    CentreInput,
    CentreOutput,
    GrowBias,
    ModuleEdit,
    NormOutput,
    Rewrite,
    SetScale,
    SwapNorm,
)
from normswap.source.classes import Rewritten

WIDTH = 120


@dataclass(frozen=True)
class Kind:
    """One table: its name in the file, what it holds, the function that puts it in place, what that needs besides."""

    name: str
    about: str
    place: Callable
    needs: tuple[Callable | type, ...] = ()


CLASSES = Kind("CLASSES", "Modules of another class: path in {} (`*`: every layer), class.", rebuild.rewrite_modules)
NORMS = Kind(
    "NORMS",
    "Norms of another kind: path in {} (`*`: every layer) and arguments.",
    rebuild.swap_norms,
    (rebuild.put_norm,),
)
ADDED = Kind("ADDED_NORMS", "Norms that are new: path in {} (`*`: every layer) and arguments.", rebuild.add_norms)
SCALES = Kind("SCALES", "Numbers that modules multiply by: path in {} and values by name.", rebuild.set_scales)
OUTPUTS = Kind(
    "OUTPUTS",
    "Modules whose output is centred: path in {} and axis.",
    rebuild.centre_outputs,
    (CentredOutput, centre_output),
)
INPUTS = Kind(
    "INPUTS",
    "Modules whose input is centred: path in {}, axis.",
    rebuild.centre_inputs,
    (CentredInput, centre_input),
)
RUNS = Kind(
    "NORMED_OUTPUTS",
    "Modules with norms on runs of their output: path in {}; by norm where runs begin, and their width.",
    rebuild.norm_outputs,
    (NormedOutput, norm_output),
)
BIASES = Kind("BIASES", "Modules that get a bias: path in {} and size.", rebuild.grow_biases)
# in the order in which they are put in place: a class is exchanged before a centred form of it is made
EVERY = (CLASSES, NORMS, ADDED, SCALES, OUTPUTS, INPUTS, RUNS, BIASES)


@dataclass(frozen=True)
class Tables:
    """The tables of one model.

    Attributes:
        entries: by table, the values as source text by pattern of module paths; empty tables are left out.
        norms: the kinds of norm that they put in.
    """

    entries: Mapping[Kind, Mapping[str, str]]
    norms: frozenset[str] = frozenset()

    @classmethod
    def of(cls, edits: Iterable[ModuleEdit], paths: Iterable[str], classes: Mapping[str, Rewritten]) -> Tables:
        """`edits`, folded over layers.

        Args:
            paths: all modules of the model that the edits' paths are of.
            classes: what each rewritten module becomes.
        """
        paths = list(paths)
        found: dict[Kind, dict[str, str]] = {kind: {} for kind in EVERY}
        scales: dict[str, dict[str, float]] = {}
        added: dict[str, dict[str, str]] = {}
        norms = set()
        for edit in edits:
            match edit:
                case AddNorm():
                    parent, _, name = edit.module.rpartition(".")
                    added.setdefault(name, {})[parent] = _arguments(edit)
                    norms.add(edit.kind)
                case SwapNorm():
                    found[NORMS][edit.module] = _arguments(edit)
                    norms.add(edit.kind)
                case Rewrite():
                    found[CLASSES][edit.module] = classes[edit.module].name
                case SetScale():
                    scales.setdefault(edit.module, {})[edit.name] = edit.value
                case CentreOutput():
                    found[OUTPUTS][edit.module] = str(edit.axis)
                case CentreInput():
                    found[INPUTS][edit.module] = str(edit.axis)
                case NormOutput():
                    found[RUNS][edit.module] = _call({name: (_range(s), width) for name, s, width in edit.runs})
                case GrowBias():
                    found[BIASES][edit.module] = str(edit.size)
        for path, numbers in scales.items():
            found[SCALES][path] = _call(numbers)
        folded = {kind: fold(values, paths) for kind, values in found.items()}
        # new paths are those of their parents, which the model has
        folded[ADDED] = {
            f"{pattern}.{name}" if pattern else name: text
            for name, values in added.items()
            for pattern, text in fold(values, paths).items()
        }
        return cls({kind: values for kind, values in folded.items() if values}, frozenset(norms))

    def patterns(self) -> list[str]:
        """Patterns of the stock modules that have to be there."""
        return [p.rpartition(".")[0] if kind is ADDED else p for kind, values in self.entries.items() for p in values]

    def text(self, prefix: str, where: str, kinds: Iterable[Kind]) -> str:
        """The tables of these `kinds` as statements, their names beginning with `prefix`."""
        texts = []
        for kind in kinds:
            if kind in self.entries:
                rows = "\n".join(_entry(pattern, value) for pattern, value in self.entries[kind].items())
                texts.append(f"# {kind.about.format(where)}\n{prefix}{kind.name} = {{\n{rows}\n}}")
        return "\n".join(texts)

    def calls(self, prefix: str, model: str) -> list[str]:
        """The calls that put the tables in place on `model`, an expression."""
        return [f"{kind.place.__name__}({model}, {prefix}{kind.name})" for kind in self.entries]


def copied(tables: Iterable[Tables]) -> list[str]:
    """The source of what `tables` need to be put in place, in the order in which it can stand."""
    tables = list(tables)
    kinds = [kind for kind in EVERY if any(kind in t.entries for t in tables)]
    used = [name for name in MODULES if any(name in t.norms for t in tables)]
    classes = dict.fromkeys(base for name in used for base in reversed(MODULES[name].__mro__) if _is_ours(base))
    parts = [inspect.getsource(cls) for cls in classes]
    if used:
        rows = ", ".join(f"{literal(name)}: {_named(MODULES[name])}" for name in used)
        parts.append(f"MODULES = {{{rows}}}")
    functions = [item for kind in kinds for item in kind.needs] + ([rebuild.find] if kinds else [])
    functions += [rebuild.new_norm] if used else []
    functions += [kind.place for kind in kinds]
    functions += [rebuild.keep_whole] if CLASSES in kinds else []
    return parts + [inspect.getsource(item) for item in functions]


def _is_ours(cls: type) -> bool:
    return cls.__module__.startswith("normswap.")


def _named(cls: type) -> str:
    return cls.__name__ if _is_ours(cls) else f"nn.{cls.__name__}"


def _arguments(edit: SwapNorm) -> str:
    names = ["kind", "width", "eps", "gain", "bias", "casting"]
    names += [name for name, usual in (("axis", -1), ("shape", None)) if getattr(edit, name) != usual]
    return _call({name: getattr(edit, name) for name in names})


def _call(arguments: Mapping[str, object]) -> str:
    return f"dict({', '.join(f'{name}={literal(value)}' for name, value in arguments.items())})"


def literal(value: object) -> str:
    return json.dumps(value) if isinstance(value, str) else repr(value)


def _range(numbers: tuple[int, ...]) -> Sequence[int]:
    """The same numbers as a range, if they are evenly spaced."""
    first, step = numbers[0], numbers[1] - numbers[0] if len(numbers) > 1 else 1
    even = range(first, first + step * len(numbers), step)
    return even if tuple(even) == numbers else numbers


def _entry(pattern: str, value: str) -> str:
    """One line of a table; its call is broken, as ruff does, where the line would be too long."""
    line = f"    {literal(pattern)}: {value},"
    if len(line) <= WIDTH:
        return line
    return f"    {literal(pattern)}: dict(\n        {value.removeprefix('dict(').removesuffix(')')}\n    ),"
