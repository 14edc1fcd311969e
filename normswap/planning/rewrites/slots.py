"""What a move does to the slots of blocks, edit by edit: norms added, emptied, folded, and the source around them."""

from __future__ import annotations

from collections import defaultdict

from normswap.norms.spec import GainForm, NormSpec
from normswap.planning.edits import AddNorm, AnyEdit, Change, Drop, Fill, Rewrite, Scale, SwapNorm
from normswap.planning.idle import Idle
from normswap.planning.rewrites.fold import fold, shared
from normswap.planning.rewrites.places import NoPlace, Place
from normswap.planning.rewrites.untie import Ties
from normswap.source.methods import Method
from normswap.understand.normmap import NormMap


def together(edits: list[AnyEdit]) -> list[AnyEdit]:
    """The same edits, with one rewrite for each method of a module: two streams may run through it."""
    rewrites: dict[tuple[str, str], Rewrite] = {}
    for edit in edits:
        if isinstance(edit, Rewrite):
            key = edit.module, edit.method
            so_far = rewrites[key].changes if key in rewrites else ()
            rewrites[key] = edit.model_copy(update={"changes": tuple(dict.fromkeys((*so_far, *edit.changes)))})
    return [*(edit for edit in edits if not isinstance(edit, Rewrite)), *rewrites.values()]


