"""Understand: from a trace to the NormMap, which says what the norms of a model are, where, and who writes and reads.

The map is data (`NormMap.summary`); the analyses it rests on stay with it for the planner.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from normswap.checkpoint.files import Checkpoint, has_weights
from normswap.checkpoint.source import Source
from normswap.norms.own import own_norms
from normswap.norms.probe import FUNCTIONS, find_norms
from normswap.norms.spec import NormSpec
from normswap.observe.inputs import example_inputs
from normswap.observe.run import observe
from normswap.observe.trace import Operation, Trace, collapse_norms
from normswap.understand.bypass import Bypass, bypasses
from normswap.understand.centring import Centring, Writer, centring
from normswap.understand.placement import Block, Stream, Streams, outermost
from normswap.understand.reading import Reader, Readings, readings
from normswap.understand.transfer import Prober
from normswap.understand.writing import Writings, writings

ROLES = ("stream", "branch", "qk", "embedding", "final", "head")


@dataclass
class Site:
    """One norm module in one place.

    Attributes:
        path: the module's path in the model.
        spec: its behaviour.
        role: `stream` (reads or closes a residual step), `branch` (inside one), `qk` (on queries or keys),
            `embedding` (before the first block), `final` (after the last), `head` (in the task head).
        stream: name of the stream it stands on, None for norms inside branches and heads.
        readers: the parameters that consume its output.
        other_consumers: what else does, in words.
        tensors: its parameters and buffers by their names in it, with their shapes.
    """

    path: str
    spec: NormSpec
    role: str
    stream: str | None
    readers: list[Reader]
    other_consumers: list[str]
    tensors: dict[str, tuple[int, ...]]


@dataclass
class StreamInfo:
    """One residual stream.

    Attributes:
        name: the module that all its blocks stand in.
        writers: what adds to it, in the model's order.
        blocks: in order.
        found: the analysis, with its values and the norms before the first block and after the last.
    """

    name: str
    width: int
    writers: list[Writer]
    blocks: list[Block]
    found: Stream


@dataclass
class NormMap:
    """The norms of one model.

    Attributes:
        architecture: class name of the model.
        sites: in execution order.
        streams: in order of their first block.
        parameters: shape of each parameter and buffer by its first name.
        aliases: further names of tied parameters -> the first name.
        twins: further paths of modules that stand at several, by the first one.
        stored: names of all parameters and buffers a checkpoint of this model holds, aliases included.
        biasless: modules that were built without the bias their class can have.
        classes: class of each module by its path.
        attributes: names of all that modules hold: modules, parameters, buffers, numbers, ...
        centrings, readings, writings: per width, and per number of channels, the analyses behind the map.
        bypasses: by path of a batch norm beside a convolution, what can carry it.
        own: paths of the sites that are known by their class, which a conversion put there (`norms.own`).
        loose: per module, the kind of a norm that it calls as a function; such a norm is no site.
        notes: what a reader should know: loose norms, and values that the observed run asked for and did not have.
        converted: for a folder that normswap wrote, what was done to it, in a sentence.
        files: of a folder with weights, from their headers: number of tensors, bytes, and how many have which dtype.
    """

    architecture: str
    sites: dict[str, Site]
    streams: list[StreamInfo]
    parameters: dict[str, tuple[int, ...]]
    aliases: dict[str, str]
    twins: dict[str, list[str]]
    stored: set[str]
    biasless: set[str]
    classes: dict[str, type[nn.Module]]
    attributes: set[str]
    trace: Trace
    centrings: dict[int, Centring] = field(default_factory=dict)
    readings: dict[int, Readings] = field(default_factory=dict)
    writings: dict[int, Writings] = field(default_factory=dict)
    bypasses: dict[str, Bypass] = field(default_factory=dict)
    own: set[str] = field(default_factory=set)
    loose: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    converted: str | None = None
    files: dict[str, Any] | None = None

    @classmethod
    def of(cls, model: nn.Module, inputs: Mapping[str, Any]) -> NormMap:
        """Observe `model` once on `inputs` and understand it. Raises ObserveError where it cannot be run."""
        trace = observe(model, inputs)
        found_norms = find_norms(model, trace)
        own = {path: spec for path, spec in own_norms(model, trace).items() if path not in found_norms.specs}
        norms = found_norms.specs | own
        trace = collapse_norms(trace, set(norms))
        followed = [spec for spec in norms.values() if len(spec.axes) == 1 and spec.kind in ("layernorm", "rmsnorm")]
        followed += own.values()
        running = [spec for spec in norms.values() if spec.kind == "batchnorm"]
        on_maps = [spec for spec in norms.values() if spec.kind == "groupnorm"]
        widths, channels = (
            sorted({spec.width for spec in followed}),
            {spec.channels for spec in (*followed, *running, *on_maps)},
        )
        called = {op.module: op.name for op in trace.operations if op.function in FUNCTIONS}
        loose = {op.module: FUNCTIONS[op.function] for op in trace.operations if op.function in FUNCTIONS}
        probers = {width: Prober(trace, width) for width in {*widths, *channels}}
        names = dict(model.named_parameters()) | dict(model.named_buffers())
        first = {id(t): name for name, t in reversed(names.items())}
        aliases = {
            name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False) if first[id(p)] != name
        }
        standing = {id(m): path for path, m in model.named_modules()}
        twins: dict[str, list[str]] = {}
        for path, m in model.named_modules(remove_duplicate=False):
            if standing[id(m)] != path:
                twins.setdefault(standing[id(m)], []).append(path)
        written = {width: writings(trace, norms, probers[width]) for width in {spec.channels for spec in running}}
        result = cls(
            architecture=type(model).__name__,
            sites={},
            streams=[],
            parameters={name: tuple(t.shape) for name, t in names.items()},
            aliases=aliases,
            twins=twins,
            stored=set(model.state_dict()),
            biasless={path for path, m in model.named_modules() if m._parameters.get("bias", m) is None},
            classes={path: type(m) for path, m in model.named_modules()},
            attributes={f"{path}.{name}" for path, m in model.named_modules() for name in _held(m)},
            trace=trace,
            centrings={width: centring(trace, norms, probers[width]) for width in widths},
            readings={width: readings(trace, norms, probers[width]) for width in sorted(channels)},
            writings=written,
            bypasses={
                norm: found
                for width, made in written.items()
                for norm, found in bypasses(trace, norms, probers[width], made).items()
            },
            own=set(own),
            loose=loose,
            notes=[
                *(
                    f"{module or 'the model'} calls {name} as a function, which stays as it is"
                    for module, name in called.items()
                ),
                *(f"{path} resembles a norm and is none that is known: it stays as it is" for path in found_norms.like),
                *(f"{note}, and what depends on it was not observed" for note in dict.fromkeys(trace.notes)),
            ],
        )
        found = {width: Streams(trace, norms, probers[width]) for width in widths}
        result._place(norms, found)
        return result

    def _place(self, norms: dict[str, NormSpec], found: dict[int, Streams]) -> None:
        roles: dict[str, tuple[str, str | None]] = {}
        inside: set[str] = set()
        ancestors = self.trace.ancestors()
        order = outermost(list(found.values()), ancestors)
        taken: dict[str, int] = {}
        for stream in order:
            name = _common_path([block.module for block in stream.blocks])
            taken[name] = taken.get(name, 0) + 1
            name = name if taken[name] == 1 else f"{name}#{taken[name]}"
            self.streams.append(StreamInfo(name, stream.width, self._writers(stream), stream.blocks, stream))
            for block in stream.blocks:
                block.layer = _layer(name, block.module)
                inside |= block.inside
                roles.update({path: ("branch", name) for path in block.n_branch})
                roles.update({path: ("stream", name) for path in (*block.n_in, *block.n_out)})
            roles.update({path: ("embedding", name) for path in stream.embedding})
            roles.update({path: ("final", name) for path in stream.final})
        before = ends = 0  # bit sets of what the streams' first values, and all of them, are computed from
        for stream in order:
            before |= ancestors[stream.start]
            for v in stream.values:
                ends |= ancestors[v]
        meetings = [streams.meetings for streams in found.values()][:1]

        def off_stream(op: Operation) -> str:
            if any(meeting.reach(op.outputs[0]) for meeting in meetings):
                return "qk"
            if op.norm in inside:
                return "branch"
            if before >> op.outputs[0] & 1:
                return "embedding"
            return "branch" if ends >> op.outputs[0] & 1 else "head"

        held: dict[str, dict[str, tuple[int, ...]]] = {}
        for name in [*self.parameters, *self.aliases]:
            module, _, tensor = name.rpartition(".")
            held.setdefault(module, {})[tensor] = self.shape(name)
        for op in self.trace.norm_operations():
            if op.norm in self.sites:
                continue
            spec = norms[op.norm]
            role, stream = roles.get(op.norm) or (off_stream(op), None)
            reads = self.readings.get(spec.channels, Readings())
            readers, others = reads.readers.get(op.norm, []), reads.others.get(op.norm, [])
            self.sites[op.norm] = Site(op.norm, spec, role, stream, readers, others, held.get(op.norm, {}))

    def _writers(self, stream) -> list[Writer]:
        """Everything that adds to the stream: norms as they run, then parameters in the model's order."""
        centring = self.centrings[stream.width]
        ran = dict.fromkeys(op.norm for op in self.trace.norm_operations())
        rank = {name: i for i, name in enumerate([*ran, *self.parameters])}
        found = {
            term
            for v in stream.values
            for dim in range(len(self.trace.values[v].shape))
            for term in centring.leaves(centring.terms.get((v, dim)))
            if isinstance(term, Writer) and term.groups == 1
        }
        return sorted(found, key=lambda w: (rank.get(w.name, -1), w.axis, w.module))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter or buffer, by any of its names."""
        return self.parameters[self.aliases.get(name, name)]

    def names(self, parameter: str) -> list[str]:
        """All names of a parameter, its first one first."""
        parameter = self.aliases.get(parameter, parameter)
        return [parameter, *(alias for alias, first in self.aliases.items() if first == parameter)]

    def name_in(self, module: str, parameter: str) -> str | None:
        """The name by which `module` itself holds `parameter`, None when it reads a parameter of another module."""
        return next((name for name in self.names(parameter) if name.rpartition(".")[0] == module), None)

    def users(self, parameter: str) -> set[str]:
        """Paths of the modules in which operations read `parameter`."""
        return self._users.get(parameter, set())

    @cached_property
    def _users(self) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for op in self.trace.operations:
            for v in op.inputs:
                if (name := self.trace.values[v].name) is not None:
                    found.setdefault(name, set()).add(op.module)
        return found

    def summary(self) -> dict[str, Any]:
        """All of the map as plain data, for JSON."""
        return {
            "architecture": self.architecture,
            "converted": self.converted,
            "files": self.files,
            "streams": [
                {
                    "name": stream.name,
                    "width": stream.width,
                    "writers": [asdict(writer) for writer in stream.writers],
                    "sites": [site.path for site in self.sites.values() if site.stream == stream.name],
                    "blocks": [
                        {
                            "module": block.module,
                            "placement": block.placement,
                            "n_in": block.n_in,
                            "n_branch": block.n_branch,
                            "n_out": block.n_out,
                            "skip": block.skip,
                            "branch": block.branch,
                        }
                        for block in stream.blocks
                    ],
                }
                for stream in self.streams
            ],
            "sites": [
                {
                    "path": site.path,
                    **site.spec.model_dump(),
                    "role": site.role,
                    "stream": site.stream,
                    "readers": [asdict(reader) for reader in site.readers],
                    "other_consumers": site.other_consumers,
                    "tensors": site.tensors,
                }
                for site in self.sites.values()
            ],
            "tied": self.aliases,
            "notes": self.notes,
        }


def _layer(stream: str, path: str) -> int | None:
    """The first number of `path` below the stream's own."""
    numbers = [int(part) for part in path.removeprefix(f"{stream.partition('#')[0]}.").split(".") if part.isdigit()]
    return numbers[0] if numbers else None


