"""A conversion from folder to folder of a small random model, and its result in a process that has no normswap.

`prepare` saves a type's model and converts it; `load_all` starts `load_stock.py` once for many folders, which loads
source and result as a user does, and says how far they are apart.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import normswap
from normswap.errors import RefusedError
from sweep import zoo

#: how a source is stored: in the form of published checkpoints, that in several shards, in the model's own names and
#: groups, and in that of the first checkpoints, in which a norm's parameters are gamma and beta
Form = Literal["published", "sharded", "merged", "legacy"]
LOADER = Path(__file__).with_name("load_stock.py")


def prepare(model: nn.Module, inputs: dict[str, Any], folder: Path, form: Form = "published", **request) -> str | None:
    """Save `model` in float64 as `folder/source` and convert it to `folder/converted`, with what `load_all` needs.

    Args:
        inputs: keyword arguments of `forward`.
        form: how the source is stored.
        request: of `normswap.convert`; by default norms and gains where there are LayerNorms, else gains.

    Returns:
        None, or the reason why nothing can be converted.

    Raises:
        NormswapError: the conversion fails otherwise.
    """
    source = folder / "source"
    save(model.double(), source, form)
    request = {"partial": True, **(request or {"norm": "rmsnorm", "fold": True})}
    try:
        done = normswap.convert(source, folder / "converted", **request, verify="fast")
    except RefusedError as error:
        if request.get("norm") and "has no layernorm" in str(error):
            return prepare(model, inputs, folder, form, fold=True)
        return str(error)
    torch.save(inputs, folder / "inputs.pt")
    (folder / "converted.txt").write_text(f"{len(done.plan.converted)}")
    return None


def save(model: nn.Module, folder: Path, form: Form) -> None:
    """Write `model` into `folder` in the given form; what is there of weights is replaced."""
    size = "40KB" if form == "sharded" else "1GB"
    model.save_pretrained(folder, max_shard_size=size, save_original_format=form != "merged")
    if form == "legacy":
        path = folder / "model.safetensors"
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        tensors = load_file(path)
        renamed = {
            next((k.replace(new, was) for new, was in old.items() if new in k), k): t for k, t in tensors.items()
        }
        if renamed.keys() == tensors.keys():
            raise ValueError(f"{type(model).__name__} has no parameter that was once named otherwise")
        save_file(renamed, path, metadata={"format": "pt"})


def load_all(folders: Iterable[Path], cache: Path) -> dict[str, dict[str, Any]]:
    """For each folder's name what `load_stock.py` says: `error`, or `why` it did not come to that; none where it ended.

    Args:
        folders: as `prepare` leaves them.
        cache: a folder for transformers' copies of modelling files.
    """
    environment = {**os.environ, "HF_MODULES_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-I", str(LOADER), *map(str, folders)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return {found["name"]: found for found in map(json.loads, done.stdout.splitlines())}


def check_type(model_type: str, folder: Path, form: Form = "published", head: str | None = None) -> str | None:
    """`prepare` on the type's model, or on that with another head, the transformers class `head`."""
    if head is None:
        model = zoo.build(model_type)
    else:
        torch.manual_seed(0)
        model = zoo.randomise(getattr(transformers, head)(zoo.tiny_config(model_type)).eval())
    return prepare(model, zoo.inputs_for(model), folder, form)
