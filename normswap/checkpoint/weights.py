"""Which files of a folder hold its weights, as `from_pretrained` chooses; other formats are refused by name."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normswap.checkpoint.documents import read_json, shown
from normswap.errors import SourceError

CONFIG = "config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"

_SAVE_AGAIN = (
    "If transformers loads this folder, save it again as safetensors: AutoModelForCausalLM.from_pretrained(folder)"
    ".save_pretrained(new_folder), with the Auto class of the model's task"
)
_ELSEWHERE = (
    "These are made from checkpoints of transformers, often quantised on the way: convert the checkpoint that this one "
    "was made from, and make it from the result"
)
#: by how a file's name ends, what it is and what to do
_OTHERS = {
    ".gguf": ("GGUF, for llama.cpp", _ELSEWHERE),
    ".ggml": ("GGML, for llama.cpp", _ELSEWHERE),
    ".onnx": ("ONNX", _ELSEWHERE),
    ".tflite": ("TensorFlow Lite", _ELSEWHERE),
    ".h5": ("TensorFlow", "Load it with transformers 4, from_pretrained(folder, from_tf=True), and save it again"),
    ".msgpack": ("Flax", "Load it with transformers 4, from_pretrained(folder, from_flax=True), and save it again"),
    "adapter_model.safetensors": ("an adapter of PEFT", "Merge it: peft's merge_and_unload(), then save_pretrained"),
    "adapter_model.bin": ("an adapter of PEFT", "Merge it: peft's merge_and_unload(), then save_pretrained"),
    ".safetensors": ("safetensors of another name", _SAVE_AGAIN + " (variant= names a variant)"),
    ".bin": ("weights of another name", _SAVE_AGAIN + " (variant= names a variant)"),
    ".pt": ("weights of another name", _SAVE_AGAIN),
    ".pth": ("weights of another name", _SAVE_AGAIN),
    ".ckpt": ("weights of another name", _SAVE_AGAIN),
}


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold a folder's weights.

    Attributes:
        files: their names, sorted.
        names: what each is called where it is written as safetensors.
        pickled: whether torch.save wrote them.
        index: the parsed index, None where one file holds everything.
        index_file: its name.
    """

    files: tuple[str, ...]
    names: tuple[str, ...]
    pickled: bool
    index: dict[str, Any] | None = None
    index_file: str | None = None


def has_weights(folder: Path) -> bool:
    """Whether weights are there, and not alone their index, as where a Hub id was fetched without them."""
    return any(
        (folder / whole).is_file() or ((folder / index).is_file() and any(folder.glob(f"*{Path(whole).suffix}")))
        for whole, index in ((WEIGHTS, INDEX), (PICKLED, PICKLED_INDEX))
    )


def find_weights(folder: Path) -> WeightFiles:
    """Look for the weights in the order in which `from_pretrained` looks.

    Raises:
        SourceError: there are none, or in another format, or the index is malformed.
    """
    if not folder.is_dir():
        raise SourceError(f"{folder}: expected a folder with {CONFIG} and {WEIGHTS}; there is no such folder.")
    if not (folder / CONFIG).is_file():
        raise SourceError(f"{folder}: expected {CONFIG}, found none; give the folder that save_pretrained wrote.")
    for whole, index_file, pickled in ((WEIGHTS, INDEX, False), (PICKLED, PICKLED_INDEX, True)):
        if (folder / whole).is_file():
            return WeightFiles((whole,), (WEIGHTS,), pickled)
        if (folder / index_file).is_file():
            index = _read_index(folder / index_file)
            files = sorted(set(index["weight_map"].values()))
            return WeightFiles(tuple(files), _names(files, pickled), pickled, index, index_file)
    raise SourceError(f"{folder}: expected {WEIGHTS} or {INDEX}, found {_others(folder)}.")


def _names(files: list[str], pickled: bool) -> tuple[str, ...]:
    if not pickled:
        return tuple(files)
    if len(files) == 1:
        return (WEIGHTS,)
    return tuple(f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1))


def _others(folder: Path) -> str:
    """What weights a folder has instead, and what to do."""
    names = sorted(path.name for path in folder.iterdir())
    for end, (what, way_out) in _OTHERS.items():
        if found := [name for name in names if name.endswith(end)]:
            return f"{', '.join(found[:8])} ({what}). {way_out}"
    return f"no weights. {_SAVE_AGAIN}"


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = read_json(path)
    except (ValueError, OSError) as error:
        raise SourceError(f"{path}: the index is no valid JSON ({error}); fetch it again.") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{path}: expected weight_map, from tensor to file name; found none. Fetch the index again.")
    if not isinstance(index.get("metadata", {}), dict):
        raise SourceError(f"{path}: expected metadata to be an object, found {index['metadata']!r:.80}.")
    for key, name in weight_map.items():
        # A name with a folder in it could lead out of the checkpoint, and out of the destination when it is written.
        if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", "..") or not _plain(name):
            raise SourceError(
                f"{path}: tensor {shown(key)}: expected the name of a file in {path.parent}, found "
                f"{name!r:.200}. Put all shards beside the index and name them without folders."
            )
        if Path(name).suffix not in (".safetensors", ".bin"):
            # the result's other files may not be written over by one that is said to be a shard
            raise SourceError(
                f"{path}: tensor {shown(key)}: expected a file *.safetensors or *.bin, found {name:.200}. Fetch "
                "the index again, or rename the shards there."
            )
    return index


def _plain(name: str) -> bool:
    return name.isprintable() and "\\" not in name
