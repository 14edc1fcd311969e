"""Tied parameters: one tensor under several names, of which an edit may want to change only some.

While tied, an edit of the tensor reaches every module that reads it. Untied, each name is a tensor of its own (the
configuration has one flag for all of them), and an edit reaches the modules that hold it by that name.
"""

from __future__ import annotations

from normswap.planning.edits import AnyEdit, SetConfig, Untie
from normswap.planning.rewrites.rewriting import UNTIED, Rewriting
from normswap.understand.normmap import NormMap


class Untied(Rewriting):
    """What storing tied parameters one by one asks for."""

    stage = UNTIED


class Ties:
    """By which name a module reads a parameter, and who else reads it by that name.

    Attributes:
        untied: whether tied names are separated in this plan.
        wanted: set by a rewrite that could go on if they were.
        stays_tied: why they cannot be, None where they can.
    """

    def __init__(self, normmap: NormMap, untied: bool, stays_tied: str | None = None):
        self.normmap, self.untied, self.stays_tied = normmap, untied, stays_tied
        self.wanted = False

    def name(self, parameter: str, module: str) -> str:
        own = self.normmap.name_in(module, parameter)
        return own if self.untied and own is not None else parameter

    def users(self, parameter: str, module: str) -> set[str]:
        """Modules that read the tensor which `module` reads as `parameter`, itself included."""
        name = self.name(parameter, module)
        return {user for user in self.normmap.users(parameter) if self.name(parameter, user) == name}

    def want(self, parameter: str) -> None:
        if len(self.normmap.names(parameter)) > 1:
            self.wanted = True

    def way_out(self, parameter: str) -> str:
        """What to do about a parameter that others use too."""
        if len(self.normmap.names(parameter)) == 1 or self.untied:
            return "they read it by one name and cannot be untied"
        return self.stays_tied or "untie them with --tied untie"

    def edits(self) -> list[AnyEdit]:
        if not self.untied:
            return []
        untied = [Untie(tensor=alias, source=source) for alias, source in self.normmap.aliases.items()]
        return [*untied, SetConfig(key="tie_word_embeddings", value=False)]
