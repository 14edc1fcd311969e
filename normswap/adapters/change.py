"""What an adapter changes of its base, and what a plan makes of that, tensor by tensor.

The base's weights become `E(W)`, so that a low-rank change beside them becomes the linear part of E on `s B A`, which
acts on one factor (`planning.adapted`). Where a norm's bias b was folded into a layer, `c + W b`, the change owes its
bias `s B A b`: it goes into the bias of B. What was trained as a whole is edited as the base's own tensor is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from normswap.adapters.folder import MERGE
from normswap.adapters.slots import LowRank, Slots
from normswap.checkpoint.keymap import KeyMap
from normswap.errors import RefusedError
from normswap.planning.adapted import NotCarried, around, linear_part, neutral
from normswap.planning.edits import Fill, FoldBias, FoldGain, ModuleEdit, Read, Refit, Scale, TensorEdit, Unscale, Untie
from normswap.planning.plans import Plan

Tensors = dict[str, torch.Tensor]
#: gives a tensor of the source by its name in the model, in float64; not to be written to
Original = Callable[[str], torch.Tensor]


class Change:
    """What an adapter changes of the base, and what the plan makes of that. All values are in float64.

    Args:
        name: of the adapter.
        slots: of the adapter on the source.
        before: its tensors by key.
        original: gives the source's.

    Every method raises RefusedError, naming the adapter's tensor, where a change does not survive the plan.
    """

    def __init__(self, name: str, slots: Slots, before: Tensors, keymap: KeyMap, plan: Plan, original: Original):
        self.name, self.slots, self.before = name, slots, before
        self.keymap, self.plan = keymap, plan
        self.edits = plan.tensor_edits()
        self.untied = {edit.tensor for edit in plan.edits if isinstance(edit, Untie)}
        self.read = plan.reading(original)
        self.trained = {name: key for key, name in slots.whole.items()}
        self.readers = {edit.reader for edit in plan.edits if isinstance(edit, FoldBias)}
        self.by_weight = {found.weight: found for found in slots.low_rank.values()}

    def steps(self, name: str) -> list[TensorEdit]:
        """The edits of a tensor, whichever of its names the plan calls it by."""
        if name in self.untied:
            return self.edits.get(name, [])
        return [edit for alias in self.aliases(name) - self.untied for edit in self.edits.get(alias, [])]

    def aliases(self, name: str) -> set[str]:
        return set(self.keymap.names_of(name))

    def check_read(self, held: set[str]) -> None:
        """Raise RefusedError where the plan takes into a tensor what the adapter trained elsewhere.

        Args:
            held: names of the tensors that the converted adapter holds in full.
        """
        rows = {name for name, _ in self.slots.rows.values()}
        for edit in self.plan.edits:
            if not isinstance(edit, TensorEdit):
                continue
            for name in edit.reads():
                if name in self.trained and not self._stays(edit, name):
                    self._refuse(name, f"the plan takes {name} over into {edit.tensor}")
                if isinstance(edit, Untie) and self.aliases(name) & rows:
                    self._refuse(
                        name, f"the plan gives {edit.tensor} rows of its own, which the adapter trained in one"
                    )
            if isinstance(edit, FoldBias) and edit.tensor not in held:
                self._check_owed(edit)

    def _stays(self, edit: TensorEdit, name: str) -> bool:
        """Whether what `edit` reads of a trained tensor is the base's, and the rest stays with the tensor."""
        if isinstance(edit, FoldGain) and edit.weight == name or isinstance(edit, FoldBias) and edit.bias == name:
            return True  # `neutral` sees to it
        return isinstance(edit, FoldBias) and edit.reader == name or isinstance(edit, Untie)

    def _check_owed(self, edit: FoldBias) -> None:
        """Of a bias that the adapter does not train: whether there is a place for what the trained reader owes it."""
        found = self._beside(edit.reader)
        if edit.reader not in self.trained and (found is None or found.bias == edit.tensor):
            return
        if self._owed(edit).any():
            self._refuse(edit.reader, f"with it {edit.tensor} takes over a norm's bias, and nothing of it is trained")

    def _owed(self, edit: FoldBias) -> torch.Tensor:
        """What the bias takes over by the change of its reader, `d b` in the place of `W b`; b is the base's."""
        change = self._difference(edit.reader)
        return edit.carried(Read(lambda name: change if name == edit.reader else self.read(name)))

    def _beside(self, name: str) -> LowRank | None:
        """The change beside the layer whose weight is `name`; a tied one's other layers have none."""
        return self.by_weight.get(name) or (
            None
            if name in self.untied
            else next((self.by_weight[n] for n in self.aliases(name) - self.untied if n in self.by_weight), None)
        )

    def _difference(self, name: str) -> torch.Tensor:
        """How far a weight as it acts with the adapter is from the base's."""
        if (found := self._beside(name)) is None:
            base = self.read(name)
            return self.before[self.trained[name]] - base if name in self.trained else torch.zeros_like(base)
        delta = found.delta(self.before[found.a], self.before[found.b])
        if found.magnitude is None:
            return delta
        weight = self.read(name) + delta
        length = found.lengths(weight)
        return weight * self.before[found.magnitude].reshape_as(length) / length - self.read(name)

    def _effective(self, name: str) -> torch.Tensor:
        """What edits of a trained tensor read: its reader's weight as it acts, and a norm's as the base has it."""
        return self.read(name) + self._difference(name) if name in self.readers else self.read(name)

    def factors(self, found: LowRank) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B beside the edited weight."""
        factor = {"a": self.before[found.a], "b": self.before[found.b]}
        with _naming(self.name, found.a.removesuffix(".weight")):
            parts = [linear_part(edit) for edit in self.steps(found.weight)]
            parts += [
                around(edit, found.weight, *found.ends)
                for edit in self._module_edits(found.path if found.beside else None)
            ]
            for part in (part for part in parts if part is not None):
                dims = len(self.keymap.shapes[found.weight])
                which, axis = found.axes.get(getattr(part, "axis", 0) % dims, (None, None))
                if which is None:
                    raise NotCarried(f"{found.weight} is changed along an axis that neither factor has alone")
                moved = part.model_copy(update={"axis": axis}) if hasattr(part, "axis") else part
                factor[which] = moved.apply(factor[which], self.read)
        return factor["a"], factor["b"]

    def magnitude(self, found: LowRank, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """m beside the edited weight and the carried A and B.

        An edit that gives each output a multiple of what it was, or acts on the inputs, `r <- d r Q`, takes `m r / |r|`
        to `m d r Q / |r|`, which is `m' d r Q / |d r Q|` for `m' = m |d r Q| / |r|`.
        """
        before = weight = self.read(found.weight)
        with _naming(self.name, found.magnitude):
            for edit in self.steps(found.weight):
                if not isinstance(edit, Untie):
                    apart = isinstance(edit, FoldGain | Scale | Unscale) or getattr(edit, "axis", None) == found.ends[1]
                    if linear_part(edit) != edit or not apart:
                        raise NotCarried(f"{edit.edit} of {found.weight} mixes what makes its outputs, or adds to it")
                    weight = edit.apply(weight, self.read)
            for edit in self._module_edits(found.path if found.beside else None):
                part = around(edit, found.weight, *found.ends)
                if part is not None and part.axis == found.ends[0]:
                    raise NotCarried(f"{edit.edit} of {found.path} mixes its outputs")
            lengths = found.lengths(weight + found.delta(a, b))
            if not lengths.all():
                raise NotCarried(f"an output of {found.path} is nothing after the conversion, which has no magnitude")
        ratio = lengths / found.lengths(before + found.delta(self.before[found.a], self.before[found.b]))
        return self.before[found.magnitude] * ratio.flatten()

    def bias(self, found: LowRank, held: set[str]) -> torch.Tensor:
        """What the change adds to the layer's output whatever its input, once the layer is converted.

        Args:
            held: as for `check_read`.
        """
        out = self.before[found.b].shape[0]
        added = torch.zeros(out, dtype=torch.float64)
        if found.beta is not None:
            added = found.scaling * self.before[found.beta]
        with _naming(self.name, found.b.removesuffix(".weight")):
            for edit in self.steps(found.bias):
                if isinstance(edit, FoldBias) and found.bias not in held:  # else it is in what is stored in full
                    added = added + self._owed(edit)
                elif added.any() and (part := linear_part(edit)) is not None:
                    added = part.apply(added, self.read)
            for edit in self._module_edits(found.path if found.beside else None):
                part = around(edit, found.weight, *found.ends)
                if part is not None and part.axis == found.ends[0]:
                    added = added - added.mean()
        return added

    def whole(self, key: str, name: str) -> torch.Tensor:
        """A tensor that the adapter holds in full, edited; one that the source lacks begins as the plan says."""
        with _naming(self.name, key):
            value = self.before.get(key)
            if value is None:
                made = [fill for edit in self.plan.module_edits() for fill in edit.makes() if fill.tensor == name]
                value = made[0].apply(None, self.read) if made else self.read(name)
            for edit in self.steps(name):
                if isinstance(edit, Refit):
                    linear_part(edit)
                if isinstance(edit, Fill) and key in self.before:
                    value = neutral(name, self.before[key], self.plan.edits, self.read)
                elif not isinstance(edit, Untie):
                    value = edit.apply(value, Read(self._effective))
            if value is None:
                raise NotCarried(f"the plan removes {name}")
        return value

    def rows(self, key: str, name: str) -> torch.Tensor:
        """Rows of an embedding, edited."""
        value = self.before[key]
        with _naming(self.name, key):
            if edits := self._module_edits(name.rpartition(".")[0]):
                raise NotCarried(
                    f"the plan changes what {edits[0].module} computes ({edits[0].edit}), which PEFT passes by for "
                    f"trained rows; with --tied untie its weights may do"
                )
            for edit in self.steps(name):
                if getattr(edit, "axis", 0) == 0 and edit.mixes() != ():
                    raise NotCarried(f"{edit.edit} of {name} mixes its rows, or puts others in their place")
                value = edit.apply(value, self.read)
        return value

    def _module_edits(self, path: str | None) -> list[ModuleEdit]:
        return [edit for edit in self.plan.module_edits() if edit.module == path]

    def _refuse(self, name: str, why: str) -> None:
        key = self.trained.get(name) or name
        raise RefusedError(f"the adapter {self.name} cannot be carried: {key}: {why}. {MERGE}")


@contextmanager
def _naming(adapter: str, key: str) -> Iterator[None]:
    """Turns NotCarried into an error that names the adapter's tensor."""
    try:
        yield
    except NotCarried as error:
        raise RefusedError(f"the adapter {adapter} cannot be carried: {key}: {error}. {MERGE}") from error
