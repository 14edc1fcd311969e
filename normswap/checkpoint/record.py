"""`normswap.json`, which a conversion writes beside the weights: plan, source configuration, measurements."""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from normswap.checkpoint.demands import check_demands
from normswap.checkpoint.documents import brief, check_narrow, read_json
from normswap.checkpoint.folder import check_inside
from normswap.errors import SourceError
from normswap.limits import limited
from normswap.planning.plans import Plan

RECORD = "normswap.json"
#: the record of a training without a conversion
PLAIN = "training.json"


@dataclass(frozen=True)
class Record:
    """The part of a record that is needed to open the folder.

    Attributes:
        folder: where it was read.
        plan: what was done.
        source_config: the source's `config.json`.
        version: of normswap, as text.
        raw: all of it.
    """

    folder: Path
    plan: Plan
    source_config: dict[str, Any]
    version: str
    raw: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, name: str = RECORD) -> Record:
        """Raises SourceError when the folder has no record of that name, or a damaged one."""
        path = folder / name
        check_inside(folder, path)
        try:
            raw = read_json(path)
            plan, source_config = Plan.of(raw["plan"]), raw["source_config"]
            version = str(raw.get("normswap", ""))
            check_narrow([raw.get("report"), raw.get("adapters")], names=65_536)
        except OSError as error:
            raise SourceError(
                f"{folder} is not a folder that normswap wrote: cannot read {path}: {error.strerror}. "
                "Other checkpoints are opened with transformers itself."
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            why = f"it has no key {error}" if isinstance(error, KeyError) else brief(error)
            raise SourceError(f"{path} is damaged: {why}. Convert the source again.") from error
        if not isinstance(source_config, dict) or not isinstance(source_config.get("model_type"), str):
            raise SourceError(f"{path} is damaged: source_config is no model configuration. Convert the source again.")
        for place in ("source", "source.files", "undo", "training"):
            if not isinstance(_at(raw, place), dict):
                raise SourceError(f"{path} is damaged: {place} is no object. Convert the source again.")
        return cls(folder, plan, source_config, version, raw)

    def stock(self) -> tuple[type[PreTrainedModel], PretrainedConfig]:
        """The class and configuration of the source, as transformers has them; nothing of the folder's code runs."""
        check_demands(str(self.folder / RECORD), self.source_config, trust_remote_code=False)
        model_type = self.source_config["model_type"]
        if model_type not in CONFIG_MAPPING:
            raise SourceError(
                f"{self.folder} was converted from a {model_type}, which transformers {transformers.__version__} does "
                "not have; install the version it was converted with."
            )
        config_class = CONFIG_MAPPING[model_type]
        name = self.plan.architecture
        stock = stock_class(name, config_class)
        if stock is None:
            raise SourceError(
                f"{self.folder} was converted from a {name}, which transformers {transformers.__version__} does "
                "not have; install the version it was converted with."
            )
        try:
            with limited():
                return stock, config_class.from_dict(copy.deepcopy(self.source_config))
        except Exception as error:  # a configuration raises what it likes
            raise SourceError(
                f"{self.folder / RECORD} is damaged: source_config: {brief(error)}. Convert the source again."
            ) from error

    def history(self) -> str:
        """What was done, in words that follow "was"."""
        plan, sites = self.plan, len(self.plan.converted)
        done = f"converted by normswap {self.version}: {plan.request.words()} at {sites} sites ({plan.claim})"
        if "training" not in self.raw:
            return done
        tokens = self.raw["training"].get("tokens")
        return f"{done}, and fine-tuned on {tokens} tokens"


def _at(raw: dict[str, Any], place: str) -> Any:
    """What stands at a place with dots, an empty object where nothing does."""
    found: Any = raw
    for key in place.split("."):
        found = found.get(key, {}) if isinstance(found, dict) else None
    return found


def write_record(folder: Path, record: Mapping[str, Any], name: str = RECORD) -> None:
    """Write `normswap.json`, or a file of another name: the version of normswap, and the rest."""
    from normswap import __version__

    text = json.dumps({"normswap": __version__, **record}, indent=1)
    (folder / name).write_text(text + "\n", encoding="utf-8")


def stock_class(name: str, config_class: type[PretrainedConfig]) -> type[PreTrainedModel] | None:
    """The model class `name` of transformers, None if it has none of that name for this configuration."""
    # classes that transformers does not export at the top live in the module beside their configuration's
    modules = [transformers.__name__]
    if config_class.__module__.startswith("transformers."):
        modules.append(config_class.__module__.replace(".configuration_", ".modeling_"))
    for module in modules:
        try:
            found = getattr(importlib.import_module(module), name, None)
        except Exception:  # what a library lacks that the class needs
            continue
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    return None
