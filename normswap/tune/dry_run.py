"""What a recipe would do: its plan, stages, tokens and memory, without a step of training."""

from __future__ import annotations

from pydantic import BaseModel

from normswap.calibration.data import Progress, silent
from normswap.checkpoint.source import Source
from normswap.planning.plans import Plan
from normswap.tune.objectives import TAUGHT
from normswap.tune.prepare import open_source, prepare
from normswap.tune.processes import start
from normswap.tune.recipe import Recipe
from normswap.tune.selection import select
from normswap.tune.surgery import operate
from normswap.tune.tapers import ramped, turns
from normswap.tune.train import running_order

#: to calibrate on, which shows what is made and takes seconds
_TOKENS = 512


class Foreseen(BaseModel):
    """What a recipe would do.

    Attributes:
        plan: of the result, None: no norm changes.
        stages: each with its steps, tokens, learning rate, how many parameters it trains, and its taper.
        tokens: of the training, over all processes; `data_tokens` of one pass over the training part.
        memory: bytes of weights, gradients, optimizer and teacher on each device; activations are not counted.
        tapered: sites with scaffolding.
        warnings: settings that are known to go wrong.
    """

    plan: Plan | None
    stages: list[dict[str, str | int | float]]
    tokens: int
    data_tokens: int
    data: str
    memory: dict[str, int]
    tapered: list[str]
    warnings: list[str]


def foresee(recipe: Recipe, progress: Progress | None = None) -> Foreseen:
    """What `finetune` would do. The surgery is planned, and calibrated on a few tokens alone; nothing is written.

    Raises:
        As `finetune`, for all that is wrong before training.
    """
    start(recipe.training)
    source: Source = open_source(recipe)
    few = recipe.data.model_copy(update={"calibration_tokens": min(recipe.data.calibration_tokens, _TOKENS)})
    setup = prepare(recipe.model_copy(update={"data": few}), source, progress or silent)
    surgery = setup.surgery
    model = setup.original if surgery is None else operate(setup.original, surgery)
    plan = surgery.target if surgery is not None else None
    made = (surgery.exact or surgery.target) if surgery is not None else None
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    stages, ever = [], set()
    for span in setup.schedule.spans:
        names = select(model, span.stage.train, made, setup.norms)
        ever |= names
        taper = span.stage.taper
        stages.append(
            {
                "name": span.name,
                "train": span.stage.train if isinstance(span.stage.train, str) else ", ".join(span.stage.train),
                "parameters": sum(sizes[name] for name in names),
                "steps": span.end - span.start,
                "tokens": (span.end - span.start) * setup.schedule.tokens_per_step,
                "learning_rate": span.learning_rate,
                "warmup": span.stage.warmup,
                "taper": "" if taper is None else f"{taper.shape}, {taper.order}",
            }
        )
    tapered = running_order(list(ramped(model)), setup) if surgery is not None and surgery.tapers else []
    if recipe.taper is not None:
        turns(tapered, recipe.taper.order)
    size = next(model.parameters()).element_size()
    trained = sum(sizes[name] for name in ever)
    memory = {"weights": sum(sizes.values()) * size, "gradients": trained * size, "optimizer": 2 * trained * size}
    if any(objective.kind in TAUGHT for objective in recipe.objective):
        memory["teacher"] = sum(p.numel() for p in setup.original.parameters()) * size
    return Foreseen(
        plan=plan,
        stages=stages,
        tokens=setup.schedule.steps * setup.schedule.tokens_per_step,
        data_tokens=setup.data.train_tokens,
        data=setup.data.described,
        memory=memory,
        tapered=tapered,
        warnings=warnings(recipe),
    )


def warnings(recipe: Recipe) -> list[str]:
    """Settings of a recipe that are known to go wrong."""
    found = []
    ends_post = any(place.name in ("post", "deepnorm") for place in recipe.request().placements)
    for number, stage in enumerate(recipe.stages):
        rate = stage.learning_rate or recipe.training.get("learning_rate", 0)
        which = f"stage {stage.name or number} trains a post-norm model at {rate:g}"
        if ends_post and rate >= TOO_HIGH:
            found.append(f"{which}, at which one diverged with a warm-up and without ({_MEASURED}): lower it.")
        elif ends_post and stage.warmup == 0 and rate >= WANTS_WARMUP:
            found.append(
                f"{which} without a warm-up; one ended higher so ({_MEASURED}): set its `warmup` to 0.1 or more."
            )
    return found


#: learning rates at which a small post-norm model diverged, and from which it did better with a warm-up
TOO_HIGH, WANTS_WARMUP = 1e-2, 3e-3
_MEASURED = "scripts/bench_stability.py"
