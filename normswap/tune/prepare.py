"""What a recipe needs before its first step: the model, the data, the plans of the surgery, the stages."""

from __future__ import annotations

import copy
import inspect as signatures
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel

from normswap.calibration.data import Data, Progress
from normswap.checkpoint.source import Source
from normswap.errors import RecipeError
from normswap.kernels.swap import check_backends
from normswap.observe.run import make_eager
from normswap.tune.data import Corpus, corpus
from normswap.tune.folder import load_plans, save_plans
from normswap.tune.objectives import TAUGHT, Losses
from normswap.tune.processes import main_first, on_main
from normswap.tune.recipe import Recipe
from normswap.tune.schedule import Schedule
from normswap.tune.suited import check_suited
from normswap.tune.surgery import Surgery, plan_surgery
from normswap.tune.training_arguments import BATCH
from normswap.understand.normmap import find_sites
from normswap.verification.inputs import of_text
from normswap.verification.loaded import open_model, tokenizer_of


@dataclass(frozen=True)
class Setup:
    """All that is known before training.

    Attributes:
        recipe, source: of the run.
        original: the source's model with its weights, in the precision of training, in eval mode.
        norms: paths of its norms.
        data: of the recipe.
        surgery: None: there is none.
        schedule: of the stages.
        centred: whether the norms of the source do not see means.
    """

    recipe: Recipe
    source: Source
    original: PreTrainedModel
    norms: tuple[str, ...]
    data: Corpus
    surgery: Surgery | None
    schedule: Schedule
    centred: bool

    @property
    def calibration(self) -> list[dict[str, torch.Tensor]]:
        """Batches that conversions are calibrated on."""
        return self.data.calibration(self.recipe.data.calibration_tokens)

    def losses(self) -> Losses:
        """The objectives, with the unconverted model as the teacher where one asks for it."""
        taught = any(objective.kind in TAUGHT for objective in self.recipe.objective)
        teacher = self.original.eval().requires_grad_(False) if taught else None
        return Losses(self.recipe.objective, teacher, self.centred)


def open_source(recipe: Recipe) -> Source:
    source = Source.open(recipe.model.path, revision=recipe.model.revision)
    if source.record is not None:
        raise RecipeError(
            f"{source.name} was {source.record.history()}. Give the recipe the checkpoint that it was made from, and "
            f"the conversion as `surgery`: they are done in one run, and the result knows its source."
        )
    return source


def prepare(recipe: Recipe, source: Source, progress: Progress, run: Path | None = None) -> Setup:
    """Everything up to the first step: the model, the data, the plans.

    Args:
        run: folder that the plans are kept in, so that a resumed run, and every process, has the same.
    """
    if recipe.kernels is not None:
        check_backends(recipe.kernels.backend)  # now, and not behind a calibration
    original = _load(recipe, source)
    positions = of_text(original.config, "max_position_embeddings")
    takes = set(signatures.signature(original.forward).parameters)
    longest = positions if isinstance(positions, int) else None
    data = main_first(lambda: corpus(recipe, tokenizer_of(source), takes, longest))  # `datasets` caches it
    check_suited(original, recipe.objective, data)
    surgery = None
    if recipe.surgery:
        surgery = _surgery(recipe, source, data, progress, run)
    sites = find_sites(original)
    centred = bool(sites) and all(spec.kind == "layernorm" for _, spec in sites)
    return Setup(
        recipe, source, original, tuple(path for path, _ in sites), data, surgery, _schedule(recipe, data), centred
    )


def _schedule(recipe: Recipe, data: Corpus) -> Schedule:
    length = data.train_tokens / len(data.train)
    per_step = max(1, round(step_size(recipe)["rows"] * length))
    return Schedule.of(recipe.stages, per_step, recipe.training.get("learning_rate"))


def step_size(recipe: Recipe) -> dict[str, Any]:
    """What a step is: how many rows it has, over all processes."""
    args = recipe.training
    rows = args.get("per_device_train_batch_size", BATCH) * args.get("gradient_accumulation_steps", 1)
    return {"rows": rows * PartialState().num_processes}


def _load(recipe: Recipe, source: Source) -> PreTrainedModel:
    config = copy.deepcopy(source.config)
    for key, value in recipe.model.config.items():
        if not hasattr(config, key):
            raise RecipeError(f"model.config: a {type(config).__name__} has no key '{key}'.")
        setattr(config, key, value)
    options = {"attn_implementation": recipe.model.attn_implementation} if recipe.model.attn_implementation else {}
    dtype = getattr(torch, recipe.model.dtype)
    try:
        return source.model_class.from_pretrained(source.folder, config=config, dtype=dtype, **options).eval()
    except (ValueError, ImportError) as error:  # an implementation of attention, or a value of the configuration
        raise RecipeError(f"model: {recipe.model.path} cannot be loaded so: {' '.join(str(error).split())}") from error


def _surgery(recipe: Recipe, source: Source, data: Corpus, progress: Progress, run: Path | None) -> Surgery:
    tapers = recipe.taper is not None

    def make() -> Surgery | None:
        if run is not None and load_plans(run, tapers) is not None:
            return None
        model = open_model(source)
        make_eager(model)
        batches = data.calibration(recipe.data.calibration_tokens)
        count = sum(int(b.get("attention_mask", torch.ones_like(b["input_ids"])).sum()) for b in batches)
        known = Data(model, batches[:-1] or batches, batches[-1:], f"{count} tokens of {data.name}", progress)
        made = plan_surgery(model, recipe.request(), known, tapers)
        if run is not None:
            save_plans(run, made)
        return made if run is None else None

    made = on_main(make)
    return made if run is None else load_plans(run, tapers)
