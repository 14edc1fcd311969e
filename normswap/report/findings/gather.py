"""Findings of a published folder, of a comparison, and of a model alone. A folder tells all by itself, offline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from normswap.checkpoint.record import PLAIN, RECORD, Record
from normswap.checkpoint.source import Source
from normswap.errors import NormswapError, SourceError
from normswap.observe.inputs import example_inputs
from normswap.report.advice.advice import advice
from normswap.report.claims import MEANINGS
from normswap.report.findings.drawing import drawing
from normswap.report.findings.model import Findings, Provenance, Sizes
from normswap.report.findings.recorded import recorded, versions
from normswap.report.findings.sites import site_rows
from normswap.report.findings.weights import changed_since
from normswap.report.findings.words import changed, trained_verdict, verdict
from normswap.understand.normmap import NormMap, inspect
from normswap.undoing import Undone
from normswap.verification.proof import Proof
from normswap.verification.run import Report


def of_folder(
    folder: str | Path, *, proof: Proof | None = None, seconds: Mapping[str, float] | None = None
) -> Findings:
    """All that a folder written by `convert` or `finetune` tells of itself.

    Args:
        proof: what was measured, where it is at hand: the folder may keep less of it (texts of the user's).
        seconds: what each stage took, where the page is made in the same run.

    Raises:
        SourceError: the folder is none that normswap wrote, or its record is damaged.
    """
    folder = Path(folder)
    name = next((name for name in (RECORD, PLAIN) if (folder / name).is_file()), None)
    if name is None:
        raise SourceError(
            f"{folder} is not a folder that normswap wrote: it has no {RECORD}, nor {PLAIN} of a training. Two "
            f"checkpoints are compared by `normswap verify A B --report FILE`, and the norms of one are drawn by "
            f"`normswap inspect MODEL --report FILE`."
        )
    record = Record.read(folder, name)
    kept = recorded(record, proof, seconds)
    reports, training = kept.reports, kept.training
    notes: list[str] = []
    before, after = _before(record, notes), _after(folder, record, notes)
    local = reports.get("mathematics") or next(iter(reports.values()), None)
    rows = site_rows(before, after, local.comparison.sites if local else ())
    if kept.mode == "fast":
        notes.append(
            "Compared on few tokens in float64 alone (--verify fast): not as stored, and nothing was generated."
        )
    plan = record.plan
    found = Findings(
        kind="conversion" if training is None else "finetune",
        title=kept.title,
        changed=changed(plan, rows),
        claim=plan.claim,
        meaning=MEANINGS[plan.claim],
        before=drawing(before) if before else None,
        after=drawing(after) if after else None,
        sites=tuple(rows),
        reports=reports,
        generation=kept.generation,
        sizes=kept.sizes.model_copy(
            update={
                f"parameters_{when}": drawing(m).parameters for when, m in (("before", before), ("after", after)) if m
            }
        ),
        adapters=kept.adapters,
        training=training,
        plan=plan,
        provenance=kept.provenance,
        notes=tuple(notes),
    )
    told = trained_verdict(training) if training else verdict(plan.claim, reports, found.main)
    found = found.model_copy(update={"verdict": told})
    return found.model_copy(update={"advice": (*changed_since(folder, record), *advice(found))})


def of_comparison(report: Report, trust_remote_code: bool = False) -> Findings:
    """Of two checkpoints that `verify` compared; both are looked at again for their norms."""
    found = _beside(report.a, report.b, {"compared": report}, trust_remote_code)
    command = f"normswap verify {Path(report.a).name} {Path(report.b).name}"
    return found.model_copy(update={"generation": report.generation, "provenance": _by(command, report)})


def of_undone(done: Undone, converted: str | Path) -> Findings:
    """Of a conversion that was taken back: the folder that was `converted` beside the one that was made of it."""
    proof = done.report
    named = {"mathematics": proof.mathematics, "as stored": proof.stored}
    reports = {name: report for name, report in named.items() if report is not None}
    found = _beside(str(converted), str(done.folder), reports)
    command = f"normswap convert {Path(converted).name} {done.folder.name} --undo"
    return found.model_copy(
        update={
            "title": f"{Path(converted).name}: {done.undone.request.words()} undone",
            "generation": proof.generation,
            "provenance": _by(command, found.main),
        }
    )


def _beside(a: str, b: str, reports: Mapping[str, Report], trust_remote_code: bool = False) -> Findings:
    """Two checkpoints that are to compute the same; both are looked at for their norms."""
    notes: list[str] = []
    one, other = (_inspected(name, trust_remote_code, notes) for name in (a, b))
    main = reports.get("mathematics") or next(iter(reports.values()), None)
    rows = site_rows(one, other, main.comparison.sites if main else ())
    plan = _plan_of(b)
    found = Findings(
        kind="comparison",
        title=f"{Path(a).name} beside {Path(b).name}",
        changed=_differing(rows),
        claim=plan.claim if plan else None,
        before=drawing(one) if one else None,
        after=drawing(other) if other else None,
        sites=tuple(rows),
        reports=dict(reports),
        sizes=Sizes(
            **{f"parameters_{when}": drawing(m).parameters for when, m in (("before", one), ("after", other)) if m},
            **{f"bytes_{when}": m.files["bytes"] for when, m in (("before", one), ("after", other)) if m and m.files},
        ),
        plan=plan,
        notes=tuple(notes),
    )
    found = found.model_copy(update={"verdict": verdict(None, found.reports, found.main)})
    return found.model_copy(update={"advice": advice(found)})


def _by(command: str, report: Report | None) -> Provenance:
    return Provenance(versions=versions(report.versions if report else {}), command=command)


def of_model(normmap: NormMap, name: str) -> Findings:
    """Of a model's norm map alone."""
    drawn = drawing(normmap)
    placements = dict.fromkeys(block.placement for stream in normmap.streams for block in stream.blocks)
    return Findings(
        kind="map",
        title=f"{Path(name).name}: its norms",
        changed=f"{_counted(len(normmap.sites), 'norm')} on {_counted(len(normmap.streams), 'residual stream')}"
        f"{'; placement ' if placements else ''}{', '.join(placements)}.",
        before=drawn,
        sites=tuple(site_rows(normmap, None)),
        sizes=Sizes(parameters_before=drawn.parameters, bytes_before=normmap.files["bytes"] if normmap.files else None),
        provenance=Provenance(versions=versions({}), command=f"normswap inspect {Path(name).name} --report FILE"),
        notes=tuple(filter(None, [normmap.converted])),
    )


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _before(record: Record, notes: list[str]) -> NormMap | None:
    """The source's norms, found from its configuration alone."""
    try:
        stock, config = record.stock()
        source = Source(str(record.folder), record.folder, config, stock, record)
        with source.carried_out():
            model = source.build_stock().eval()
            return NormMap.of(model, example_inputs(model))
    except NormswapError as error:
        notes.append(f"The source's norms could not be looked at: {error}")
        return None


def _after(folder: Path, record: Record, notes: list[str]) -> NormMap | None:
    try:
        source = Source.open(folder, weights=False)
        with source.carried_out():
            model = source.build()
            return NormMap.of(model, example_inputs(model))
    except NormswapError as error:
        notes.append(f"The result's norms could not be looked at: {error}")
        return None


def _inspected(name: str, trust_remote_code: bool, notes: list[str]) -> NormMap | None:
    try:
        return inspect(name, trust_remote_code=trust_remote_code)
    except NormswapError as error:
        notes.append(f"The norms of {name} could not be looked at: {error}")
        return None


def _plan_of(name: str):
    """The plan by which a checkpoint was made, if normswap made it."""
    folder = Path(name)
    return Record.read(folder).plan if (folder / RECORD).is_file() else None


def _differing(rows) -> str:
    found = [row for row in rows if (row.before, row.slot_before) != (row.after, row.slot_after)]
    if not found:
        return f"Both have the same {sum(row.count for row in rows)} norms."
    count = sum(row.count for row in found)
    return f"{count} of {sum(row.count for row in rows)} norms are of another kind, form or place in the second."
