"""A checkpoint and what was made of it, opened to be compared: both in memory, or read from their files as they run."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from normswap.apply.live import apply_plan
from normswap.apply.modelling import load_generated
from normswap.checkpoint.source import Source
from normswap.errors import SourceError
from normswap.observe.run import make_eager
from normswap.planning.plans import Plan
from normswap.verification.checks import check_files
from normswap.verification.loaded import coarsest_dtype, open_model
from normswap.verification.on_disk import FromDisk, is_large


class Opened(Protocol):
    """The original, the plan carried out on it, and the published folder.

    Attributes:
        on_disk: whether weights are read where they are used.
        structures: original and published model, to be looked at; they need have no values.
    """

    on_disk: bool
    structures: tuple[PreTrainedModel, PreTrainedModel]

    def as_stored(self, run: torch.dtype) -> tuple[nn.Module, nn.Module]:
        """Original and published model, with their weights as stored, computing in `run`."""

    def mathematics(self, run: torch.dtype) -> tuple[nn.Module, nn.Module]:
        """The original, and what the plan makes of it without rounding, computing in `run`."""

    def left_alone(self, run: torch.dtype) -> tuple[nn.Module, nn.Module]:
        """The original, and the published class with the plan's unrounded weights."""

    def check_files(self) -> int:
        """The folder holds the plan's results, rounded once; how many tensors were compared. VerificationError."""


def open_both(source: Source, plan: Plan, folder: Path, opened: ExitStack) -> Opened:
    """Open `source` and the unpublished `folder`, files until `opened` is closed."""
    return OnDisk(source, plan, folder, opened) if is_large(source) else InMemory(source, plan, folder)


class InMemory:
    """Both loaded by transformers."""

    on_disk = False

    def __init__(self, source: Source, plan: Plan, folder: Path):
        self._plan, self._folder = plan, folder
        self._original, self._result = open_model(source), open_published(folder, plan, source.model_class)
        self._converted: nn.Module | None = None
        self.structures = self._original, self._result

    def as_stored(self, run: torch.dtype) -> tuple[nn.Module, nn.Module]:
        models = self._original, self._result
        return tuple(m if coarsest_dtype(m) == run else copy.deepcopy(m).to(run) for m in models)

    def mathematics(self, run: torch.dtype) -> tuple[nn.Module, nn.Module]:
        self._original = self._original.to(run)
        self._converted = apply_plan(copy.deepcopy(self._original), self._plan)
        return self._original, self._converted

    def left_alone(self, run: torch.dtype) -> tuple[nn.Module, nn.Module]:
        self._result.to(run).load_state_dict(self._converted.state_dict())
        return self._original, self._result

    def check_files(self) -> int:
        return check_files(self._converted, self._result, self._folder)


class OnDisk:
    """Both read from their files as they run."""

    on_disk = True

    def __init__(self, source: Source, plan: Plan, folder: Path, opened: ExitStack):
        self._plan = plan
        self._original = FromDisk(open_model(source, device_map="meta"), source.folder, opened)
        self._result = FromDisk(open_published(folder, plan, source.model_class, device_map="meta"), folder, opened)
        self._planned = self._original.planned(plan)
        self.structures = self._original.like, self._result.like

    def as_stored(self, run: torch.dtype) -> tuple[nn.Module, nn.Module]:
        return self._original.model(run), self._result.model(run)

    def mathematics(self, run: torch.dtype) -> tuple[nn.Module, nn.Module]:
        original = self._original
        return original.model(run, original.stored), original.model(run, self._planned, self._plan)

    def left_alone(self, run: torch.dtype) -> tuple[nn.Module, nn.Module]:
        return self._original.model(run, self._original.stored), self._result.model(run, self._planned)

    def check_files(self) -> int:
        return self._result.check(self._planned)


def open_published(folder: Path, plan: Plan, stock: type[PreTrainedModel], **options: Any) -> PreTrainedModel:
    """The folder's model by the class that a user's process would take, weights as stored.

    Args:
        stock: the source's class.
        options: for transformers' `from_pretrained`, as for `open_model`.
    """
    cls = load_generated(folder) if plan.module_edits() else stock
    model, info = cls.from_pretrained(
        folder, dtype="auto", attn_implementation="eager", output_loading_info=True, **options
    )
    _check_loaded(info)
    make_eager(model)
    return model.eval()


def _check_loaded(info: Mapping[str, object]) -> None:
    missing = sorted(info["missing_keys"])
    missing += [f"{key} {tuple(a)}, expected {tuple(b)}" for key, a, b in sorted(info["mismatched_keys"])]
    if missing:
        raise SourceError(f"the folder lacks {len(missing)} tensors its class needs: {', '.join(missing[:3])}.")
