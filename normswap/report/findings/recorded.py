"""What a folder's record holds for a report: measurements, sizes, training, where it comes from."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from normswap.checkpoint.files import Checkpoint
from normswap.checkpoint.record import Record
from normswap.errors import SourceError
from normswap.report.adapters import adapter_lines
from normswap.report.card import with_words
from normswap.report.findings.model import Provenance, Sizes, Training
from normswap.report.findings.training import training_of
from normswap.verification.generation import Generation
from normswap.verification.proof import Proof
from normswap.verification.run import Report


@dataclass(frozen=True)
class Recorded:
    """Of a record, read.

    Attributes:
        title: the source's name, and what was made of it.
        reports: the measurements by name.
        mode: how much was measured: `full`, `fast` or `none`.
    """

    title: str
    reports: dict[str, Report]
    generation: Generation | None
    mode: str
    training: Training | None
    adapters: tuple[str, ...]
    sizes: Sizes
    provenance: Provenance


def recorded(record: Record, proof: Proof | None, seconds: Mapping[str, float] | None) -> Recorded:
    """What `record` holds. Raises SourceError where that is not what normswap writes.

    Args:
        proof: what was measured, where it is at hand.
        seconds: what each stage took, where that is known.
    """
    with Checkpoint.open(record.folder) as checkpoint:
        size = sum(info.nbytes for info in checkpoint.tensors.values())
    try:
        reports, generation, mode = _measured(record, proof)
        training = training_of(record.raw["training"]) if "training" in record.raw else None
        return Recorded(
            title=_title(record, training is not None),
            reports=reports,
            generation=generation,
            mode=mode,
            training=training,
            adapters=tuple(adapter_lines(record.raw.get("adapters", ()))),
            sizes=_sizes(record, size, seconds or _trained_for(training)),
            provenance=_provenance(record, reports, training is not None),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise SourceError(
            f"the record in {record.folder} is damaged: {reason:.300}. Expected what normswap wrote; convert the "
            f"source again, or compare the two with normswap verify."
        ) from error


def _measured(record: Record, proof: Proof | None):
    """The reports by name, the generated texts, and how much was measured."""
    raw = record.raw.get("report")
    if proof is None and isinstance(raw, Mapping) and "mode" not in raw:
        report = Report.model_validate(raw)
        return {"compared": report}, report.generation, "full"
    proof = proof or (Proof.model_validate(raw) if raw is not None else None)
    if proof is None:
        return {}, None, "none"
    reports = {"mathematics": proof.mathematics, "as stored": proof.stored}
    return {name: report for name, report in reports.items() if report is not None}, proof.generation, proof.mode


def _title(record: Record, trained: bool) -> str:
    source = str(record.raw.get("source", {}).get("name") or record.plan.architecture)
    return f"{source}{with_words(record.plan) if record.plan.edits else ''}{', fine-tuned' if trained else ''}"


def _trained_for(training: Training | None) -> dict[str, float]:
    return {"training": 60 * training.minutes} if training and training.minutes is not None else {}


def _sizes(record: Record, size: int, seconds: Mapping[str, float]) -> Sizes:
    written: dict[str, Any] = record.raw.get("written", {})
    return Sizes(
        bytes_before=written.get("bytes_before"),
        bytes_after=size,
        bytes_rewritten=written.get("bytes_rewritten"),
        tensors=written.get("tensors", {}),
        untied=tuple(written.get("untied", ())),
        seconds=dict(seconds),
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


def versions(measured: Mapping[str, str]) -> dict[str, str]:
    """Of normswap and Python here, and those of what was measured."""
    from normswap import __version__

    return {"normswap": __version__, "Python": platform.python_version(), **measured}
