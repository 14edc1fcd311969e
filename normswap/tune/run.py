"""A recipe carried out: surgery, training, what is left without scaffolding, publication."""

from __future__ import annotations

import copy
import inspect as signatures
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from normswap.calibration.data import Data, Progress, silent
from normswap.checkpoint.publish import Staging
from normswap.checkpoint.source import Source
from normswap.errors import RecipeError, VerificationError
from normswap.observe.run import make_eager
from normswap.planning.plans import Plan
from normswap.repbn import folded_plan, reestimate
from normswap.tune.data import Corpus, corpus
from normswap.tune.objectives import TAUGHT, Losses
from normswap.tune.publish import publish
from normswap.tune.recipe import Recipe
from normswap.tune.schedule import Schedule
from normswap.tune.selection import select
from normswap.tune.surgery import Surgery, check_start, difference, finish, operate, plan_surgery
from normswap.tune.tapers import ramped, turns
from normswap.tune.trainer import Guard, Ramps, StagedTrainer, Told, arguments, judged, saves
from normswap.understand.normmap import find_sites
from normswap.verification.inputs import of_text
from normswap.verification.run import open_model, tokenizer_of

Say = Callable[[dict[str, Any]], None]
#: behind the name of the output: the folder of a run's checkpoints and logs, until it has ended
RUN = ".training"
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
    """

    folder: Path
    recipe: Recipe
    plan: Plan | None
    scores: dict[str, dict[str, float]]
    history: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    folded: float | None = None
    minutes: float = 0.0
    tokens: int = 0


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


def finetune(
    recipe: Recipe,
    *,
    resume: bool = False,
    restart: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    say: Say | None = None,
) -> Finetuned:
    """Carry out a recipe.

    Args:
        resume: go on from the last checkpoint of a run that was interrupted.
        restart: throw such a run away.
        overwrite: replace a model folder at the output.
        progress: called with (what, done, total) while long work runs.
        say: called with each log entry of the training.

    Raises:
        RecipeError: the recipe does not fit its model or data, or a run of another recipe is there.
        RefusedError, SourceError, ObserveError: as for `convert`.
        DivergedError: a guard stopped the run; its checkpoints stay.
        VerificationError: a taper that does not start from the source, or scaffolding that was not taken away exactly.
        DestinationError: the output cannot be written.
    """
    progress, say = progress or silent, say or (lambda entry: None)
    state = PartialState()
    source = open_source(recipe)
    staging = Staging(recipe.output, source.folder, overwrite)
    staging.check()
    run = _run_folder(recipe, resume, restart, state)
    setup = prepare(recipe, source, progress, run)
    scores = {"source": _measure(setup, setup.original, state.device)}
    histories: dict[str, list[dict[str, Any]]] = {}
    if recipe.control:
        control = copy.deepcopy(setup.original)
        histories["control"], control, _ = train(
            setup, control, None, run / "control", "control", resume, progress, say
        )
        scores["control"] = _measure(setup, control, state.device)
        del control
    model = copy.deepcopy(setup.original) if setup.surgery is None else operate(setup.original, setup.surgery)
    calibration = setup.data.calibration(recipe.data.calibration_tokens)
    if setup.surgery is not None and setup.surgery.tapers:
        check_start(setup.original, model, calibration[-1:])
    scores["start"] = _measure(setup, model, state.device)
    began = time.monotonic()
    histories["healed"], trained, tokens = train(setup, model, setup.surgery, run, "healing", resume, progress, say)
    minutes = (time.monotonic() - began) / 60
    done = Finetuned(Path(recipe.output), recipe, None, scores, histories, minutes=minutes, tokens=tokens)
    if state.is_main_process:
        done.plan, final, done.folded = _without_scaffolding(setup, trained, calibration)
        scores["healed"] = _measure(setup, final, state.device)
        with staging as folder:
            publish(folder, setup.source, recipe, done, final, setup.data.described, progress)
        _clear(run)
    state.wait_for_everyone()
    return done


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
    with PartialState().main_process_first():  # the others find what `datasets` has cached
        data = corpus(recipe, tokenizer_of(source), takes, positions if isinstance(positions, int) else None)
    surgery = None
    if recipe.surgery:
        surgery = _surgery(recipe, source, data, progress, run)
    sites = find_sites(original)
    centred = bool(sites) and all(spec.kind == "layernorm" for _, spec in sites)
    return Setup(
        recipe, source, original, tuple(path for path, _ in sites), data, surgery, _schedule(recipe, data), centred
    )


def _schedule(recipe: Recipe, data: Corpus) -> Schedule:
    args = recipe.training
    rows = args.get("per_device_train_batch_size", 16) * args.get("gradient_accumulation_steps", 1)
    length = data.train_tokens / len(data.train)
    per_step = max(1, round(rows * PartialState().num_processes * length))
    return Schedule.of(recipe.stages, per_step, args.get("learning_rate"))


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
    names = ("target", "exact")
    files = {name: run / f"{name}.json" for name in names} if run is not None else {}
    state = PartialState()
    tapers = recipe.taper is not None
    if state.is_main_process and not (files and files["target"].exists()):
        model = open_model(source)
        make_eager(model)
        batches = data.calibration(recipe.data.calibration_tokens)
        described = f"{sum(b['input_ids'].numel() for b in batches)} tokens of {Path(recipe.data.source).name}"
        known = Data(model, batches[:-1] or batches, batches[-1:], described, progress)
        made = plan_surgery(model, recipe.request(), known, tapers)
        if not files:
            return made
        for name in reversed(names):  # the target is there when all are
            if getattr(made, name) is not None:
                getattr(made, name).save(files[name])
    state.wait_for_everyone()
    exact = Plan.load(files["exact"]) if files["exact"].exists() else None
    return Surgery(Plan.load(files["target"]), exact, tapers)


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
) -> tuple[list[dict[str, Any]], nn.Module, int]:
    """Train a model in place. Returns the log, the model with its trained weights, and how many tokens it saw.

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
    losses = Losses(recipe.objective, _teacher(setup, recipe), setup.centred)
    trainer = StagedTrainer(
        model=model,
        args=args,
        train_dataset=setup.data.train,
        eval_dataset=setup.data.held_out,
        data_collator=setup.data.collate,
        losses=losses,
        schedule=schedule,
        trained=trained,
        callbacks=[ramps, Guard(recipe.guards, run), Told(what, progress, say, schedule, ramps), *callbacks],
    )
    spare = copy.deepcopy(model) if trainer.is_fsdp_enabled else None
    if losses.teacher is not None and spare is None:
        _share(model, losses.teacher, ever)
    if losses.teacher is not None:
        losses.teacher.to(args.device)
    trainer.train(resume_from_checkpoint=_checkpoint(run) if resume else None)
    if not any(e.get("step") == schedule.steps and "eval_mean" in e for e in trainer.state.log_history):
        trainer.evaluate()
    model = trainer.result(spare)
    if recipe.lora is not None:
        model = model.merge_and_unload()
    return trainer.state.log_history, model, schedule.steps * schedule.tokens_per_step


