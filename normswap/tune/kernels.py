"""Fused kernels under the norms of a model while it trains."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import torch
from accelerate import PartialState
from torch import nn
from transformers import TrainingArguments

from normswap.kernels.swap import restore_kernels, use_kernels
from normswap.tune.folder import CHOSEN
from normswap.tune.processes import on_main
from normswap.tune.recipe import Recipe


def fuse(model: nn.Module, recipe: Recipe, args: TrainingArguments, run: Path) -> str:
    """Put the recipe's kernels under `model`. Returns what serves its norms, in words."""
    device = PartialState().device.type
    autocast = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    options = {"device": device, "autocast": autocast, **recipe.kernels.model_dump()}
    path = run / CHOSEN

    def choose() -> dict[str, str | None]:
        if not path.is_file():
            chosen = use_kernels(model, **options).chosen()
            restore_kernels(model)
            run.mkdir(parents=True, exist_ok=True)  # a control's is not there yet
            partial = path.with_name(f"{path.name}.partial")
            partial.write_text(json.dumps(chosen, indent=1), encoding="utf-8")
            os.replace(partial, path)
        return json.loads(path.read_text(encoding="utf-8"))

    found = use_kernels(model, **options, chosen=on_main(choose))
    counts = Counter(site.backend or "its own module" for site in found.sites)
    words = ", ".join(f"{count} norms by {name}" for name, count in counts.most_common())
    sums = "" if found.fusing is None else f"; {len(found.fusing.fused)} of {len(found.fusing.pairs)} sums by norms"
    return f"kernels: {words}{sums}"
