"""A recipe carried out: surgery, training, what is left without scaffolding, publication."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn

from normswap.calibration.data import Progress, silent
from normswap.checkpoint.publish import Staging
from normswap.errors import NormswapError, VerificationError
from normswap.planning.plans import Plan
from normswap.repbn import folded_plan, has_repbn, reestimate
from normswap.tune.amend import Change
from normswap.tune.folder import begin, clear, control_of, forget, held, path_of
from normswap.tune.prepare import Setup, open_source, prepare, step_size
from normswap.tune.processes import on_main, start
from normswap.tune.publish import publish
from normswap.tune.recipe import Recipe
from normswap.tune.surgery import check_start, difference, finish, operate
from normswap.tune.train import Say, train
from normswap.tune.trainer import judged
from normswap.tune.training_arguments import BATCH

_FOLDED = 1e-5


@dataclass
class Finetuned:
    """A finished run.

    Attributes:
        folder: the published checkpoint.
        recipe: as resolved.
        plan: of the result's structure.
        scores: by model (`source`, `start`, `healed`, `control`), what held-out data say: `mean` and `p99.9`.
        history: log entries of the run, and of the control.
        folded: the relative difference that taking the scaffolding away made.
        minutes, tokens: of the training.
        changes: of the recipe, where the run was resumed with others.
    """

    folder: Path
    recipe: Recipe
    plan: Plan | None
    scores: dict[str, dict[str, float]]
    history: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    folded: float | None = None
    minutes: float = 0.0
    tokens: int = 0
    changes: list[Change] = field(default_factory=list)


def finetune(
    recipe: Recipe,
    *,
    resume: bool = False,
    restart: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    say: Say | None = None,
) -> Finetuned:
    """Carry out a recipe. In several processes (`torchrun`), each calls this with the same.

    Args:
        resume: go on from the last checkpoint of a run that was interrupted.
        restart: throw such a run away.
        overwrite: replace a model folder at the output.
        progress: called with (what, done, total) while long work runs; as `say`, in the main process alone.
        say: called with each log entry of the training, and with notes (`run` and `note`).

    Raises:
        RecipeError: the recipe does not fit its model or data, or a run of another recipe is there.
        RefusedError, SourceError, ObserveError: as for `convert`.
        DivergedError: a guard stopped the run; its checkpoints stay.
        VerificationError: a taper that does not start from the source, or scaffolding that was not taken away exactly.
        DestinationError: the output cannot be written.
    """
    start(recipe.training)
    if not PartialState().is_main_process:
        progress = say = None
    progress, say = progress or silent, say or (lambda entry: None)
    source = open_source(recipe)
    staging = Staging(recipe.output, source.folder, overwrite)
    staging.check()
    run = path_of(recipe)
    # a process that waits for another one is told when that fails
    with ExitStack() as stack:
        on_main(lambda: stack.enter_context(held(run)))
        changes = on_main(lambda: begin(recipe, step_size(recipe), resume, restart))
        try:
            setup = prepare(recipe, source, progress, run)
            done, trained = _trained(setup, run, resume, progress, say)
        except NormswapError:
            if PartialState().is_main_process:
                forget(run)
            raise
        done.changes = changes

        def end() -> None:
            done.plan, final, done.folded = _without_scaffolding(setup, trained)
            done.scores["healed"] = _measure(setup, final)
            with staging as folder:
                publish(folder, setup.source, recipe, done, final, setup.data.described, progress)
            clear(run)

        on_main(end)
    return done


def _trained(setup: Setup, run: Path, resume: bool, progress: Progress, say: Say) -> tuple[Finetuned, nn.Module]:
    """The trained model, with its scaffolding, and what was measured up to there."""
    recipe, surgery = setup.recipe, setup.surgery
    scores = {"source": _measure(setup, setup.original)}
    histories: dict[str, list[dict[str, Any]]] = {}
    if recipe.control:
        control = copy.deepcopy(setup.original)
        histories["control"], control = train(setup, control, None, control_of(run), "control", resume, progress, say)
        scores["control"] = _measure(setup, control)
        del control
    model = copy.deepcopy(setup.original) if surgery is None else operate(setup.original, surgery)
    if surgery is not None and surgery.tapers:
        check_start(setup.original, model, setup.calibration[-1:])
    scores["start"] = _measure(setup, model)
    histories["healed"], trained = train(setup, model, surgery, run, "healing", resume, progress, say)
    minutes = max(entry["minutes"] for entry in histories["healed"])
    tokens = setup.schedule.steps * setup.schedule.tokens_per_step
    return Finetuned(Path(recipe.output), recipe, None, scores, histories, minutes=minutes, tokens=tokens), trained


@torch.no_grad()
def _measure(setup: Setup, model: nn.Module) -> dict[str, float]:
    """What held-out data say of a model. It, and the original, are on the CPU before and after."""
    device = PartialState().device
    losses = setup.losses()
    mode = model.training
    together = [model.eval()] if losses.teacher is None else [model.eval(), losses.teacher]
    for part in together:
        part.to(device)
    size = setup.recipe.training.get("per_device_eval_batch_size", BATCH)
    found = []
    for first in range(0, len(setup.data.held_out), size):
        rows = [setup.data.held_out[i] for i in range(first, min(first + size, len(setup.data.held_out)))]
        batch = {name: value.to(device) for name, value in setup.data.collate(rows).items()}
        found.append(losses.scores(model, batch).flatten().cpu())
    for part in together:
        part.to("cpu")
    model.train(mode)
    return judged(torch.cat(found).numpy())


def _without_scaffolding(setup: Setup, trained: nn.Module) -> tuple[Plan | None, nn.Module, float | None]:
    """What is left of the trained model without adapters and tapers, and the difference that it makes.

    RepBN is measured anew, and folded.
    """
    surgery, lora = setup.surgery, setup.recipe.lora
    if surgery is None and lora is None:
        return None, trained, None
    trained = trained.eval()
    calibration = setup.calibration
    batches = calibration[-1:]
    with_all = copy.deepcopy(trained)
    final = trained if lora is None else trained.merge_and_unload()
    plan, final = (None, final) if surgery is None else finish(setup.original, surgery, final)
    found = difference(with_all, final, batches)
    if has_repbn(final):
        reestimate(final, calibration)
        before = copy.deepcopy(final)
        plan = folded_plan(plan, final)
        found = max(found, difference(before, final, batches))
    if found > _FOLDED and setup.recipe.model.dtype in ("float32", "float64"):
        raise VerificationError(
            f"taking the scaffolding away changed the output by {found:.1e} (expected {_FOLDED:.0e} at most). Nothing "
            f"was published; the checkpoints are kept. Please report the model: this is a fault of normswap."
        )
    return plan, final, found
