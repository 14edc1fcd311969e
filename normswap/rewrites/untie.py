"""Tied parameters: one tensor under several names, of which an edit may want to change only some.

What is edited is what one module uses, under the name that module holds it by. When another module uses the same
tensor in a way the edit would break, the names are separated (the tensor is stored once more) or the edit refused.
"""

from __future__ import annotations

from normswap.edits import AnyEdit, SetConfig, Untie
from normswap.normmap import NormMap


class Ties:
    """Collects which names must be separated, so that each is separated once."""

    def __init__(self, normmap: NormMap):
        self.normmap = normmap
        self.separated: dict[str, str] = {}  # alias -> first name

    def separate(self, parameter: str, module: str) -> str | None:
        """The name under which `module` alone holds `parameter` once it is untied; None if it holds no own name."""
        own = self.normmap.name_in(module, parameter)
        others = [name for name in self.normmap.names(parameter) if name != own]
        if own is None or not others:
            return None
        # one flag of the configuration ties everything: untying one means storing them all
        self.separated = dict(self.normmap.aliases)
        return own

    def edits(self) -> list[AnyEdit]:
        if not self.separated:
            return []
        untied = [Untie(tensor=alias, source=source) for alias, source in self.separated.items()]
        return [*untied, SetConfig(key="tie_word_embeddings", value=False)]
