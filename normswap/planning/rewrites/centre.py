"""LayerNorm -> RMSNorm, exactly: centre every writer of the stream (Jiang et al., NeurIPS 2023).

A LayerNorm does not see the mean of its input: `LN(x) = LN(x - mean(x))`. When everything that reads a stream is such,
the mean can be taken out of all that is written to it, `W <- W - mean(W)` along the stream, and then

    LN(x) = g (x - 0) / sqrt(mean(x^2) - 0 + eps) + b = RMSNorm(x) + b,

since the variance of a vector without mean is its mean square. Gain, bias and eps stay as they are. A term that no
parameter controls (the output of an embedding norm, of an activation, of an image tower) is centred explicitly where
it crosses a boundary of a module, as early as possible, so that one subtraction serves all norms behind it. A scale
per channel between a writer and the stream (LayerScale) moves into the writer first, since what it scales has no mean
of its own that matters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from normswap.paths import folded
from normswap.planning.edits import AnyEdit, Centre, CentreInput, CentreOutput, Fill, FoldGain, SwapNorm, TensorEdit
from normswap.planning.request import Request
from normswap.planning.rewrites.rewriting import WRITERS, Rewriting
from normswap.planning.rewrites.untie import Ties
from normswap.understand.centring import Term, Uncentred, Writer
from normswap.understand.normmap import NormMap, Site

SOURCE, TARGET = "layernorm", "rmsnorm"
#: what has to be done for a term to have no mean
Edits = dict[Writer, tuple[AnyEdit, ...]]


@dataclass
class Centred(Rewriting):
    """What centring asks for; the norms themselves are swapped by `swap`."""

    stage = WRITERS


@dataclass
class Swapped(Rewriting):
    """What swapping the norms asks for, whose inputs are centred.

    Attributes:
        writers: how many tensors are centred.
        outputs, inputs: modules whose output or input is centred at run time.
    """

    writers: int = 0
    outputs: list[str] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)

    def reasons(self) -> list[str]:
        said = []
        if self.sites:
            said.append(
                f"LayerNorm to RMSNorm at {len(self.sites)} sites: {self.writers} writers of the stream are centred, "
                f"and everything that reads it is invariant to its mean; the variance of a zero-mean vector is its "
                f"mean square."
            )
        for paths, what, how in ((self.outputs, "outputs", "come out"), (self.inputs, "inputs", "go in")):
            if paths:
                shown = ", ".join(path for path, _ in folded([(path, None) for path in paths]))
                said.append(f"The {what} of {shown} are centred as they {how}, in the module.")
        return said


def swap(normmap: NormMap, centred: Centred, bare: Collection[str], placed: Collection[str]) -> Swapped:
    """The RMSNorms in the place of the LayerNorms whose inputs are centred.

    Args:
        bare: paths of norms that lose gain and bias.
        placed: those that a move swaps itself.
    """
    result = Swapped(sites=list(centred.sites))
    result.writers = len([edit for edit in centred.edits if isinstance(edit, TensorEdit)])
    result.outputs = [edit.module for edit in centred.edits if isinstance(edit, CentreOutput)]
    result.inputs = [edit.module for edit in centred.edits if isinstance(edit, CentreInput)]
    result.edits = [_swap(normmap, normmap.sites[path], bare) for path in centred.sites if path not in placed]
    return result


def _swap(normmap: NormMap, site: Site, bare: Collection[str]) -> SwapNorm:
    spec, keeps = site.spec, site.path not in bare
    name = spec.weight or spec.bias
    shape = normmap.shape(f"{site.path}.{name}") if name and keeps else (spec.width,)
    # a LayerNorm that casts does so once, at the end; the swapped norm keeps the site's own casting
    return SwapNorm(
        module=site.path,
        kind=TARGET,
        width=spec.width,
        eps=spec.eps,
        gain=spec.gain if keeps else None,
        bias=spec.bias is not None and keeps,
        casting=spec.casting,
        axis=spec.axes[0],
        shape=None if shape == (spec.width,) else shape,
    )


def centre(normmap: NormMap, sites: Iterable[Site], ties: Ties, request: Request) -> Centred:
    """Plan the centring of everything that `sites` read.

    Where no weights control a mean it is subtracted at run time, as far as `request.explicit` allows: that is also how
    a parameter is left as it is that something else reads as well (`request.tied`).
    """
    sites = list(sites)
    solvers = {width: _Solver(normmap, width, ties, request) for width in {site.spec.width for site in sites}}
    found = {site.path: _answer(normmap, site, solvers[site.spec.width], request) for site in sites}
    if request.explicit == "shared":
        _refuse_lone(solvers, sites, found)
    result = Centred()
    chosen: Edits = {}
    for site in sites:
        edits = found[site.path]
        if isinstance(edits, str):
            result.refused[site.path] = edits
        else:
            chosen |= edits
            result.sites.append(site.path)
    edits = dict.fromkeys(edit for several in chosen.values() for edit in several)
    order = {name: i for i, name in enumerate(normmap.parameters)}
    result.edits = sorted(edits, key=lambda e: order.get(getattr(e, "tensor", ""), len(order)))
    return result


def _answer(normmap: NormMap, site: Site, solver: _Solver, request: Request) -> Edits | str:
    if (obstacle := _shape_obstacle(normmap, site)) is not None:
        return obstacle
    edits = solver.site(site)
    if isinstance(edits, str) and request.explicit == "always":
        axis = site.spec.axes[0]
        return {Writer(site.path, "input", axis, 1, site.path): (CentreInput(module=site.path, axis=axis),)}
    return edits


def _refuse_lone(solvers: dict[int, _Solver], sites: list[Site], found: dict[str, Edits | str]) -> None:
    """A subtraction of the mean from all that a single norm reads, and for it alone, is what that LayerNorm does."""
    lone: dict[str, str] | None = None
    while lone is None or lone:
        serves = Counter(writer for edits in found.values() if isinstance(edits, dict) for writer in edits)
        lone = {}
        for site in sites:
            edits = found[site.path]
            for writer in edits if isinstance(edits, dict) and len(edits) == 1 else ():
                if serves[writer] == 1 and (why := solvers[site.spec.width].why.get(writer)) is not None:
                    lone[site.path] = (
                        f"{why}; to subtract the mean in front of this norm alone is what the {SOURCE} does itself "
                        f"(--explicit always does it all the same)"
                    )
        found |= lone


def _shape_obstacle(normmap: NormMap, site: Site) -> str | None:
    """Why the norm at `site` has no counterpart whatever its input, None if it has."""
    if site.spec.gate is not None or site.spec.groups > 1:
        return "it normalises runs of its channels, or has a gate; only norms of all channels can be swapped"
    if len(site.spec.axes) != 1:
        return f"it normalises the axes {site.spec.axes} of its input together; only norms over one axis can be swapped"
    for name in (site.spec.weight, site.spec.bias):
        shape = normmap.shape(f"{site.path}.{name}") if name else (site.spec.width,)
        if shape[-1] != site.spec.width or (site.spec.axes != (-1,) and len(shape) > 1):
            return f"it has a {name} of shape {shape}; expected one value per channel"
    return None


class _Solver:
    """What has to be done so that the terms of one width have no mean, each term answered once."""

    def __init__(self, normmap: NormMap, width: int, ties: Ties, request: Request):
        self.normmap, self.width, self.ties, self.request = normmap, width, ties, request
        self.centring = normmap.centrings[width]
        self.known: dict[Writer, Edits | str] = {}
        self.why: dict[Writer, str] = {}  # per crossing centred explicitly, what no weights control
        self.open: list[Writer] = []  # crossings being solved: a module that is called again meets itself
        for crossing in self.centring.held:  # in execution order, so that no answer has to go deep
            self.term(crossing)

    def site(self, site: Site) -> Edits | str:
        """The edits that centre the input of `site`, or the reason why it cannot be centred."""
        if site.path not in self.centring.inputs:
            return "nothing that the model gives out depends on it"
        terms = self.centring.inputs[site.path]
        if terms is None:
            return "its input is not a sum of writers: what comes before it leaves nothing to centre"
        return self.all(terms)

    def all(self, terms: Iterable[Term]) -> Edits | str:
        edits: Edits = {}
        for term in sorted(terms, key=_rank):
            found = self.term(term)
            if isinstance(found, str):
                return found
            edits |= found
        return edits

    def term(self, term: Term) -> Edits | str:
        if isinstance(term, Uncentred):
            return term.reason
        if term in self.open:
            return {}  # centred if everything else it is made of is
        if term not in self.known:
            self.open.append(term)
            found = self._solve(term)
            self.open.pop()
            if self.open and term in self.centring.held:
                return found  # it may rest on a crossing that is still open
            self.known[term] = found
        return self.known[term]

    def _solve(self, term: Writer) -> Edits | str:
        if reasons := self.centring.blocked[term]:
            leaves = [leaf for leaf in self.centring.leaves({term}) if isinstance(leaf, Writer)] or [term]
            what = _what(min(leaves, key=_rank))
            return f"{what} writes to its input and cannot be centred: {reasons[0]}"
        if term.kind not in ("output", "input"):
            edits = self._parameter(term)
            return edits if isinstance(edits, str) else {term: edits}
        held = self.centring.held[term]
        inner = (
            f"{_what(term)} writes to its input, and no weights control its mean" if held is None else self.all(held)
        )
        if isinstance(inner, dict):
            return inner
        if not all(self._controlled(leaf) for leaf in self.centring.leaves({term})):
            self.why[term] = inner
        if self.request.explicit == "never":
            return inner
        edit = CentreOutput if term.kind == "output" else CentreInput
        return {term: (edit(module=term.name, axis=term.axis),)}

    def _controlled(self, leaf: Term) -> bool:
        """Whether a weight makes that term, though it may be one that cannot be changed."""
        return isinstance(leaf, Writer) and leaf.kind in ("parameter", "buffer") and not self.centring.blocked[leaf]

    def _parameter(self, writer: Writer) -> tuple[AnyEdit, ...] | str:
        """The edits that centre what a parameter adds, or the reason why there are none."""
        if writer.kind == "buffer" and writer.name not in self.normmap.stored:
            return f"{writer.name} is a buffer that checkpoints do not store"
        blocked = self.centring.blocked
        alike = (writer.name, writer.axis, writer.groups)
        unnoticed = {w.module for w in blocked if (w.name, w.axis, w.groups) == alike and not blocked[w]}
        others = self.ties.users(writer.name, writer.module) - unnoticed
        if not others:
            name = self.ties.name(writer.name, writer.module)
            folds = [FoldGain(tensor=name, axis=writer.axis, weight=scale, form="w") for scale in writer.scales]
            ones = [Fill(tensor=scale, value=1.0) for scale in writer.scales]
            return (*folds, Centre(tensor=name, axis=writer.axis, groups=writer.groups), *ones)
        self.ties.want(writer.name)
        return (
            f"{writer.name} writes to its input in {writer.module or 'the model'} and is used otherwise in "
            f"{', '.join(user or 'the model' for user in sorted(others))}; "
            f"it cannot be centred for the one without changing the other (try --tied "
            f"{'untie' if self.request.tied == 'keep' else 'keep'})"
        )


def _rank(term: Term) -> tuple:
    """Reasons that name no writer first; writers by name."""
    return (0, term.reason, "") if isinstance(term, Uncentred) else (1, term.name, term.module)


def _what(writer: Writer) -> str:
    return {"output": "the output of ", "input": "the input of "}.get(writer.kind, "") + writer.name
