"""Checkpoint to checkpoint, and live models: plan, apply, verify, publish."""

from __future__ import annotations

import copy
import json
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn
from transformers import PreTrainedModel

from normswap.adapters.carry import carry
from normswap.adapters.folder import read_adapters
from normswap.adapters.publish import publish_adapters
from normswap.apply.crew import default_workers
from normswap.apply.layout import WriteSummary, lay_out
from normswap.apply.live import apply_plan
from normswap.apply.modelling import write_modelling
from normswap.apply.space import space_for
from normswap.apply.stream import preview, write_tensors
from normswap.apply.values import Values
from normswap.calibration.data import TOKENS, WINDOW, Progress, given_data, silent, text_data
from normswap.checkpoint.files import Checkpoint, has_weights
from normswap.checkpoint.journal import Journal
from normswap.checkpoint.kept import save_kept
from normswap.checkpoint.keymap import KeyMap
from normswap.checkpoint.publish import Staging, check_space, copy_side_files
from normswap.checkpoint.record import write_record
from normswap.checkpoint.source import Source
from normswap.drafting import draft
from normswap.errors import PlanError, RefusedError, SourceError
from normswap.planning.plans import Plan
from normswap.planning.request import Request, Words
from normswap.report.card import write_card
from normswap.report.plan import disk_facts
from normswap.verification.live import prove_live
from normswap.verification.proof import Proof, VerifyMode, prove
from normswap.verification.text import read as read_text

