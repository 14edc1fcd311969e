"""Where a model comes from: a folder or a Hub id, its configuration and class, and its structure without weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from normswap.apply.live import apply_structure
from normswap.checkpoint.demands import check_demands
from normswap.checkpoint.documents import brief, read_json
from normswap.checkpoint.files import Checkpoint, has_weights
from normswap.checkpoint.folder import check_folder
from normswap.checkpoint.record import RECORD, Record, stock_class
from normswap.errors import NormswapError, SourceError
from normswap.limits import TooMuch, limited

#: of a model without stored tensors; the largest that transformers has are of some thousands
MAX_MODULES = 200_000
#: for each stored tensor a model has about one module; not many times as many
MODULES_PER_TENSOR, MODULES_BESIDE = 50, 1000
_OTHER_WEIGHTS = ["*.bin", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.pt", "*.pth", "*.ckpt", "*.tflite", "*.ot"]


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
        check_folder(folder)
        raw = _read_json(folder / "config.json")
        check_demands(str(name), raw, trust_remote_code)
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
        model = self.build_stock()
        if self.record is not None:
            with self.carried_out(), limited():
                apply_structure(model, self.record.plan)
        return model.eval()

    @contextmanager
    def carried_out(self) -> Iterator[None]:
        """Have what comes of the record's plan, which nobody need have made, refused where it fits nothing.

        Raises:
            SourceError: for any error in the block but ours, of a folder with a record.
        """
        try:
            yield
        except NormswapError:
            raise
        except Exception as error:
            if self.record is None:
                raise
            raise SourceError(
                f"{self.folder / RECORD} is damaged: its plan gives no model that runs ({brief(error)}). Convert the "
                "source again."
            ) from error

    def build_stock(self) -> PreTrainedModel:
        """The same as its configuration alone says.

        Raises:
            SourceError: the class cannot be built from it, or not within `limits`.
        """
        most = self._most_modules
        try:
            with limited(most), torch.device("meta"):
                return self.model_class._from_config(self.config)
        except TooMuch as error:
            raise SourceError(_beyond(self.name, error)) from error
        except Exception as error:
            raise SourceError(
                f"{self.model_class.__name__} cannot be built from the configuration of {self.name}: "
                f"{type(error).__name__}: {brief(error)}. Check config.json."
            ) from error

    @cached_property
    def _most_modules(self) -> int:
        """How many modules a model of these weights can have, far more than any has."""
        if not has_weights(self.folder):
            return MAX_MODULES
        with Checkpoint.open(self.folder) as checkpoint:
            return min(MAX_MODULES, MODULES_BESIDE + MODULES_PER_TENSOR * len(checkpoint.tensors))


def _beyond(name: object, error: TooMuch) -> str:
    return (
        f"{name}: expected a configuration from which its model is built in seconds, found that it takes {error}. Look "
        "in config.json for a number that is far too large."
    )


def _locate(name: str, revision: str | None, weights: bool) -> Path:
    path = _local(name)
    if path.is_file() and path.name == "config.json":
        return path.parent
    if path.is_dir():
        if (path / "config.json").is_file():
            return path
        raise SourceError(f"{name} has no config.json: expected a folder saved by `save_pretrained`, or a Hub id.")
    if path.suffix == ".gguf":
        raise SourceError(f"{name} is GGUF, for llama.cpp: convert the checkpoint that it was made from.")
    if path.exists() or name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise SourceError(f"{name} is no folder: expected a folder with config.json, or a Hub id such as 'org/model'.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        if not weights:
            return Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.py"]))
        folder = Path(snapshot_download(name, revision=revision, ignore_patterns=_OTHER_WEIGHTS))
        if not has_weights(folder):
            # an old checkpoint: of its weights alone, beside which other formats may stand
            snapshot_download(name, revision=revision, allow_patterns=["pytorch_model*.bin"])
        return folder
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SourceError(
            f"{name} is no local folder and could not be had from the Hub ({reason}). "
            f"Check the name, or give a folder with config.json and *.safetensors."
        ) from error


def _local(name: str) -> Path:
    """The path that a name would be. Raises SourceError where no path can be called so."""
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a zero byte, no such user
        raise SourceError(f"{ascii(name):.200} is no folder and no Hub id: {error}.") from error
    return path


def _read_json(path: Path) -> dict:
    try:
        value = read_json(path)
    except (OSError, ValueError) as error:
        raise SourceError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(value, dict):
        raise SourceError(f"{path} holds a {type(value).__name__}; expected a JSON object.")
    return value


def _load_config(name: str | Path, folder: Path, trust_remote_code: bool, raw: dict) -> PretrainedConfig:
    try:
        # code that is trusted may take its time
        with limited() if not trust_remote_code else nullcontext():
            return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except TooMuch as error:
        raise SourceError(_beyond(name, error)) from error
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
        reason = brief(error).rstrip(".")
        raise SourceError(f"the configuration of {name} cannot be loaded: {reason}. Check config.json.") from error


def _find_class(name, folder: Path, config: PretrainedConfig, raw: dict, trust_remote_code: bool):
    architectures = raw.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise SourceError(
            f"{name}: expected names of classes as architectures of config.json, found {architectures!r:.200}."
        )
    if not architectures:
        raise SourceError(
            f'{name}: config.json names no model class. Expected e.g. "architectures": ["...ForCausalLM"]; '
            f"add the class the weights were saved from."
        )
    wanted = architectures[0]
    if (stock := stock_class(wanted, type(config))) is not None:
        return stock
    auto_map = raw.get("auto_map") if isinstance(raw.get("auto_map"), dict) else {}
    references = {ref.split(".")[-1]: ref for ref in auto_map.values() if isinstance(ref, str)}
    if wanted in references and trust_remote_code:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        return get_class_from_dynamic_module(references[wanted], str(folder))
    way_out = (
        "It is code in the checkpoint: if you trust it, add --trust-remote-code."
        if wanted in references
        else f"transformers {transformers.__version__} has no such class: another version may."
    )
    raise SourceError(f"{name} is a {wanted}, which cannot be built. {way_out}")