def _held(module: nn.Module) -> list[str]:
    return [*vars(module), *module._parameters, *module._buffers, *module._modules]


def _common_path(paths: list[str]) -> str:
    """The module that holds all of `paths`, without a trailing layer number."""
    split = [path.split(".") for path in paths]
    common = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    while common and common[-1].isdigit():
        common.pop()
    return ".".join(common) or "model"


def find_sites(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> list[tuple[str, NormSpec]]:
    """`(path, behaviour)` of every norm that runs in a live model, in execution order; nothing else is analysed."""
    trace = observe(model, example_inputs(model) if inputs is None else inputs)
    return list(find_norms(model, trace).specs.items())


def inspect(
    model: str | Path | nn.Module,
    *,
    inputs: Mapping[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> NormMap:
    """What the norms of a model are, and where.

    Args:
        model: a folder with a config.json, a Hub id, or a live model (which is not changed). No weights are read.
        inputs: keyword arguments for one forward pass; by default small ones made from what the model says it takes.
        revision: branch, tag or commit of a Hub id.
        trust_remote_code: whether code that comes with a checkpoint may run.

    Raises:
        SourceError: no such checkpoint, or its class cannot be built.
        ObserveError: the model could not be run once.
    """
    if isinstance(model, nn.Module):
        return NormMap.of(model, example_inputs(model) if inputs is None else inputs)
    source = Source.open(model, revision=revision, trust_remote_code=trust_remote_code, weights=False)
    built = source.build()
    with source.carried_out():
        normmap = NormMap.of(built, example_inputs(built) if inputs is None else inputs)
    normmap.converted = source.record and source.record.history()
    if has_weights(source.folder):
        with Checkpoint.open(source.folder) as checkpoint:
            dtypes = Counter(str(info.dtype).removeprefix("torch.") for info in checkpoint.tensors.values())
            size = sum(info.nbytes for info in checkpoint.tensors.values())
        normmap.files = {"tensors": sum(dtypes.values()), "bytes": size, "dtypes": dict(dtypes)}
    return normmap
