"""Parameters that took no part in the observed pass: nobody knows what they read, or write to.

An expert that no token chose, cross-attention that was given nothing to look at. A site is refused where such a
parameter may read what the site gives out (folding) or write to what it reads (centring): where it stands in the same
block, or is like one that the conversion edits. Everything else of the model is not in danger.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from normswap.understand.centring import Writer
from normswap.understand.normmap import NormMap, Site

_NUMBER = re.compile(r"\d+")


class Idle:
    """The parameters and buffers of a model that did not run."""

    def __init__(self, normmap: NormMap):
        self.normmap = normmap
        ran = {normmap.trace.values[v].name for op in normmap.trace.operations for v in op.inputs}
        ran |= {f"{path}.{name}" for path, site in normmap.sites.items() for name in site.tensors}
        self.names = [name for name in normmap.parameters if name not in ran]
        self.blurred = [(name, _NUMBER.sub("*", name)) for name in self.names]
        trained = {value.name for value in normmap.trace.values if value.kind == "parameter"}
        self.in_block: dict[str, list[str]] = {}  # by path of the block
        self.blocks_of: dict[str, set[str]] = {}  # by name of the stream
        for stream in normmap.streams:
            for path in dict.fromkeys(block.module for block in stream.blocks if block.module):
                self.blocks_of.setdefault(stream.name, set()).add(path)
                if found := [name for name in self.names if name in trained and name.startswith(f"{path}.")]:
                    self.in_block[path] = found

    def refuse_centring(self, sites: Iterable[Site]) -> dict[str, str]:
        """Why sites cannot be centred: by site, those alone that an idle parameter may write to, or share a writer."""
        if not self.names:
            return {}
        writers = {site.path: self._writers(site) for site in sites}
        refused = {}
        for site in sites:
            own = [w.name for w in writers[site.path]]
            on_stream = self.blocks_of.get(site.stream, set())
            found = self._like(own, "")
            for block, names in self.in_block.items():
                if block in on_stream or _any_in([site.path, *own], block):
                    found += names
            if found:
                refused[site.path] = self._reason(found, "may write to what it reads")
        # a writer of two streams is centred for both or for none
        while True:
            endangered = set().union(*(writers[path] for path in refused))
            more = [path for path in writers if path not in refused and writers[path] & endangered]
            if not more:
                return refused
            why = next(iter(refused.values()))
            refused.update(dict.fromkeys(more, why))

    def refuse_folding(self, sites: Iterable[Site]) -> dict[str, str]:
        """Why gains cannot be folded: by site, those alone that an idle parameter may read."""
        refused = {}
        for site in sites if self.names else ():
            readers = [reader.name for reader in site.readers]
            found = [n for b, names in self.in_block.items() if _any_in([site.path, *readers], b) for n in names]
            for reader in readers:
                found += self._like([reader], _common(site.path, reader))
            if found:
                refused[site.path] = self._reason(found, "may read what it gives out")
        return refused

    def _writers(self, site: Site) -> set[Writer]:
        centring = self.normmap.centrings.get(site.spec.width)
        terms = centring and centring.inputs.get(site.path)
        if not terms:
            return set()
        return {term for term in {*terms, *centring.leaves(terms)} if isinstance(term, Writer)}

    def _like(self, names: list[str], below: str) -> list[str]:
        """Idle parameters in the module `below` with the name of one of `names` but for numbers (another expert's)."""
        alike = {_NUMBER.sub("*", name) for name in names}
        return [name for name, blurred in self.blurred if name.startswith(below) and blurred in alike]

    def _reason(self, found: list[str], danger: str) -> str:
        first, *more = [name for name in self.names if name in set(found)]
        which = f"{first} and {len(more)} more" if more else first
        return (
            f"{which} did not take part in the observed pass, and {danger}; pass `inputs` that reach all parameters to "
            f"the library call"
        )


def _any_in(names: Iterable[str], module: str) -> bool:
    return any(name.startswith(f"{module}.") for name in names)


def _common(a: str, b: str) -> str:
    """The path of the module that holds both, with its dot."""
    common = ""
    for x, y in zip(a.split("."), b.split("."), strict=False):
        if x != y:
            break
        common += f"{x}."
    return common
