"""Findings of a published folder, of a comparison, and of a model alone. A folder tells all by itself, offline."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from normswap.checkpoint.files import Checkpoint
from normswap.checkpoint.record import PLAIN, RECORD, Record
from normswap.checkpoint.source import Source
from normswap.errors import NormswapError, SourceError
from normswap.observe.inputs import example_inputs
from normswap.report.advice.advice import advice
from normswap.report.card import with_words
from normswap.report.claims import MEANINGS
from normswap.report.findings.drawing import drawing
from normswap.report.findings.model import Findings, Provenance, Sizes
from normswap.report.findings.sites import site_rows
from normswap.report.findings.training import training_of
from normswap.report.findings.weights import changed_since
from normswap.report.findings.words import changed, trained_verdict, verdict
from normswap.understand.normmap import NormMap, inspect
from normswap.verification.proof import Proof
from normswap.verification.run import Report


def of_folder(folder: str | Path, *, proof: Proof | None = None, minutes: float | None = None) -> Findings:
    """All that a folder written by `convert` or `finetune` tells of itself.

    Args:
        proof: what was measured, where it is at hand: the folder may keep less of it (texts of the user's).
        minutes: how long the work took, where the page is made in the same run.

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
    reports, generation, mode = _measured(record, proof)
    notes: list[str] = []
    before, after = _before(record, notes), _after(folder, record, notes)
    training = training_of(record.raw["training"]) if "training" in record.raw else None
    local = reports.get("mathematics") or next(iter(reports.values()), None)
    rows = site_rows(before, after, local.comparison.sites if local else ())
    if mode == "fast":
        notes.append(
            "Compared on few tokens in float64 alone (--verify fast): not as stored, and nothing was generated."
        )
    plan = record.plan
    found = Findings(
        kind="conversion" if training is None else "finetune",
        title=_title(record, training is not None),
        changed=changed(plan, rows),
        claim=plan.claim,
        meaning=MEANINGS[plan.claim] if plan.claim != "calibrated" else _FITTED,
        before=drawing(before) if before else None,
        after=drawing(after) if after else None,
        sites=tuple(rows),
        reports=reports,
        generation=generation,
        sizes=_sizes(folder, record, before, after, minutes or (training and training.minutes)),
        training=training,
        plan=plan,
        provenance=_provenance(record, reports, training is not None),
        notes=tuple(notes),
    )
    told = trained_verdict(training) if training else verdict(plan.claim, reports, found.main)
    found = found.model_copy(update={"verdict": told})
    return found.model_copy(update={"advice": (*changed_since(folder, record), *advice(found))})


#: what a calibrated claim means beside the measurements: these say how close it came
_FITTED = "Constants and weights are fitted to what the model does on data; how close that came is measured here."


def of_comparison(report: Report, trust_remote_code: bool = False) -> Findings:
    """Of two checkpoints that `verify` compared; both are looked at again for their norms."""
    notes: list[str] = []
    a, b = (_inspected(name, trust_remote_code, notes) for name in (report.a, report.b))
    rows = site_rows(a, b, report.comparison.sites)
    plan = _plan_of(report.b)
    found = Findings(
        kind="comparison",
        title=f"{Path(report.a).name} beside {Path(report.b).name}",
        changed=_differing(rows),
        claim=plan.claim if plan else None,
        verdict=verdict(None, {"compared": report}, report),
        before=drawing(a) if a else None,
        after=drawing(b) if b else None,
        sites=tuple(rows),
        reports={"compared": report},
        sizes=Sizes(
            **{f"parameters_{when}": drawing(m).parameters for when, m in (("before", a), ("after", b)) if m},
            **{f"bytes_{when}": m.files["bytes"] for when, m in (("before", a), ("after", b)) if m and m.files},
        ),
        plan=plan,
        provenance=Provenance(
            versions=_versions(report.versions), command=f"normswap verify {Path(report.a).name} {Path(report.b).name}"
        ),
        notes=tuple(notes),
    )
    return found.model_copy(update={"advice": advice(found)})


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
        provenance=Provenance(versions=_versions({}), command=f"normswap inspect {Path(name).name} --report FILE"),
        notes=tuple(filter(None, [normmap.converted])),
    )


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _measured(record: Record, proof: Proof | None):
    """The reports by name, the generated texts, and how much was measured."""
    raw = record.raw.get("report")
    try:
        if proof is None and isinstance(raw, Mapping) and "mode" not in raw:
            return {"compared": Report.model_validate(raw)}, None, "full"
        proof = proof or (Proof.model_validate(raw) if raw is not None else None)
    except ValidationError as error:
        first = error.errors()[0]
        raise SourceError(
            f"the measurements in {record.folder / RECORD} cannot be read: {'.'.join(map(str, first['loc']))}: "
            f"{first['msg']}. Expected what normswap wrote; convert the source again, or compare with normswap verify."
        ) from error
    if proof is None:
        return {}, None, "none"
    reports = {"mathematics": proof.mathematics, "as stored": proof.stored}
    return {name: report for name, report in reports.items() if report is not None}, proof.generation, proof.mode


def _before(record: Record, notes: list[str]) -> NormMap | None:
    """The source's norms, found from its configuration alone."""
    try:
        stock, config = record.stock()
        with torch.device("meta"):
            model = stock._from_config(config).eval()
        return NormMap.of(model, example_inputs(model))
    except NormswapError as error:
        notes.append(f"The source's norms could not be looked at: {error}")
        return None


def _after(folder: Path, record: Record, notes: list[str]) -> NormMap | None:
    try:
        model = Source.open(folder, weights=False).build()
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
    found = [row for row in rows if row.before != row.after]
    if not found:
        return f"Both have the same {sum(row.count for row in rows)} norms."
    count = sum(row.count for row in found)
    return f"{count} of {sum(row.count for row in rows)} norms are of another kind, form or place in the second."


def _title(record: Record, trained: bool) -> str:
    source = str(record.raw.get("source", {}).get("name") or record.plan.architecture)
    return f"{source}{with_words(record.plan) if record.plan.edits else ''}{', fine-tuned' if trained else ''}"


def _sizes(folder: Path, record: Record, before, after, minutes: float | None) -> Sizes:
    written: dict[str, Any] = record.raw.get("written", {})
    with Checkpoint.open(folder) as checkpoint:
        now = sum(info.nbytes for info in checkpoint.tensors.values())
    return Sizes(
        parameters_before=drawing(before).parameters if before else None,
        parameters_after=drawing(after).parameters if after else None,
        bytes_before=written.get("bytes_before"),
        bytes_after=now,
        bytes_rewritten=written.get("bytes_rewritten"),
        tensors=written.get("tensors", {}),
        untied=tuple(written.get("untied", ())),
        minutes=minutes,
    )


def _provenance(record: Record, reports: Mapping[str, Report], trained: bool) -> Provenance:
    source = record.raw.get("source", {})
    measured = next(iter(reports.values()), None)
    hashes = {"source, keys and shapes": source.get("headers")}
    hashes |= {f"source, {name}": digest for name, digest in source.get("files", {}).items()}
    hashes |= {f"result, {name}": digest for name, digest in record.raw.get("files", {}).items()}
    return Provenance(
        source=source.get("name"),
        revision=source.get("revision"),
        versions={"normswap": record.version, **(measured.versions if measured else {})},
        hashes={name: digest for name, digest in hashes.items() if digest},
        command="normswap finetune recipe.yaml" if trained else record.raw.get("command"),
    )


def _versions(measured: Mapping[str, str]) -> dict[str, str]:
    from normswap import __version__

    return {"normswap": __version__, "Python": platform.python_version(), **measured}
