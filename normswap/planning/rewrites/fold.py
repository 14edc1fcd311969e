"""Fold a norm's gain and bias into its readers, leaving a weightless norm (FlashNorm; SliceGPT).

For a reader `y = W n + c` of `n = z diag(g) + b`:

    y = (W diag(g)) z + (c + W b),

with W in the second term as it was before the gain. For a `1 + w` norm g is `1 + w`. W may be a convolution, where no
padding hides b at the border. Every consumer of the norm must be such a reader, and every reader must read this norm
alone; a reader without a bias grows one if there is a b. Gain and bias of a group norm lie along the first of its axes,
its channels.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from normswap.norms.spec import GainForm
from normswap.planning.edits import AnyEdit, Drop, Fill, FoldBias, FoldGain, Frozen, GrowBias, TensorEdit
from normswap.planning.rewrites.rewriting import Rewriting
from normswap.planning.rewrites.untie import Ties
from normswap.understand.normmap import NormMap, Site
from normswap.understand.reading import GIVEN_OUT, Reader


@dataclass
class Folding(Rewriting):
    """What folding asks for.

    Attributes:
        across: each norm, and a module that takes it over.
    """

    across: list[tuple[str, str]] = field(default_factory=list)

    def reasons(self) -> list[str]:
        if not self.sites:
            return []
        return [f"Gain and bias of {len(self.sites)} norms are moved into the linear maps that read them."]

    def add(self, other: Folding) -> Folding:
        """Take in what another one asks for."""
        self.edits += other.edits
        self.sites += other.sites
        self.refused |= other.refused
        self.across += other.across
        return self


def fold(normmap: NormMap, sites: Iterable[Site], ties: Ties, swapped: set[str], given_out: bool = False) -> Folding:
    """Plan the folding of the gains and biases of `sites` into their readers.

    Args:
        swapped: sites whose module is replaced anyway and so loses its parameters; others keep neutral ones, so that
            the stock class still loads them.
        given_out: whether what the model gives out besides its result may lack them.
    """
    result = Folding()
    for site in sites:
        if site.spec.weight is None and site.spec.bias is None:
            continue
        edits = _site_edits(normmap, site, ties, given_out)
        if isinstance(edits, str):
            result.refused[site.path] = edits
            continue
        result.edits += edits
        neutral = {site.spec.weight: 0.0 if site.spec.gain == "1 + w" else 1.0, site.spec.bias: 0.0}
        for parameter, value in neutral.items():
            if parameter is not None:
                name = f"{site.path}.{parameter}"
                result.edits.append(Drop(tensor=name) if site.path in swapped else Fill(tensor=name, value=value))
        result.sites.append(site.path)
        result.across += [(site.path, reader.module) for reader in site.readers]
    return result


def _site_edits(normmap: NormMap, site: Site, ties: Ties, given_out: bool) -> list[AnyEdit] | str:
    """Edits of the site's readers, or the reason why it cannot be folded."""
    spec = site.spec
    if len(spec.axes) != 1 and spec.kind != "groupnorm":
        return f"it normalises axes {spec.axes} together; only gains along one axis can be folded"
    if spec.bias is not None and spec.gate is not None and spec.gate.place == "after":
        return "its bias is multiplied by its gate, which is another for every token"
    gain, bias = (f"{site.path}.{name}" if name else None for name in (spec.weight, spec.bias))
    return shared(normmap, site) or into_readers(normmap, site, ties, gain, spec.gain, bias, given_out)


def shared(normmap: NormMap, site: Site) -> str | None:
    """Why the tensors of a norm cannot leave it, None if they can: each is the norm's own, a value per channel."""
    spec = site.spec
    for parameter in filter(None, (spec.weight, spec.bias, spec.mean, spec.variance)):
        name = f"{site.path}.{parameter}"
        if math.prod(shape := normmap.shape(name)) != spec.channels:
            return f"its {parameter} has shape {shape}; only one value per normalised channel can be folded"
        if others := set(normmap.names(name)) - {name}:
            return f"its {parameter} is {', '.join(sorted(others))} as well, which would lose it too"
    if site.path in normmap.twins:
        return f"it is {', '.join(normmap.twins[site.path])} as well, which would be lost too"
    return None


