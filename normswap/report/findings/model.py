"""The data of a report: what was changed, whether it is the same, where it differs, what it costs, what to do next."""

from __future__ import annotations

from typing import Any, Literal

from normswap.planning.plans import Plan
from normswap.verification.generation import Generation
from normswap.verification.record import Record
from normswap.verification.run import Report

Level = Literal["good", "note", "warn", "bad"]


class SlotNorm(Record):
    """A norm in a drawing: its path below the layer, its kind, its eps, and whether it has neither gain nor bias."""

    name: str
    kind: str
    eps: float = 0.0
    weightless: bool = False


class Step(Record):
    """One residual step, `x' = N_out(a x + b N_branch(F(N_in(x))))`.

    Attributes:
        name: what F is: the modules below the layer that give the branch.
        n_in, n_branch, n_out: the norms in each slot.
        inside: norms within F.
        skip, branch: a and b; `scaled`: the skip has a factor that is no number of the code alone.
    """

    name: str
    placement: str
    n_in: tuple[SlotNorm, ...] = ()
    n_branch: tuple[SlotNorm, ...] = ()
    n_out: tuple[SlotNorm, ...] = ()
    inside: tuple[SlotNorm, ...] = ()
    skip: float = 1.0
    branch: float = 1.0
    scaled: bool = False


class Layers(Record):
    """Layers that are alike: which, how many, and the steps of one of them."""

    shown: str
    count: int
    steps: tuple[Step, ...]


class StreamDrawing(Record):
    """One residual stream: norms before the first layer, the layers, norms after the last."""

    name: str
    width: int
    embedding: tuple[SlotNorm, ...] = ()
    layers: tuple[Layers, ...] = ()
    final: tuple[SlotNorm, ...] = ()


class MapDrawing(Record):
    """A model's norms as they are drawn."""

    architecture: str
    streams: tuple[StreamDrawing, ...]
    parameters: int
    notes: tuple[str, ...] = ()


class SiteForm(Record):
    """What stands at a site: kind, gain form (None: no gain), bias, eps."""

    kind: str
    gain: str | None
    bias: bool
    eps: float


class SiteRow(Record):
    """Sites that differ in layer numbers only.

    Attributes:
        shown: their paths, folded; `count`: how many.
        before, after: what stands there; None: nothing. In a report of one model `after` is None throughout.
        slot_before, slot_after: where in its block: `N_in`, `N_branch`, `N_out`; None: in no block of a stream.
        error_mean, error_max: relative error of what reaches them, where that was compared.
    """

    shown: str
    count: int
    role: str
    stream: str | None
    width: int
    before: SiteForm | None
    after: SiteForm | None
    slot_before: str | None = None
    slot_after: str | None = None
    read_by: tuple[str, ...] = ()
    error_mean: float | None = None
    error_max: float | None = None


class Sizes(Record):
    """What it costs. None: not known.

    Attributes:
        tensors: of the files, by what happened to them.
        bytes_rewritten: of tensors that are other ones now; the rest was copied.
        seconds: of work, by stage, where the page is made in the same run.
    """

    parameters_before: int | None = None
    parameters_after: int | None = None
    bytes_before: int | None = None
    bytes_after: int | None = None
    bytes_rewritten: int | None = None
    tensors: dict[str, int] = {}
    untied: tuple[str, ...] = ()
    seconds: dict[str, float] = {}


class Training(Record):
    """A fine-tune.

    Attributes:
        scores: by model (`source`, `start`, `healed`, `control`), `mean` and `p99.9` on held-out data.
        curves: by run (`healed`, `control`), by what is measured, points `(tokens, value)`.
        folded: the relative difference that taking the scaffolding away made.
        changes: of the recipe, where the run was resumed with others: key, was, became.
    """

    data: str
    objective: str
    tokens: int
    minutes: float | None
    scores: dict[str, dict[str, float]]
    curves: dict[str, dict[str, tuple[tuple[float, float], ...]]]
    folded: float | None = None
    changes: tuple[tuple[str, str, str], ...] = ()


class Provenance(Record):
    """Where it comes from: versions, hashes, and the command that makes it again."""

    source: str | None = None
    revision: str | None = None
    versions: dict[str, str] = {}
    hashes: dict[str, str] = {}
    command: str | None = None


class Advice(Record):
    """Something to know: how bad it is, what it is, what to try (empty: nothing)."""

    level: Level
    what: str
    attempt: str = ""


class Verdict(Record):
    """The answer at a glance."""

    level: Level
    headline: str
    sentence: str


class Findings(Record):
    """All of a report.

    Attributes:
        kind: what it is of.
        title: the model, and what became of it.
        changed: what was changed, in a sentence.
        verdict: whether it is the same model.
        reports: the measurements by name, in the order in which they count: `mathematics`, `as stored`, `compared`.
        before, after: the norms as drawn; None where they could not be, as `notes` say.
        advice: what to do next.
        adapters: what became of the adapters that were carried over, a line each.
        notes: what is not in this report, and why.
    """

    kind: Literal["conversion", "comparison", "finetune", "map"]
    title: str
    changed: str
    claim: str | None = None
    meaning: str | None = None
    verdict: Verdict | None = None
    advice: tuple[Advice, ...] = ()
    before: MapDrawing | None = None
    after: MapDrawing | None = None
    sites: tuple[SiteRow, ...] = ()
    reports: dict[str, Report] = {}
    generation: Generation | None = None
    sizes: Sizes = Sizes()
    training: Training | None = None
    adapters: tuple[str, ...] = ()
    plan: Plan | None = None
    provenance: Provenance = Provenance()
    notes: tuple[str, ...] = ()

    @property
    def to_be_same(self) -> bool:
        """Whether the two models are to compute the same function, so that only rounding may differ."""
        return self.kind == "comparison" or (self.kind == "conversion" and self.claim == "exact")

    @property
    def main(self) -> Report | None:
        """The measurement that says how the result does as it is used."""
        return self.reports.get("as stored") or self.reports.get("compared") or self.reports.get("mathematics")

    @property
    def local(self) -> Report | None:
        """The measurement that says where the two differ: without rounding, if there is one."""
        return self.reports.get("mathematics") or self.main

    def data(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return self.model_dump(mode="json")