def _share(model: nn.Module, teacher: nn.Module, trained: set[str]) -> None:
    """Parameters that are not trained, and are the teacher's, are held once."""
    theirs = dict(teacher.named_parameters())
    for name, parameter in model.named_parameters():
        other = theirs.get(name)
        if name not in trained and other is not None and torch.equal(parameter, other):
            parameter.data = other.data


def running_order(sites: list[str], setup: Setup) -> list[str]:
    """Sites in the order in which they run. What stands at no norm of the source keeps the order of the modules."""
    rank = {path: i for i, path in enumerate(setup.norms)}
    return sorted(sites, key=lambda path: rank[path]) if set(sites) <= rank.keys() else sites


def _arguments(recipe: Recipe, run: Path, steps: int, rate: float):
    try:
        args = arguments(recipe.training, run, steps, rate)
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(f"training: {error}") from error
    if saves(args) and args.save_steps % args.eval_steps:
        raise RecipeError(
            f"training: save_steps is {args.save_steps}, and evaluation is every {args.eval_steps} steps; a checkpoint "
            f"is kept when it was found good: expected a multiple."
        )
    return args


def _teacher(setup: Setup, recipe: Recipe) -> nn.Module | None:
    if not any(objective.kind in TAUGHT for objective in recipe.objective):
        return None
    teacher = setup.original.eval()
    return teacher.requires_grad_(False)


