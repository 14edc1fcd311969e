"""Which of `transformers.TrainingArguments` a recipe may give, and of what type: it does not check them itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

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
        elif not _fits(value, known[name]):
            called = known[name].__name__ if isinstance(known[name], type) else known[name]
            problems.append(f"`{name}` is {value!r}, and transformers.TrainingArguments takes {called}")
    return problems


def _fits(value: Any, hint: Any) -> bool:
    try:
        TypeAdapter(hint, config={"arbitrary_types_allowed": True}).validate_python(value, strict=True)
    except ValidationError:
        return False
    return True
