"""Rotate a stream: it is carried as `R x` with R orthogonal, and the model computes the same (QuaRot, SliceGPT).

Everything that writes to the stream writes `R x` (`W <- R W` along the axis that lies along the stream, embeddings,
biases and all), everything that reads it turns it back in its weights (`W <- W R^T`), and an RMSNorm between them does
not see R, since `rms(R x) = rms(x)`:

    W n(x) = (W R^T) (R n(x)) = (W R^T) n(R x).

A norm's gain acts on single channels and does not commute with R: gains and biases move into the readers first, `W
diag(g)`. What belongs to one basis is found by `understand.bases`; if anything there acts on single channels, or is
added without a weight that could be rotated, the stream stays as it is. A LayerNorm takes the mean out, which is the
product with one direction: its stream is rotated when the plan makes an RMSNorm of it, after it was centred.

The other way, RMSNorm to LayerNorm: with v the direction that the readers lose least with, and R the reflection that
takes v to the direction of the mean, `1 / sqrt(d)`,

    LayerNorm(R x) = R (n - v v^T n) up to its scale,    n = n(x),

so that of all that the norm gave `v^T n` alone is lost. Its mean m over tokens goes into the bias of the LayerNorm,
`m / sqrt(d)` in every channel, and what the rest of n tells of it, `c^T n`, into the readers, `W <- W + (W v) c^T`.
Claim: `calibrated`; v, m and c are found on data (`calibration.rotations`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from normswap.planning.edits import AnyEdit, CentreInput, CentreOutput, Compensate, Rotate, SwapNorm
from normswap.planning.idle import Idle
from normswap.planning.orthogonal import Rotation
from normswap.planning.plans import RotatedStream
from normswap.planning.request import Request
from normswap.planning.rewrites.fold import Folding, fold
from normswap.planning.rewrites.rewriting import BASES, Rewriting
from normswap.planning.rewrites.untie import Ties
from normswap.understand.bases import Bases, Basis
from normswap.understand.normmap import NormMap, Site
from normswap.understand.transfer import Prober


@dataclass
class Rotated(Rewriting):
    """What rotating asks for.

    Attributes:
        folding: gains, which are folded first.
        lowered: the RMSNorms that become LayerNorms.
    """

    stage = BASES

    folding: Folding = field(default_factory=Folding)
    streams: list[RotatedStream] = field(default_factory=list)
    lowered: list[Site] = field(default_factory=list)

    def reasons(self) -> list[str]:
        names = ", ".join(dict.fromkeys(stream.name for stream in self.streams))
        weights = len([edit for edit in self.edits if isinstance(edit, Rotate)])
        carried = f"{names}: carried as R x with R orthogonal, in {weights} weights that write to it or read it"
        if not self.streams:
            return []
        why = "an RMSNorm does not see R, since rms(R x) = rms(x)."
        if self.lowered:
            why = (
                f"R takes the direction that is missed least to that of the mean, which is all that a LayerNorm takes "
                f"out at {len(self.lowered)} sites."
            )
        outputs = ", ".join(name for stream in self.streams for name in stream.outputs)
        inner = [f"{outputs}: given out as R x, without the gain of a norm before it."] if outputs else []
        return [f"{carried}; {why}", *inner]


class Rotator:
    """Plans rotations of one model; what is found out about it is found out once, however often a plan is made.

    Args:
        lowered: RMSNorms that are to become LayerNorms, whose streams are reflected.
        replaced: paths of norms that become something else in the same plan, neither RMSNorm nor LayerNorm.
    """

    def __init__(self, normmap: NormMap, request: Request, lowered: Collection[Site], replaced: Collection[str]):
        self.normmap, self.request, self.replaced = normmap, request, set(replaced)
        self.lowered = {site.path for site in lowered}
        self.order = {name: i for i, name in enumerate(normmap.parameters)}
        self.idle = Idle(normmap)
        self.bases: dict[int, Bases] = {}

    def rotate(self, ties: Ties, swapped: Collection[str], centred: Iterable[AnyEdit]) -> Rotated:
        """Rotate the streams that are asked for, of those that RMSNorms alone normalise.

        Args:
            swapped: paths of the LayerNorms that this plan makes RMSNorms of.
            centred: the edits that do so.
        """
        result = Rotated()
        wanted = self._wanted(swapped)
        unseen = self.idle.refuse_centring(wanted.values()) | self.idle.refuse_folding(wanted.values())
        for width in sorted({site.spec.width for site in wanted.values()}):
            for basis in self._bases(width).found(ties.name):
                own = [wanted[path] for path in basis.norms if path in wanted]
                if not own:
                    continue
                why = next((f"{site.path}: {unseen[site.path]}" for site in own if site.path in unseen), None)
                why = why or self._obstacle(basis, swapped, centred)
                bare = {*swapped, *self.lowered}
                folding = Folding() if why else fold(self.normmap, self._sites(basis), ties, bare, bool(basis.outputs))
                if folding.refused:
                    path, reason = next(iter(folding.refused.items()))
                    why = f"the gain of {path} acts on single channels and stays: {reason}"
                if why:
                    why += self._shared(basis, ties) + self._way_out()
                    result.refused |= {site.path: f"its stream cannot be rotated: {why}" for site in own}
                else:
                    result.folding.add(folding)
                    self._take(result, basis, own, ties)
        for path in wanted.keys() - {path for stream in result.streams for path in stream.sites}:
            result.refused.setdefault(path, f"its stream cannot be rotated: no weights make its input{self._way_out()}")
        return result

    def _wanted(self, swapped: Collection[str]) -> dict[str, Site]:
        """The norms whose streams are to be rotated."""
        sites = self.normmap.sites.items()
        if not self.request.rotate:
            return {path: site for path, site in sites if path in self.lowered}
        return {
            path: site
            for path, site in sites
            if site.stream is not None and len(site.spec.axes) == 1 and (_is_rms(site) or path in swapped)
        }

    def _bases(self, width: int) -> Bases:
        if width not in self.bases:
            specs = {path: site.spec for path, site in self.normmap.sites.items()}
            self.bases[width] = Bases(self.normmap.trace, specs, Prober(self.normmap.trace, width))
        return self.bases[width]

    def _sites(self, basis: Basis) -> list[Site]:
        return [self.normmap.sites[path] for path in basis.norms]

    def _obstacle(self, basis: Basis, swapped: Collection[str], centred: Iterable[AnyEdit]) -> str | None:
        if basis.blocked:
            return basis.blocked[0]
        for site in self._sites(basis):
            if site.path in self.replaced:
                return f"{site.path} becomes another kind of norm in the same plan"
            if not (_is_rms(site) or site.path in swapped):
                return f"the {site.spec.kind} {site.path} takes the mean out of it (--norm rmsnorm would change that)"
        for along in basis.parameters:
            if along.kind == "buffer" and along.name not in self.normmap.stored:
                return f"{along.name} is a buffer that checkpoints do not store"
        held = {v for v, _ in basis.values}
        for edit in centred:
            if isinstance(edit, CentreOutput | CentreInput):
                calls = [call for call in self.normmap.trace.calls if call.path == edit.module]
                ends = [call.inputs if isinstance(edit, CentreInput) else call.outputs for call in calls]
                if any(values[0] in held for values in ends if values):
                    return f"its mean is subtracted at run time in {edit.module} (--tied untie may do it in weights)"
        return None

    def _way_out(self) -> str:
        return "; --exact puts in a LayerNorm of [x, -x], for which nothing is rotated" if self.lowered else ""

    def _shared(self, basis: Basis, ties: Ties) -> str:
        """Of a basis that cannot be rotated: what to try where it is joined with others by tied parameters."""
        tied = [along.name for along in basis.parameters if len(self.normmap.names(along.name)) > 1]
        for name in tied:
            ties.want(name)
        hint = "--tied untie" in ties.way_out(tied[0]) if tied else False
        return f"; {tied[0]} is tied, which joins what could be rotated apart (try --tied untie)" if hint else ""

    def _take(self, result: Rotated, basis: Basis, own: list[Site], ties: Ties) -> None:
        number, width = len(result.streams), own[0].spec.width
        name = f"rotation.{number}"
        match self.request.rotate:
            case "hadamard" | "random" as by:
                rotation = Rotation(by=by, width=width, seed=number)
            case "pca":
                rotation = Rotation(by="fitted", width=width, fitted=name)
            case _:
                rotation = Rotation(by="reflected", width=width, fitted=name)
                for site in own:
                    result.lowered.append(site)
                    result.claim = "untrained"
                    result.edits += [_swap(site), *self._restored(site, ties, number)]
        stream = own[0].stream or own[0].path
        outputs = tuple(dict.fromkeys(basis.outputs))
        result.sites += basis.norms
        result.streams.append(RotatedStream(name=stream, rotation=rotation, sites=tuple(basis.norms), outputs=outputs))
        weights = {(self.order[a.name], ties.name(a.name, a.module), a.axis) for a in basis.parameters}
        result.edits += [Rotate(tensor=tensor, axis=axis, rotation=rotation) for _, tensor, axis in sorted(weights)]
        result.folding.across += [(path, along.module) for path in basis.norms for along in basis.parameters]

    def _restored(self, site: Site, ties: Ties, number: int) -> list[Compensate]:
        readers = dict.fromkeys((ties.name(reader.name, reader.module), reader.axis) for reader in site.readers)
        lost, told_by = lost_direction(number), restored(site.path)
        return [Compensate(tensor=name, axis=axis, lost=lost, told_by=told_by) for name, axis in readers]


def lost_direction(number: int) -> str:
    """Name of the fitted direction that the LayerNorms of the stream `number` take out."""
    return f"lost.{number}"


def restored(path: str) -> str:
    """Name of the fitted vector that tells what the LayerNorm at `path` takes out from what it leaves."""
    return f"{path}.restored"


def _swap(site: Site) -> SwapNorm:
    spec = site.spec
    return SwapNorm(
        module=site.path,
        kind="layernorm",
        width=spec.width,
        eps=spec.eps,
        gain=None,
        bias=True,
        casting="input" if spec.casting == "input" else "float32",  # there is no gain to round before
        axis=spec.axes[0],
    )


def _is_rms(site: Site) -> bool:
    return site.spec.kind == "rmsnorm"
