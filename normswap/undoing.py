"""A conversion taken back: from a folder that normswap wrote to a checkpoint of the source's own class.

The result computes what the converted folder computes, with whatever was trained there in between, and is measured to
do so before it is published. Where nothing was changed since, its weights are the source's up to rounding.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from normswap.adapters.publish import leave_adapters
from normswap.apply.layout import WriteSummary, lay_out
from normswap.apply.modelling import FILE
from normswap.apply.space import space_for
from normswap.apply.stream import write_tensors
from normswap.calibration.data import Progress, silent
from normswap.checkpoint.files import CONFIG, Checkpoint
from normswap.checkpoint.kept import KEPT, load_kept
from normswap.checkpoint.keymap import KeyMap
from normswap.checkpoint.publish import Staging, check_space, copy_side_files
from normswap.checkpoint.record import RECORD
from normswap.checkpoint.source import Source
from normswap.errors import RefusedError
from normswap.planning.plans import Plan
from normswap.planning.undo import NoWayBack, way_back
from normswap.verification.proof import Proof, VerifyMode
from normswap.verification.undone import prove_undone

#: what a conversion adds to a folder
_OURS = (FILE, RECORD, KEPT)


@dataclass(frozen=True)
class Undone:
    """A conversion taken back.

    Attributes:
        folder: the checkpoint of the source's class.
        undone: the plan that was taken back.
        written: what happened to each tensor.
        report: the measurements of the new folder against the converted one.
        same_files: whether its weights are the source's, byte for byte; not known of a conversion that was not
            verified, for which no hashes of the source were taken.
        adapters: adapters of the converted model, which were left behind: those that they were made of fit the result.
    """

    folder: Path
    undone: Plan
    written: WriteSummary
    report: Proof
    same_files: bool
    adapters: tuple[str, ...] = ()


def undo(
    folder: str | Path,
    out: str | Path,
    *,
    verify: VerifyMode = "full",
    text: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Undone:
    """Turn the converted checkpoint in `folder` back into one of the class that it was made from.

    Args:
        folder: what `convert` wrote, or what was saved there after training.
        out: the folder to make.
        verify, text, overwrite, progress: as for `convert`.

    Raises:
        RefusedError: the conversion loses what nothing brings back; the message names it.
        SourceError: the folder was not made by normswap, or what it kept for this is not there.
        VerificationError: the result does not compute what the converted folder does; nothing is published.
        DestinationError: `out` cannot be written.
    """
    progress = progress or silent
    source = Source.open(folder)
    back = _plan(source)
    staging = Staging(out, source.folder, overwrite)
    staging.check()
    with Checkpoint.open(source.folder) as checkpoint:
        keymap = KeyMap.build(source.build(), checkpoint)
        keymap.check_complete(source.name)
        layout = lay_out(checkpoint, keymap, back, None)
        with staging as made:
            check_space(made, space_for(checkpoint, layout, made))
            copy_side_files(checkpoint, made)
            adapters = leave_adapters(source.record.raw, made)
            for name in _OURS:
                (made / name).unlink(missing_ok=True)
            (made / CONFIG).write_text(json.dumps(_config(source), indent=2) + "\n", encoding="utf-8")
            written = write_tensors(
                checkpoint, keymap, back, made, progress=lambda done, total: progress("writing", done, total)
            )
            report = prove_undone(source, back, made, verify, text, progress)
    theirs = source.record.raw.get("source", {}).get("files", {})
    same = bool(written.hashes) and all(theirs.get(name) == digest for name, digest in written.hashes.items())
    return Undone(Path(out), source.record.plan, written, report, same, adapters)


def _plan(source: Source) -> Plan:
    if source.record is None:
        raise RefusedError(f"{source.name} was not converted by normswap: it has no {RECORD}, and nothing to undo.")
    record = source.record
    kept = record.raw.get("undo", {"impossible": "the version of normswap that made it kept nothing for that"})
    origin = record.raw.get("source", {}).get("name", "the source")
    if "impossible" in kept:
        raise RefusedError(
            f"{source.name} was {record.history()}, which cannot be undone: {kept['impossible']}. The checkpoint that "
            f"it was made from, {origin}, was not changed: go on from there."
        )
    names = set(source.build_stock().state_dict())
    try:
        return way_back(record.plan, names, load_kept(source.folder))
    except NoWayBack as error:
        raise RefusedError(f"{source.name} cannot be undone: {error}. Go on from {origin}.") from error


def _config(source: Source) -> dict:
    """The source's `config.json`, with the dtype that the weights have now."""
    config = dict(source.record.source_config)
    now = json.loads((source.folder / CONFIG).read_text(encoding="utf-8"))
    for key in ("dtype", "torch_dtype"):
        config.pop(key, None)
        config |= {key: now[key]} if key in now else {}
    return config