def _checkpoint(run: Path) -> str | None:
    """The last whole checkpoint; one that a kill has left unfinished is removed."""
    for folder in run.glob("checkpoint-*"):
        if not (folder / "trainer_state.json").is_file():
            shutil.rmtree(folder)
    return get_last_checkpoint(str(run)) if run.is_dir() else None


def _run_folder(recipe: Recipe, resume: bool, restart: bool, state: PartialState) -> Path:
    """The folder of a run. Raises RecipeError where one is that is not to be touched, or none to resume."""
    run = Path(f"{recipe.output.rstrip('/')}{RUN}")
    saved, now = run / "recipe.yaml", recipe.to_yaml()
    if resume and not saved.is_file():
        raise RecipeError(f"{run} has no run to resume. Leave --resume out to begin one.")
    if resume and (then := saved.read_text(encoding="utf-8")) != now:
        changed = [line.strip() for line in now.splitlines() if line not in then.splitlines()]
        raise RecipeError(
            f"{run} is a run of another recipe, in which this is not so: {'; '.join(changed[:5])}. Resume it with its "
            f"own ({saved}), or give --restart to throw it away."
        )
    if run.exists() and not (resume or restart):
        raise RecipeError(f"{run} has a run that did not end: --resume goes on with it, --restart throws it away.")
    state.wait_for_everyone()
    if state.is_main_process and not resume:
        if run.exists():
            shutil.rmtree(run)
        run.mkdir(parents=True)
        saved.write_text(now, encoding="utf-8")
    state.wait_for_everyone()
    return run


def _clear(run: Path) -> None:
    """Take away what a run needed to be resumed; logs that somebody else's tools wrote stay."""
    for path in [*run.glob("checkpoint-*"), run / "control"]:
        shutil.rmtree(path, ignore_errors=True)
    for name in ("recipe.yaml", "target.json", "target.safetensors", "exact.json", "exact.safetensors"):
        (run / name).unlink(missing_ok=True)
    if not any(run.iterdir()):
        run.rmdir()


@torch.no_grad()
def _measure(setup: Setup, model: nn.Module, device: torch.device) -> dict[str, float]:
    """What held-out data say of a model."""
    from transformers import EvalPrediction

    losses = Losses(setup.recipe.objective, _teacher(setup, setup.recipe), setup.centred)
    mode = model.training
    model.eval().to(device)
    if losses.teacher is not None:
        losses.teacher.to(device)
    size = setup.recipe.training.get("per_device_eval_batch_size", 16)
    found = []
    for start in range(0, len(setup.data.held_out), size):
        rows = [setup.data.held_out[i] for i in range(start, min(start + size, len(setup.data.held_out)))]
        batch = {name: value.to(device) for name, value in setup.data.collate(rows).items()}
        found.append(losses.scores(model, batch).flatten().cpu())
    model.train(mode)
    return judged(EvalPrediction(torch.cat(found).numpy(), None))


def _without_scaffolding(
    setup: Setup, trained: nn.Module, calibration: list[dict[str, torch.Tensor]]
) -> tuple[Plan | None, nn.Module, float | None]:
    """What is left of the trained model, and the difference that it makes; RepBN is measured anew and folded first."""
    if setup.surgery is None:
        return None, trained, None
    trained = trained.to("cpu").eval()
    batches = calibration[-1:]
    with_all = copy.deepcopy(trained)
    plan, final = finish(setup.original, setup.surgery, trained)
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
