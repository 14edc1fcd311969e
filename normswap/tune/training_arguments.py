"""`transformers.TrainingArguments` of a recipe: which it may give, of what type, and what the others are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from normswap.errors import RecipeError
from normswap.tune.processes import on_cpu

if TYPE_CHECKING:
    from transformers import TrainingArguments

#: rows on a device
BATCH = 16
#: what `stages` and `output` decide, or what our Trainer cannot do without
RESERVED = {
    "output_dir": "`output`",
    "max_steps": "the lengths of `stages`",
    "num_train_epochs": "the lengths of `stages`",
    "lr_scheduler_type": "`schedule` of each of the `stages`",
    "warmup_steps": "`warmup` of each of the `stages`",
    "warmup_ratio": "`warmup` of each of the `stages`",
    "resume_from_checkpoint": "--resume",
    "label_names": "`objective`",
    "remove_unused_columns": "`data`",
    "load_best_model_at_end": "`guards`",
    "auto_find_batch_size": "`per_device_train_batch_size`, by which steps are counted",
    "train_sampling_strategy": "`seed`: rows are taken in passes, each shuffled anew",
    "dataloader_drop_last": "the passes over the data, in which each step has as many rows",
    "save_only_model": "--resume, which needs all of a checkpoint",
    "ignore_data_skip": "--resume, which goes on in the middle of a pass",
}
#: types that it takes beside those that it says
_MORE = {"fsdp": bool}


def unknown(given: Mapping[str, Any]) -> list[str]:
    """What is wrong with them, a line for each."""
    from transformers import TrainingArguments

    hints = get_type_hints(TrainingArguments)
    known = {field.name: hints[field.name] for field in fields(TrainingArguments) if field.init}
    problems = []
    for name, value in given.items():
        if name in RESERVED:
            problems.append(f"`{name}` is decided by {RESERVED[name]}")
        elif name not in known:
            near = get_close_matches(name, known.keys() - RESERVED.keys(), 1)
            meant = f"; did you mean `{near[0]}`?" if near else ""
            problems.append(f"`{name}` is no argument of transformers.TrainingArguments{meant}")
        elif not _fits(value, known[name]) and not isinstance(value, _MORE.get(name, ())):
            called = known[name].__name__ if isinstance(known[name], type) else known[name]
            problems.append(f"`{name}` is {value!r}, and transformers.TrainingArguments takes {called}")
    return problems


def _fits(value: Any, hint: Any) -> bool:
    try:
        TypeAdapter(hint, config={"arbitrary_types_allowed": True}).validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


def arguments(given: Mapping[str, Any], run: Path, steps: int, learning_rate: float) -> TrainingArguments:
    """`TrainingArguments` of a recipe, with what it leaves out filled in.

    Evaluation and checkpoints: ten times in the run, unless `eval_steps` or `save_steps` say otherwise; the two newest
    checkpoints are kept. A process trains on one device; for several there are several processes.
    """
    import torch
    from transformers import TrainingArguments

    tenth = max(1, steps // 10)
    chosen = {
        "eval_strategy": "steps",
        "eval_steps": tenth,
        "save_strategy": "steps",
        "save_steps": given.get("eval_steps", tenth),
        "save_total_limit": 2,
        "logging_steps": max(1, steps // 50),
        "learning_rate": learning_rate,
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": BATCH,
        "weight_decay": 0.0,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_first_step": True,
        "eval_on_start": True,
        "logging_nan_inf_filter": False,  # the guard is to see them
        "dataloader_pin_memory": torch.cuda.is_available(),
        "seed": 42,
        **given,
        "output_dir": str(run),
        "max_steps": steps,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "lr_scheduler_type": "constant",
        "use_cpu": on_cpu(given),
    }
    made = TrainingArguments(**chosen)
    made._n_gpu = min(made.n_gpu, 1)
    return made


def check_rhythm(args: TrainingArguments) -> None:
    """Raises RecipeError where a checkpoint would be kept that was not found good, or never be one."""
    for name in ("eval_strategy", "save_strategy", "logging_strategy"):
        if getattr(args, name) not in ("steps", "no"):
            raise RecipeError(
                f"training: {name} is {getattr(args, name).value}; expected steps or no: the stages are so many steps, "
                f"whatever the passes over the data."
            )
    if args.save_strategy == "no":
        return
    each = [math.ceil(n * args.max_steps) if n < 1 else n for n in (args.save_steps, args.eval_steps)]
    if args.eval_strategy == "no" or each[0] % each[1]:
        found = "never" if args.eval_strategy == "no" else f"every {each[1]:g} steps"
        raise RecipeError(
            f"training: save_steps is {args.save_steps:g}, and evaluation is {found}; a checkpoint is kept when it was "
            f"found good: expected a multiple."
        )