#: what `progress` is called with while weights are written, in bytes
WRITING = "writing"
DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Stages:
    """A clock that says how long each stage took. Attribute `seconds`: by the stage's name."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def ends(self, stage: str) -> None:
        """The stage that began when the one before ended is over."""
        now = time.perf_counter()
        self.seconds[stage], self._last = now - self._last, now


@dataclass(frozen=True)
class Conversion:
    """A finished conversion.

    Attributes:
        folder: the published checkpoint.
        plan: what was done.
        written: what happened to each tensor.
        report: what was measured before publishing.
        skipped: files of the source that were left behind (weights in other formats).
        seconds: what each stage took: `planning`, `writing`, `verifying`.
        adapters: what became of each adapter that was carried over: its name, files, and what was measured of it.
    """

    folder: Path
    plan: Plan
    written: WriteSummary
    report: Proof
    skipped: tuple[str, ...]
    seconds: dict[str, float]
    adapters: tuple[Mapping[str, Any], ...] = ()


def plan(
    model: str | Path | nn.Module,
    *,
    calibrate: bool | Sequence[Mapping[str, Any]] = False,
    text: str | Path | None = None,
    tokens: int = TOKENS,
    window: int = WINDOW,
    inputs: Mapping[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    **words: Unpack[Words],
) -> Plan:
    """The plan that `convert` or `convert_model` would carry out.

    Args:
        model: a folder, a Hub id, or a live model.
        calibrate: fit the constants and weights of a move to what the model does on text, as `convert` does; needs the
            weights. Without it the constants are 1 and the claim is `untrained`. For a live model: batches, keyword
            arguments of `forward`, two or more; the last is for measuring what moves cost.
        text, tokens, window, progress: of the calibration, as for `convert`.
        inputs, revision, trust_remote_code: as for `inspect`.
        **words: what to do, `planning.request.Words`: norm, sites, role, fold, placement, layers, exact, tied, partial,
            explicit.

    Raises:
        RefusedError: the request cannot be met (everywhere, unless `partial`).
        SourceError, ObserveError: as for `inspect`.
    """
    request = Request.of(**words)
    if not calibrate and (text is not None or tokens != TOKENS):
        raise RefusedError("a text and a number of tokens are for calibration: add --calibrate.")
    if isinstance(model, nn.Module):
        if calibrate is True:
            raise RefusedError(
                "a live model comes without a tokenizer: give `calibrate` batches of keyword arguments of its forward, "
                "the last of them to measure on."
            )
        made = draft(model, request, inputs, given_data(model, calibrate, progress) if calibrate else None)
        return _calibrated(made) if calibrate else made
    if not isinstance(calibrate, bool):
        raise RefusedError("batches to calibrate on are for a live model; a folder is calibrated on text.")
    source = Source.open(model, revision=revision, trust_remote_code=trust_remote_code, weights=calibrate)
    _refuse_twice(source)
    data = text_data(source, text, tokens, window, progress) if calibrate else None
    made = draft(source.build(), request, inputs, data)
    return _calibrated(made) if calibrate else made


def _calibrated(made: Plan) -> Plan:
    """The plan, which data were given for. Raises RefusedError where it has no use for them."""
    if made.claim == "exact" and not made.request.placements and made.calibrated_on is None:
        raise RefusedError(
            f"there is nothing to calibrate: {made.request.words()} computes the same function. Leave --calibrate and "
            f"--tokens out."
        )
    return made


def _refuse_twice(source: Source) -> None:
    if source.record is not None:
        raise RefusedError(
            f"{source.name} was {source.record.history()}; it is not converted twice. Convert the checkpoint it "
            f"was made from, asking for everything at once. If this one was trained since, load it with "
            f"trust_remote_code=True and give the model to normswap.convert_model, which changes it in memory."
        )


def preview_on_disk(
    model: str | Path,
    made: Plan,
    *,
    dtype: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> WriteSummary | None:
    """What a plan changes in the files of a checkpoint, from headers alone; None if there are no weights."""
    source = Source.open(model, revision=revision, trust_remote_code=trust_remote_code, weights=False)
    if not has_weights(source.folder):
        return None
    with Checkpoint.open(source.folder) as checkpoint:
        return preview(checkpoint, _map_keys(source, source.build(), checkpoint), made, _dtype(dtype))


def _map_keys(source: Source, structure: PreTrainedModel, checkpoint: Checkpoint) -> KeyMap:
    keymap = KeyMap.build(structure, checkpoint)
    keymap.check_complete(source.name)
    return keymap


def convert(
    model: str | Path,
    out: str | Path,
    *,
    plan: Plan | str | Path | None = None,
    adapters: Sequence[str | Path] = (),
    hub: str | None = None,
    dtype: str | None = None,
    verify: VerifyMode = "full",
    text: str | Path | None = None,
    tokens: int = TOKENS,
    window: int = WINDOW,
    overwrite: bool = False,
    workers: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    **words: Unpack[Words],
) -> Conversion:
    """Convert the checkpoint `model` into the folder `out`.

    The source is read only. `out` appears whole, after verification, or not at all. A run that was killed or
    interrupted leaves a hidden folder beside `out`, from which the same call goes on.

    Args:
        model: a folder, or a Hub id.
        out: the folder to make; its parents are made too.
        plan: a plan made before, or the file it was saved in.
        adapters: folders or Hub ids of LoRA adapters of `model` (PEFT), which become adapters of the result,
            in `out/adapters`.
        hub: the repository of the Hub that the result is for, named in its card and by its adapters.
        dtype: `float32`, `bfloat16`, ... for all floating tensors of the result; None keeps each one's own.
        verify: `full`, `fast` (fewer tokens, no comparison in the stored precision) or `none`, which leaves out the
            hashes of the source's files as well.
        text: a UTF-8 file to calibrate and verify on, by default the text that ships with normswap. Where norms move,
            its first quarter is for verification and the rest for calibration.
        tokens: how many to calibrate on, about.
        window: in windows of so many; shorter ones for a model of short texts.
        overwrite: replace a model folder at `out`.
        workers: threads that copy, compute and write the weights; None: one per processor, up to 8.
        progress: called with (what, done, total) while long work runs; bytes, where `what` is `WRITING`.
        **words: what to do, as for `plan`; not together with a plan made before.

    Raises:
        RefusedError, SourceError, ObserveError: before anything is written.
        PlanError: the given plan does not fit this checkpoint.
        VerificationError: the result measures otherwise than claimed; nothing is published.
        DestinationError: `out` cannot be written.
    """
    asked, clock = Request.of(**words), Stages()
    if plan is not None and (asked != Request() or tokens != TOKENS):
        raise PlanError("a saved plan already says what to do: give no norm, fold, placement, tokens, ... with it.")
    progress = progress or silent
    stored_dtype = _dtype(dtype)
    given = read_adapters(adapters)
    if text is not None and verify != "none":
        read_text(text)  # a wrong path is found out now, not after hours of writing
    source = Source.open(model, revision=revision, trust_remote_code=trust_remote_code)
    _refuse_twice(source)
    staging = Staging(out, source.folder, overwrite)
    staging.check()
    structure = source.build()
    plan_file = None
    if plan is None:
        plan = draft(structure, asked, None, text_data(source, text, tokens, window, progress), stored_dtype)
        plan = _calibrated(plan) if tokens != TOKENS else plan
    elif not isinstance(plan, Plan):
        plan, plan_file = Plan.load(plan), Path(plan).name
    if plan.architecture != source.model_class.__name__:
        raise PlanError(f"the plan is for a {plan.architecture}, {model} is a {source.model_class.__name__}.")
    with Checkpoint.open(source.folder) as checkpoint:
        keymap = _map_keys(source, structure, checkpoint)
        layout = lay_out(checkpoint, keymap, plan, stored_dtype)
        original = Values(checkpoint, keymap, plan).original
        carried = [carry(adapter, structure, keymap, plan, original) for adapter in given]
        with staging.resuming(_follows_from(checkpoint, plan, dtype)) as folder:
            journal = staging.journal
            clock.ends("planning")
            weights = space_for(checkpoint, layout, folder, journal.finished)
            check_space(folder, weights + sum(adapter.size for adapter in given))
            skipped = copy_side_files(checkpoint, folder)
            raw = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
            config = configure(raw, source, structure, plan, folder, dtype)
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            written = write_tensors(
                checkpoint,
                keymap,
                plan,
                folder,
                stored_dtype,
                lambda done, total: progress(WRITING, done, total),
                journal,
                workers,
            )
            clock.ends("writing")
            record = {
                "source": {
                    "name": source.title,
                    "revision": revision,
                    "headers": checkpoint.fingerprint(),
                    # with what is verified: copying takes less time than hashing what was copied
                    "files": {} if verify == "none" else checkpoint.hash_files(workers or default_workers()),
                },
                "source_config": raw,
                "plan": plan.model_dump(mode="json"),
                "files": written.hashes,
                "undo": _keep(journal, plan, folder),
            }
            write_record(folder, record)
            report = prove(source, plan, folder, verify, text, progress)
            if carried:
                record["adapters"] = publish_adapters(carried, source, plan, folder, verify, text, progress, hub)
            # the result may be shared, the text it was measured on need not be
            numbers = report.model_dump(mode="json") if text is None else report.without_text()
            counted = str(tokens) if tokens != TOKENS else None
            windows = str(window) if window != WINDOW else None
            options = {"--plan": plan_file, "--tokens": counted, "--window": windows}
            options |= {"--dtype": dtype, "--revision": revision}
            names = [adapter.name for adapter in given]
            command = _command(source.title, Path(out).resolve().name, plan, options, names)
            write_record(folder, record | {"written": disk_facts(written), "command": command, "report": numbers})
            write_card(folder, source, plan, report, command, hub)
            clock.ends("verifying")
    adapters = tuple(record.get("adapters", ()))
    return Conversion(Path(out), plan, written, report, tuple(skipped), clock.seconds, adapters)


def convert_model(
    model: nn.Module,
    *,
    plan: Plan | None = None,
    inputs: Mapping[str, Any] | None = None,
    verify: bool = True,
    **words: Unpack[Words],
) -> Plan:
    """Convert a live model in place.

    What other modules share with it changes with it: convert the whole model, not the body of one whose head is tied.

    Args:
        model: any module; one of transformers needs no `inputs`.
        plan: one made before.
        inputs: keyword arguments of `forward` for one small batch.
        verify: measure a converted float64 copy against the original first (costs that copy's memory).
        **words: what to do, as for `plan` the function; not together with a plan made before.

    Returns:
        The plan that was carried out.

    Raises:
        RefusedError, ObserveError, PlanError: the model is unchanged.
        VerificationError: the copy measures otherwise than claimed; the model is unchanged.
    """
    if plan is None:
        plan = draft(
            model,
            Request.of(**words),
            inputs,
        )
    if verify:
        prove_live(model, plan, inputs)
    apply_plan(model, plan)
    return plan


def configure(
    raw: dict, source: Source, structure: PreTrainedModel, plan: Plan, folder: Path, dtype: str | None
) -> dict[str, object]:
    """The result's `config.json`: the source's, with what the plan and the modelling file change."""
    config = dict(raw)
    if plan.module_edits():
        config |= write_modelling(
            folder, source.model_class, source.config, plan, structure, plan.base_output_unchanged
        )
    else:
        config = _with_keys(config, plan)
    if plan.config_edits():
        config |= _derived(raw, source, plan)
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
    return config


def _derived(raw: dict, source: Source, plan: Plan) -> dict[str, object]:
    """Keys that the source's configuration leaves open and derives from those the plan edits: written out as they were.

    Some configurations decide by `tie_word_embeddings` whether the decoder's output is scaled, when no key says so.
    """
    edited = {edit.key.partition(".")[0] for edit in plan.config_edits()}
    config_class = type(source.config)
    before, after = (config_class.from_dict(copy.deepcopy(keys)).to_dict() for keys in (raw, _with_keys(raw, plan)))
    return {key: value for key, value in before.items() if key not in edited and after.get(key) != value}


def _with_keys(raw: dict, plan: Plan) -> dict[str, object]:
    """A `config.json` with the keys that the plan sets; dots lead into nested configurations."""
    config = copy.deepcopy(raw)
    for edit in plan.config_edits():
        *parents, name = edit.key.split(".")
        held = config
        for parent in parents:
            held = held.setdefault(parent, {})
        held[name] = edit.value
    return config


def _command(source: str, out: str, plan: Plan, options: dict[str, str | None], adapters: Sequence[str] = ()) -> str:
    """The command line that does the same, without what is private in paths."""
    words = ["normswap", "convert", source, out]
    words += [] if options["--plan"] else shlex.split(plan.request.words())
    words += [word for name, value in options.items() if value for word in (name, value)]
    words += [word for name in adapters for word in ("--adapter", name)]
    return shlex.join(words)


def _keep(journal: Journal, plan: Plan, folder: Path) -> dict[str, object]:
    """Keep what undoing will need; what the record says of it."""
    if plan.claim != "exact":
        return {"impossible": f"the result is {plan.claim}: it is not the function that the source computes"}
    if journal.why_not is not None:
        return {"impossible": journal.why_not}
    return save_kept(folder, journal.kept)


def _follows_from(checkpoint: Checkpoint, plan: Plan, dtype: str | None) -> dict[str, object]:
    """All that the bytes of the result's weights follow from: a run with the same can go on from another's files."""
    from normswap import __version__

    return {
        "normswap": __version__,
        "torch": torch.__version__,
        "source": str(checkpoint.folder.resolve()),
        "headers": checkpoint.fingerprint(),
        "files": checkpoint.states(),
        "plan": plan.digest(),
        "dtype": dtype,
    }


def _dtype(name: str | None) -> torch.dtype | None:
    if name is not None and name not in DTYPES:
        raise SourceError(f"dtype '{name}' is not offered: expected one of {', '.join(DTYPES)}.")
    return DTYPES[name] if name else None