class Slots:
    """Gathers the edits of a move.

    Args:
        swapped: LayerNorms that become RMSNorms in the same plan.
        named: attributes that the plan gives to modules so far.
    """

    def __init__(self, normmap: NormMap, swapped: set[str], named: set[str]):
        self.normmap, self.swapped = normmap, swapped
        self.ties, self.idle = Ties(normmap, untied=False), Idle(normmap)
        self.edits: list[AnyEdit] = []
        self.changes: dict[str, list[tuple[Method, Change]]] = defaultdict(list)
        self.named = named

    def rewrites(self) -> list[Rewrite]:
        """One edit per method of a module."""
        found = []
        for module, changes in self.changes.items():
            for method in dict.fromkeys(method for method, _ in changes):
                made = tuple(dict.fromkeys(change for m, change in changes if m is method))
                found.append(Rewrite(module=module, method=method.name, changes=made, digest=method.digest))
        return found

    def spec(self, path: str) -> NormSpec:
        return self.normmap.sites[path].spec

    def kind(self, path: str) -> str:
        return "rmsnorm" if path in self.swapped else self.spec(path).kind

    def serves(self, path: str, norm: NormSpec, gain: float) -> bool:
        """Whether the norm at `path`, its gain refilled, is `gain` times `norm`."""
        own = self.spec(path)
        alike = norm.model_copy(update={"gain": own.gain, "weight": own.weight, "bias": own.bias})
        return own.model_copy(update={"kind": self.kind(path)}) == alike and (own.weight is not None or gain == 1.0)

    def add_norm(self, path: str, norm: NormSpec, kind: str, gain: GainForm | None, bias: bool) -> None:
        """A norm of `kind` where there was none, else as `norm` is; its parameters begin neutral."""
        self.edits.append(
            AddNorm(
                module=path,
                kind=kind,
                width=norm.width,
                eps=norm.eps,
                gain=gain,
                bias=bias,
                casting=norm.casting,
                axis=norm.axes[0],
            )
        )

    def add(self, path: str, norm: NormSpec, gain: float) -> None:
        """A norm as `norm` is, with the gain c throughout."""
        self.add_norm(path, norm, norm.kind, "w", norm.bias is not None)
        self.edits.append(Fill(tensor=f"{path}.weight", value=gain, shape=(norm.width,)))

    def refill(self, path: str, gain: float) -> None:
        """A norm whose gain and bias were folded away gets the gain c."""
        spec = self.spec(path)
        value = gain - 1 if spec.gain == "1 + w" else gain
        if spec.weight is not None:
            self.edits.append(Fill(tensor=f"{path}.{spec.weight}", value=value))
        if spec.bias is not None:
            self.edits.append(Fill(tensor=f"{path}.{spec.bias}", value=0.0))

    def fold(self, path: str, c: float) -> bool:
        """`W diag(g) / c`, `c + W b` for the readers of a norm; False where they cannot take it."""
        site = self.normmap.sites[path]
        if self.idle.refuse_folding([site]):
            return False
        if site.spec.weight is None and site.spec.bias is None:
            return c == 1.0
        folding = fold(self.normmap, [site], self.ties, set())
        if path in folding.refused:
            return False
        own = {f"{path}.{name}" for name in (site.spec.weight, site.spec.bias)}
        edits = [edit for edit in folding.edits if getattr(edit, "tensor", None) not in own]
        self.edits += edits
        if c != 1.0:
            names = dict.fromkeys(self.ties.name(reader.name, reader.module) for reader in site.readers)
            self.edits += [Scale(tensor=name, factor=1 / c) for name in names]
        return True

    def remove(self, path: str) -> None:
        """The norm hands on its input; its parameters are gone, folded elsewhere."""
        self.swap(path, "identity")
        spec = self.spec(path)
        for name in filter(None, (spec.weight, spec.bias)):
            self.edits.append(Drop(tensor=f"{path}.{name}"))

    def affine(self, path: str, c: float) -> None:
        """The norm becomes `(g / c) x + b`."""
        spec = self.spec(path)
        if spec.weight is None and spec.bias is None and c == 1.0:
            self.swap(path, "identity")
            return
        self.swap(path, "affine")
        if c != 1.0 and spec.weight is not None:
            self.edits.append(Scale(tensor=f"{path}.{spec.weight}", factor=1 / c, form=spec.gain))
        elif spec.weight is None:
            self.edits.append(Fill(tensor=f"{path}.weight", value=1 / c, shape=(spec.width,)))

    def rescale(self, path: str, c: float) -> None:
        """The norm gives c times what it gave: of a gain that it does not have, it gets one."""
        spec = self.spec(path)
        if why := shared(self.normmap, self.normmap.sites[path]):
            raise NoPlace(f"{path} cannot be scaled: {why}.")
        if spec.weight is None:
            self.swap(path, self.kind(path), gain="w")
            self.edits.append(Fill(tensor=f"{path}.weight", value=c, shape=(spec.channels,)))
        for name, form in ((spec.weight, spec.gain), (spec.bias, "w")):
            if name is not None:
                self.edits.append(Scale(tensor=f"{path}.{name}", factor=c, form=form))

    def swap(self, path: str, kind: str, eps: float | None = None, gain: GainForm | None = None) -> None:
        """A norm of `kind` in the place of the one at `path`: with its eps and gain, where no other is given."""
        spec = self.spec(path)
        if path in self.normmap.twins:
            raise NoPlace(f"{path} is {', '.join(self.normmap.twins[path])} as well, which would stay as it is.")
        if spec.weight not in (None, "weight") or spec.bias not in (None, "bias"):
            raise NoPlace(f"{path}: expected parameters named weight and bias, found {spec.weight} and {spec.bias}.")
        name = spec.weight or spec.bias
        shape = self.normmap.shape(f"{path}.{name}") if name else (spec.width,)
        self.edits.append(
            SwapNorm(
                module=path,
                kind=kind,
                width=spec.width,
                eps=spec.eps if eps is None else eps,
                gain=None if kind == "identity" else spec.gain or ("w" if kind == "affine" else gain),
                bias=kind != "identity" and spec.bias is not None,
                casting=spec.casting,
                axis=spec.axes[0],
                shape=None if shape == (spec.width,) else shape,
            )
        )

    def change(self, place: Place, kind: str, name: str | None, node=None) -> None:
        self.changes[place.module].append((place.method, place.change(kind, name, node)))

    def enter(self, module: str, method: Method, argument: str, name: str) -> None:
        """`argument = self.name(argument)` where the module begins."""
        self.changes[module].append((method, Change(kind="enter", name=name, argument=argument)))

    def new_name(self, module: str, wanted: str) -> str:
        """An attribute that the module does not have: `wanted`, or with a number."""
        taken = self.normmap.attributes | self.named
        number = 1
        while f"{module}.{(name := wanted if number == 1 else f'{wanted}_{number}')}" in taken:
            number += 1
        self.named.add(f"{module}.{name}")
        return name
