"""A recipe carried out: surgery, training, what is left without scaffolding, publication."""

from __future__ import annotations

import copy
import inspect as signatures
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from normswap.calibration.data import Data, Progress, silent
from normswap.checkpoint.publish import Staging
from normswap.checkpoint.source import Source
from normswap.errors import NormswapError, RecipeError, VerificationError
from normswap.observe.run import make_eager
from normswap.planning.plans import Plan
from normswap.repbn import folded_plan, reestimate
from normswap.tune import checkpoints
from normswap.tune.amend import Change
from normswap.tune.data import Corpus, corpus
from normswap.tune.folder import begin, clear, control_of, forget, held, load_plans, path_of, save_plans
from normswap.tune.objectives import TAUGHT, Losses
from normswap.tune.processes import main_first, on_main, start
from normswap.tune.publish import publish
from normswap.tune.recipe import Recipe
from normswap.tune.schedule import Schedule
from normswap.tune.selection import select
from normswap.tune.suited import check_suited
from normswap.tune.surgery import Surgery, check_start, difference, finish, operate, plan_surgery
from normswap.tune.tapers import ramped, turns
from normswap.tune.trainer import BATCH, Guard, Ramps, StagedTrainer, Told, arguments, check_rhythm, judged
from normswap.understand.normmap import find_sites
from normswap.verification.inputs import of_text
from normswap.verification.run import open_model, tokenizer_of

Say = Callable[[dict[str, Any]], None]
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
        changes = on_main(lambda: begin(recipe, _size(recipe), resume, restart))
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
    per_step = max(1, round(_size(recipe)["rows"] * length))
    return Schedule.of(recipe.stages, per_step, recipe.training.get("learning_rate"))


def _size(recipe: Recipe) -> dict[str, Any]:
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
        described = f"{sum(b['input_ids'].numel() for b in batches)} tokens of {Path(recipe.data.source).name}"
        known = Data(model, batches[:-1] or batches, batches[-1:], described, progress)
        made = plan_surgery(model, recipe.request(), known, tapers)
        if run is not None:
            save_plans(run, made)
        return made if run is None else None

    made = on_main(make)
    return made if run is None else load_plans(run, tapers)


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
    if surgery is None:  # what the surgery brings, the control does not have
        chosen = {name: "all" if train in ("skips", "moved") else train for name, train in chosen.items()}
    trained = {name: select(model, train, plan, setup.norms) for name, train in chosen.items()}
    own = dict(model.named_parameters())
    if recipe.lora is not None:
        from normswap.tune.lora import add_adapters

        model, trained = add_adapters(model, recipe.lora, trained, plan, setup.norms)
    ever = set().union(*trained.values())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in ever)
    sites = list(ramped(model)) if surgery is not None and surgery.tapers else []
    sites = running_order(sites, setup)
    ramps = Ramps(model, schedule, sites, turns(sites, recipe.taper.order) if recipe.taper else [])
    rate = max(span.learning_rate for span in schedule.spans)
    args = _arguments(recipe, run, schedule.steps, rate)
    found = on_main(lambda: checkpoints.last(run)) if resume else None
    if found is not None:
        args.eval_on_start = False  # it was evaluated when it was saved
        say({"run": what, "note": f"goes on behind step {checkpoints.step(found)} of {schedule.steps}"})
    losses = Losses(recipe.objective, _teacher(setup, recipe), setup.centred)
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


def _teacher(setup: Setup, recipe: Recipe) -> nn.Module | None:
    if not any(objective.kind in TAUGHT for objective in recipe.objective):
        return None
    teacher = setup.original.eval()
    return teacher.requires_grad_(False)


@torch.no_grad()
def _measure(setup: Setup, model: nn.Module) -> dict[str, float]:
    """What held-out data say of a model. It, and the original, are on the CPU before and after."""
    from transformers import EvalPrediction

    device = PartialState().device
    losses = Losses(setup.recipe.objective, _teacher(setup, setup.recipe), setup.centred)
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
    return judged(EvalPrediction(torch.cat(found).numpy(), None))


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
    if any(hasattr(module, "bn_mean") for module in final.modules()):
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
