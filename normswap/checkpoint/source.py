"""Where a model comes from: a folder or a Hub id, its configuration and class, and its structure without weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from normswap.apply.live import apply_structure
from normswap.checkpoint.record import RECORD, Record, stock_class
from normswap.errors import SourceError


@dataclass(frozen=True)
class Source:
    """A checkpoint's identity, before any weight is read.

    Attributes:
        name: as the user gave it.
        folder: where its files are.
        config: the configuration, of the stock class also for a folder that normswap converted.
        model_class: the class named by the configuration's `architectures`.
        record: of the conversion if normswap made this folder, else None.
    """

    name: str
    folder: Path
    config: PretrainedConfig
    model_class: type[PreTrainedModel]
    record: Record | None = None

    @classmethod
    def open(
        cls, name: str | Path, *, revision: str | None = None, trust_remote_code: bool = False, weights: bool = True
    ) -> Source:
        """Find the checkpoint `name`: a folder, a `config.json`, or a Hub id (`revision` applies to the last).

        Args:
            weights: whether the weights of a Hub id are needed too.

        Raises:
            SourceError: nothing readable there, a quantised checkpoint, or custom code without the flag.
        """
        folder = _locate(str(name), revision, weights)
        if revision is not None and Path(name).expanduser().exists():
            raise SourceError(f"{name} is a local folder; a revision ({revision}) can be had of a Hub id only.")
        raw = _read_json(folder / "config.json")
        if "quantization_config" in raw:
            method = raw["quantization_config"]
            method = method.get("quant_method", "unknown") if isinstance(method, dict) else method
            raise SourceError(
                f"{name} is quantised ({method}): its weights cannot be edited exactly. Convert the unquantised "
                f"checkpoint it was made from, then quantise the result."
            )
        record = Record.read(folder) if (folder / RECORD).exists() else None
        if record is not None:
            model_class, config = record.stock()
        else:
            config = _load_config(name, folder, trust_remote_code, raw)
            model_class = _find_class(name, folder, config, raw, trust_remote_code)
        return cls(str(name), folder, config, model_class, record)

    @property
    def title(self) -> str:
        """The name to publish: a Hub id in full, of a local path the folder's own name."""
        return self.folder.resolve().name if Path(self.name).expanduser().exists() else self.name

    def build(self) -> PreTrainedModel:
        """The model on the meta device: its modules and shapes, no weights. A converted folder's plan is replayed."""
        try:
            with torch.device("meta"):
                model = self.model_class._from_config(self.config)
        except Exception as error:
            raise SourceError(
                f"{self.model_class.__name__} cannot be built from the configuration of {self.name}: "
                f"{type(error).__name__}: {error}. Check config.json."
            ) from error
        if self.record is not None:
            apply_structure(model, self.record.plan)
        return model.eval()


def _locate(name: str, revision: str | None, weights: bool) -> Path:
    path = Path(name).expanduser()
    if path.is_file() and path.name == "config.json":
        return path.parent
    if path.is_dir():
        if (path / "config.json").is_file():
            return path
        raise SourceError(f"{name} has no config.json: expected a folder saved by `save_pretrained`, or a Hub id.")
    if path.exists() or name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise SourceError(f"{name} is no folder: expected a folder with config.json, or a Hub id such as 'org/model'.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    skipped = ["*.bin", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.pt"]
    try:
        return Path(
            snapshot_download(name, revision=revision, ignore_patterns=skipped)
            if weights
            else snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.py"])
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SourceError(
            f"{name} is no local folder and could not be had from the Hub ({reason}). "
            f"Check the name, or give a folder with config.json and *.safetensors."
        ) from error


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(value, dict):
        raise SourceError(f"{path} holds a {type(value).__name__}; expected a JSON object.")
    return value


def _load_config(name: str | Path, folder: Path, trust_remote_code: bool, raw: dict) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # of transformers, or of the checkpoint's own code
        if "auto_map" in raw and not trust_remote_code:
            ours = str(raw.get("model_type")).startswith("normswap_")
            whose = (
                f" It was converted by normswap, but its {RECORD} is not there; put that back beside it."
                if ours
                else ""
            )
            raise SourceError(
                f"{name} brings its own code, which is not run.{whose} If you trust the code, add --trust-remote-code."
            ) from error
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise SourceError(f"the configuration of {name} cannot be loaded: {reason:.400}. Check config.json.") from error


def _find_class(name, folder: Path, config: PretrainedConfig, raw: dict, trust_remote_code: bool):
    architectures = raw.get("architectures") or []
    if not architectures:
        raise SourceError(
            f'{name}: config.json names no model class. Expected e.g. "architectures": ["...ForCausalLM"]; '
            f"add the class the weights were saved from."
        )
    wanted = architectures[0]
    if (stock := stock_class(wanted, type(config))) is not None:
        return stock
    references = {ref.split(".")[-1]: ref for ref in (raw.get("auto_map") or {}).values() if isinstance(ref, str)}
    if wanted in references and trust_remote_code:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        return get_class_from_dynamic_module(references[wanted], str(folder))
    way_out = (
        "It is code in the checkpoint: if you trust it, add --trust-remote-code."
        if wanted in references
        else f"transformers {transformers.__version__} has no such class: another version may."
    )
    raise SourceError(f"{name} is a {wanted}, which cannot be built. {way_out}")