def into_readers(
    normmap: NormMap,
    site: Site,
    ties: Ties,
    gain: str | Frozen | None,
    form: GainForm | None,
    bias: str | Frozen | None,
    given_out: bool = False,
) -> list[AnyEdit] | str:
    """Edits by which the readers of a norm take over `gain` and `bias`, None for none; or why they cannot."""
    channels = site.spec.channels
    if others := [reason for reason in site.other_consumers if not (given_out and reason == GIVEN_OUT)]:
        return f"its gain cannot move into its readers: {others[0]}"
    if not site.readers:
        return "its gain cannot move into its readers: nothing that the model gives out reads it"
    if bias is not None and not normmap.readings[channels].translates[site.path]:
        return "its bias does not reach its readers unchanged (a mask or a router stands between)"
    edits: list[AnyEdit] = []
    for reader in site.readers:
        if (reason := _obstacle(normmap, reader.name, reader.module, site, ties)) is not None:
            return reason
        name = ties.name(reader.name, reader.module)
        runs = normmap.parameters[reader.name][reader.axis] // channels
        if bias is not None:
            into = _bias_edits(normmap, reader, name, runs, bias, site, ties)
            if isinstance(into, str):
                return into
            edits += into
        if gain is not None:
            edits.append(FoldGain(tensor=name, axis=reader.axis, weight=gain, form=form, runs=runs))
    edits = list(dict.fromkeys(edits))  # a module called twice reads twice and is changed once
    changed = Counter(edit.tensor for edit in edits if isinstance(edit, TensorEdit))
    if twice := [name for name, times in changed.items() if times > 1]:
        return f"{twice[0]} reads it in two ways, which call for different changes"
    return edits


def _obstacle(normmap: NormMap, parameter: str, module: str, site: Site, ties: Ties) -> str | None:
    """Why the tensor that `module` reads as `parameter` cannot be changed for this site alone, None if it can."""
    uses = normmap.readings[site.spec.channels].uses
    users = ties.users(parameter, module)
    if set().union(*(uses.get((parameter, user), {""}) for user in users)) == {site.path}:
        return None
    others = ", ".join(user or "the model" for user in sorted(users - {module}))
    module = module or "the model"
    if not others:
        return f"{parameter} in {module} reads other values too"
    ties.want(parameter)
    return f"its reader {parameter} in {module} is used in {others} as well; {ties.way_out(parameter)}"


def _bias_edits(
    normmap: NormMap, reader: Reader, name: str, runs: int, bias: str | Frozen, site: Site, ties: Ties
) -> list[AnyEdit] | str:
    """Edits that take the norm's bias into the bias of one reader, or the reason why there is no such bias."""
    carried = tuple(n for axis, n in enumerate(normmap.parameters[reader.name]) if axis not in reader.sums)
    edit = FoldBias(
        tensor=f"{reader.module}.bias",
        reader=name,
        axis=reader.axis,
        bias=bias,
        sums=None if reader.sums == (reader.axis,) else reader.sums,
        runs=runs,
    )
    if reader.bias is not None and normmap.parameters[reader.bias] == carried:
        if (reason := _obstacle(normmap, reader.bias, reader.module, site, ties)) is not None:
            return reason
        return [edit.model_copy(update={"tensor": ties.name(reader.bias, reader.module)})]
    built_without = reader.module in normmap.biasless and normmap.name_in(reader.module, reader.name) is not None
    if not (reader.grows and built_without and len(carried) == 1):
        return f"its reader {reader.name} is linear, but has no bias to take the norm's and cannot grow one"
    return [GrowBias(module=reader.module, size=carried[0]), edit]
