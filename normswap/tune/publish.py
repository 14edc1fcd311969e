"""A trained model as a folder that stock transformers loads, with what was measured, the recipe and the curves."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from normswap.apply.modelling import load_generated
from normswap.calibration.data import Progress
from normswap.checkpoint.files import CONFIG, Checkpoint
from normswap.checkpoint.publish import copy_side_files
from normswap.checkpoint.record import PLAIN, RECORD, write_record
from normswap.checkpoint.source import Source
from normswap.conversion import configure
from normswap.planning.plans import Plan
from normswap.planning.request import Request
from normswap.report.card import write_trained_card
from normswap.report.curves import draw
from normswap.tune.recipe import Recipe
from normswap.verification.checks import check_files
from normswap.verification.opened import open_published
from normswap.verification.proof import TOKENS
from normswap.verification.run import Report, verify

if TYPE_CHECKING:
    from normswap.tune.run import Finetuned

RECIPE, CURVES = "recipe.yaml", "training.png"


def publish(
    folder: Path, source: Source, recipe: Recipe, done: Finetuned, model: nn.Module, data: str, progress: Progress
) -> None:
    """Write all of the result into the unpublished `folder`.

    The weights are stored as the source's are, or in `recipe.dtype`; reopened, they must be the trained ones, rounded
    once. Of the user's folders no name is written but the last.

    Args:
        done: what was measured.
        model: trained, without scaffolding.
        data: what it was trained on, in words.

    Raises:
        VerificationError: the folder does not hold the model.
    """
    plan = done.plan or _unchanged(source)
    with Checkpoint.open(source.folder) as checkpoint:
        copy_side_files(checkpoint, folder)
        origin = {"name": source.title, "revision": recipe.model.revision, "headers": checkpoint.fingerprint()}
        sizes = [(source.folder / shard.file).stat().st_size for shard in checkpoint.shards]
    raw = json.loads((source.folder / CONFIG).read_text(encoding="utf-8"))
    config = configure(raw, source, source.build(), plan, folder, recipe.dtype)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    _write_weights(folder, source, plan, model, sizes, recipe.dtype)
    public = recipe.without_folders(source.title)
    (folder / RECIPE).write_text(public.to_yaml(), encoding="utf-8")
    training = {
        "recipe": public.model_dump(mode="json"),
        "data": data,
        "scores": done.scores,
        "tokens": done.tokens,
        "minutes": round(done.minutes, 2),
        "folded": done.folded,
        "changes": [change.model_dump(mode="json") for change in done.changes],
        "history": done.history,
    }
    record: dict[str, Any] = {
        "source": origin,
        "source_config": raw,
        "plan": plan.model_dump(mode="json"),
        "undo": {"impossible": "it was trained: it is not the function that the source computes"},
        "training": training,
    }
    # what no norm of was changed is the source's kind of checkpoint still, and can be converted
    name = RECORD if done.plan is not None else PLAIN
    write_record(folder, record, name)
    progress("comparing with the source", 0, 1)
    report = _compared(source, folder, TOKENS[recipe.verify])
    progress("comparing with the source", 1, 1)
    write_record(folder, record | {"report": report.model_dump(mode="json")}, name)
    draw(folder / CURVES, done.history, done.scores)
    write_trained_card(folder, source, plan, report, done, data)


def _unchanged(source: Source) -> Plan:
    """The plan of a run that changes no norm."""
    return Plan(
        architecture=source.model_class.__name__,
        model_type=source.config.model_type,
        request=Request(),
        claim="exact",
        reasons=(),
        converted=(),
        edits=(),
    )


def _write_weights(
    folder: Path, source: Source, plan: Plan, model: nn.Module, sizes: list[int], dtype: str | None
) -> None:
    cls = load_generated(folder) if plan.module_edits() else source.model_class
    config = cls.config_class.from_pretrained(folder)
    published = cls(config)
    published.load_state_dict(model.state_dict())
    wanted = getattr(torch, dtype) if dtype else (config.dtype or torch.float32)
    # one file where the source is one, and else parts of the size of its parts
    largest = max(sizes) if len(sizes) > 1 else 1 << 60
    with tempfile.TemporaryDirectory(dir=folder) as inside:
        published.to(wanted).save_pretrained(inside, max_shard_size=max(largest, 1 << 20))
        for path in Path(inside).glob("model*.safetensors*"):
            shutil.copyfile(path, folder / path.name)  # with the permissions that the umask gives
    check_files(model, open_published(folder, plan, source.model_class))


def _compared(source: Source, folder: Path, tokens: int) -> Report:
    """Source and result on the text that ships with normswap, by the names that are published."""
    found = verify(source.folder, folder, tokens=tokens)
    return found.model_copy(update={"a": source.title, "b": "the trained folder"})
