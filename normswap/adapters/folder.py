"""An adapter as PEFT saves it: `adapter_config.json` and its tensors. Nothing of it is run.

What is known here of a setting is known to survive a conversion. Any other setting has to be the one that PEFT takes by
itself, or the adapter is refused by the setting's name.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from normswap.errors import RefusedError, SourceError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
#: what to do with an adapter that is not carried
MERGE = "Merge it into its base (PEFT's merge_and_unload, then save_pretrained), and convert that."

_Positive = Annotated[int, Field(ge=1)]
_Names = str | list[str] | None
#: settings that are of training, of where the adapter came from, or of nothing that a conversion meets
_ANY = frozenset(
    "auto_mapping base_model_name_or_path revision inference_mode peft_version lora_dropout runtime_config "
    "loftq_config eva_config megatron_core qalora_group_size task_type".split()
)


class Settings(BaseModel):
    """The settings that matter to what the adapter computes, and that are carried whatever they are."""

    model_config = ConfigDict(extra="allow", strict=True)

    peft_type: Literal["LORA"]
    r: _Positive
    lora_alpha: int | float
    target_modules: _Names = None
    exclude_modules: _Names = None
    target_parameters: list[str] | None = None
    modules_to_save: list[str] | None = None
    rank_pattern: dict[str, _Positive] | None = None
    alpha_pattern: dict[str, int | float] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: _Names = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    fan_in_fan_out: bool = False
    # others of these initialise by changing the base's weights, which are others after a conversion
    init_lora_weights: bool | Literal["gaussian", "orthogonal", "eva"] | None = True


@dataclass(frozen=True)
class Adapter:
    """An adapter's files, read.

    Attributes:
        name: of its folder or repository; under it the converted adapter is published.
        folder: where it was read.
        config: its `adapter_config.json`.
        tensors: by key, as stored.
        digest: SHA-256 of the file of tensors.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    digest: str

    @property
    def size(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def read_adapters(folders: Sequence[str | Path]) -> list[Adapter]:
    """Read adapters, from folders or by their Hub ids, before anything else is done.

    Raises:
        SourceError: a folder holds no adapter, or a damaged one; or PEFT is not installed.
        RefusedError: an adapter of another kind than LoRA, or with a setting that is not known to survive.
    """
    if not folders:
        return []
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise SourceError(
            "adapters are measured with PEFT, which is not installed: pip install 'normswap[lora]'."
        ) from (error)
    found = [_read(_located(folder)) for folder in folders]
    names = [adapter.name for adapter in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise SourceError(
            f"two adapters are in folders called {twice}, and would be published as one: rename a folder."
        )
    return found


def _located(folder: str | Path) -> tuple[str, Path]:
    """The adapter's name, and where it is; one that is no local folder, and could be on the Hub, is had from there."""
    path, name = Path(folder).expanduser(), str(folder)
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        return path.resolve().name, path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS, PICKLED])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SourceError(
            f"the adapter {name} is no local folder and could not be had from the Hub ({reason:.200}). Check the name, "
            f"or give a folder with {CONFIG} and {WEIGHTS}."
        ) from error
    return name.partition("/")[2], Path(found)


def _read(located: tuple[str, Path]) -> Adapter:
    name, folder = located
    if not (folder / CONFIG).is_file():
        raise SourceError(
            f"{folder} is no adapter: expected a folder with {CONFIG} and {WEIGHTS}, as PEFT's save_pretrained writes "
            f"it, or a Hub id such as 'org/adapter'."
        )
    config = _config(folder / CONFIG)
    path = next((folder / name for name in (WEIGHTS, PICKLED) if (folder / name).is_file()), None)
    if path is None:
        raise SourceError(f"{folder} has a {CONFIG} and no weights: expected {WEIGHTS} beside it.")
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Adapter(name, folder, config, _tensors(path), digest)


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(config, dict):
        raise SourceError(f"{path} holds a {type(config).__name__}; expected a JSON object.")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise RefusedError(
            f"{path}: expected an adapter of peft_type LORA, found {kind!r}, which is not carried. {MERGE}"
        )
    try:
        Settings.model_validate(config)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][:1])
        raise RefusedError(
            f"{path}: {where} is {config.get(where)!r:.80}, with which the adapter cannot be carried ({first['msg']}). "
            f"{MERGE}"
        ) from error
    _check_others(path, config)
    return config


def _check_others(path: Path, config: dict[str, Any]) -> None:
    from peft import LoraConfig

    usual = LoraConfig().to_dict()
    for key in config.keys() - Settings.model_fields.keys() - _ANY:
        if config[key] != usual.get(key) and config[key] not in (None, False, [], {}):
            raise RefusedError(
                f"{path}: {key} is {config[key]!r:.80}, which is not known to survive a conversion. {MERGE}"
            )


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise SourceError(f"{path} cannot be read: {reason[0]:.200}. Save the adapter again.") from error
    odd = not isinstance(tensors, dict) or next(
        (key for key, value in tensors.items() if not _is_real(key, value)), None
    )
    if odd:
        raise SourceError(f"{path}: expected names of real, finite tensors, found something else ({odd}).")
    return tensors


def _is_real(key: object, value: object) -> bool:
    return (
        isinstance(key, str)
        and isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and bool(value.isfinite().all())
    )
