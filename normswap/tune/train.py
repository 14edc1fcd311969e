"""One training of a recipe: of the converted model, or of the unconverted one as its control."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from normswap.calibration.data import Progress
from normswap.errors import RecipeError
from normswap.kernels.swap import restore_kernels
from normswap.tune import checkpoints
from normswap.tune.callbacks import Guard, Ramps, Told
from normswap.tune.kernels import fuse
from normswap.tune.prepare import Setup
from normswap.tune.processes import on_main
from normswap.tune.recipe import Recipe
from normswap.tune.selection import select
from normswap.tune.surgery import Surgery
from normswap.tune.tapers import ramped, turns
from normswap.tune.trainer import StagedTrainer
from normswap.tune.training_arguments import arguments, check_rhythm

Say = Callable[[dict[str, Any]], None]


def train(
    setup: Setup,
    model: PreTrainedModel,
    surgery: Surgery | None,
    run: Path,
    what: str,
    resume: bool,
    progress: Progress,
    say: Say,
    callbacks: Sequence[TrainerCallback] = (),
) -> tuple[list[dict[str, Any]], nn.Module]:
    """Train a model in place. Returns the log, and the model with its trained weights, on the CPU.

    Args:
        model: `operate` made it; or the source's, with `surgery` None.
        run: folder of its checkpoints.
        what: it is called in logs.
        callbacks: beside those of a recipe.
    """
    recipe, schedule = setup.recipe, setup.schedule
    plan = (surgery.exact or surgery.target) if surgery is not None else None
    chosen = {span.name: span.stage.train for span in schedule.spans}
    if surgery is None and setup.surgery is not None:  # what the surgery brings, the control does not have
        chosen = {name: "all" if train in ("skips", "moved") else train for name, train in chosen.items()}
    trained = {name: select(model, train, plan, setup.norms) for name, train in chosen.items()}
    own = dict(model.named_parameters())
    rate = max(span.learning_rate for span in schedule.spans)
    args = _arguments(recipe, run, schedule.steps, rate)
    if recipe.kernels is not None:
        say({"run": what, "note": fuse(model, recipe, args, run)})
    if recipe.lora is not None:
        from normswap.tune.lora import add_adapters

        model, trained = add_adapters(model, recipe.lora, trained, plan, setup.norms)
    ever = set().union(*trained.values())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in ever)
    sites = list(ramped(model)) if surgery is not None and surgery.tapers else []
    sites = running_order(sites, setup)
    ramps = Ramps(model, schedule, sites, turns(sites, recipe.taper.order) if recipe.taper else [])
    found = on_main(lambda: checkpoints.last(run)) if resume else None
    if found is not None:
        args.eval_on_start = False  # it was evaluated when it was saved
        say({"run": what, "note": f"goes on behind step {checkpoints.step(found)} of {schedule.steps}"})
    losses = setup.losses()
    trainer = StagedTrainer(
        model=model,
        args=args,
        rows=setup.data.train,
        eval_dataset=setup.data.held_out,
        data_collator=setup.data.collate,
        losses=losses,
        schedule=schedule,
        trained=trained,
        callbacks=[ramps, Guard(recipe.guards, run, schedule), Told(what, progress, say, schedule, ramps), *callbacks],
    )
    if found is not None and recipe.lora is not None and trainer.is_fsdp_enabled:
        raise RecipeError(
            "lora: with FSDP a run cannot be resumed: accelerate saves the adapters alone, and not the norms that were "
            "trained beside them. Begin again with --restart, or train without training.fsdp, which resumes."
        )
    spare = copy.deepcopy(model) if trainer.is_fsdp_enabled else None
    shared: list[nn.Parameter] = []
    if losses.teacher is not None:
        losses.teacher.to(args.device)
        shared = share(own, losses.teacher) if spare is None else []
    trainer.train(resume_from_checkpoint=None if found is None else str(found))
    if not any(e.get("step") == schedule.steps and "eval_mean" in e for e in trainer.state.log_history):
        trainer.evaluate()
    model = trainer.result(spare)
    restore_kernels(model)
    for parameter in shared:  # what is done to the one from here on is not done to the other
        parameter.data = parameter.data.clone()
    if losses.teacher is not None:
        losses.teacher.to("cpu")
    return trainer.state.log_history, model


def share(own: Mapping[str, nn.Parameter], teacher: nn.Module) -> list[nn.Parameter]:
    """Parameters that are not trained, and are the teacher's, are held once. Returns them.

    Args:
        own: of the model, by the names that they had before it got adapters; on the device of the teacher.
    """
    theirs = dict(teacher.named_parameters())
    shared = []
    for name, parameter in own.items():
        other = theirs.get(name)
        if not parameter.requires_grad and other is not None and torch.equal(parameter, other):
            parameter.data = other.data
            shared.append(parameter)
    return shared


def running_order(sites: list[str], setup: Setup) -> list[str]:
    """Sites in the order in which they run. What stands at no norm of the source keeps the order of the modules."""
    rank = {path: i for i, path in enumerate(setup.norms)}
    return sorted(sites, key=lambda path: rank[path]) if set(sites) <= rank.keys() else sites


def _arguments(recipe: Recipe, run: Path, steps: int, rate: float):
    try:
        args = arguments(recipe.training, run, steps, rate)
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(f"training: {error}") from error
    check_rhythm(args)
    return args
