"""A converted folder opened without running its code: the stock class, with the plan's structure replayed on it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from normswap.apply.live import apply_structure
from normswap.checkpoint.documents import brief
from normswap.checkpoint.folder import check_folder
from normswap.checkpoint.record import Record
from normswap.errors import NormswapError, SourceError
from normswap.limits import limited
from normswap.planning.plans import Plan


def load(folder: str | Path, **from_pretrained_kwargs: Any) -> PreTrainedModel:
    """Open the converted checkpoint in `folder`.

    Needs no `trust_remote_code`: the modelling file in the folder is not read. The class is a subclass of the stock
    one, and transformers' own loader reads the weights (shards, dtypes, device maps, conversions of keys).

    Args:
        folder: what `normswap convert` wrote.
        from_pretrained_kwargs: handed to transformers' `from_pretrained`: `dtype`, `device_map`,
            `attn_implementation`, ...

    Raises:
        SourceError: the folder has no sound `normswap.json`, or its weights are not those of the plan.
    """
    folder = Path(folder)
    if folder.is_dir():
        check_folder(folder)
    record = Record.read(folder)
    plan, (stock, config) = record.plan, record.stock()
    try:
        with limited(), torch.device("meta"):
            source = stock(copy.deepcopy(config))
            # built once beforehand, because the plan changes the configuration that loading has to start from
            config = converted_class(stock, plan)(config).config
        written, _ = PretrainedConfig.get_config_dict(folder)
        config.dtype = written.get("dtype", written.get("torch_dtype"))  # `convert --dtype` may have changed it
        model, report = converted_class(stock, plan).from_pretrained(
            folder, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **from_pretrained_kwargs
        )
    except NormswapError:
        raise
    except Exception as error:  # of transformers and torch, which raise what they like for a damaged file
        raise SourceError(
            f"{folder} cannot be opened as a {stock.__name__} with the changes of its plan: {type(error).__name__}: "
            f"{brief(error)}. Fetch it again, or convert the source again."
        ) from error
    _check(report, plan, set(source.state_dict()), folder)
    return model


def converted_class(stock: type[PreTrainedModel], plan: Plan) -> type[PreTrainedModel]:
    """A subclass of `stock`, under its name, that is built with the structure of `plan`.

    Name and module are those of `stock`: transformers decides by them how a checkpoint's keys are converted.
    """

    def __init__(self, config, *args, **kwargs):
        super(converted, self).__init__(config, *args, **kwargs)
        apply_structure(self, plan)

    def save_pretrained(self, *args, **kwargs):
        # the stock configuration would be saved, and whoever loads it would get the stock norms
        raise NormswapError(
            "a model opened by normswap.load has modules that the stock class it would be saved for does not have; "
            "to save it, load it by the folder's own code: transformers' Auto classes with trust_remote_code=True."
        )

    members = {"__init__": __init__, "__module__": stock.__module__, "__qualname__": stock.__qualname__}
    if plan.module_edits():
        members["save_pretrained"] = save_pretrained
    converted = type(stock.__name__, (stock,), members)
    return converted


def _check(report: dict[str, Any], plan: Plan, source_names: set[str], folder: Path) -> None:
    """Refuse a model in which anything is left at its initial value, or whose file holds what the plan removed.

    Tensors in the file that neither the source's class nor the plan knows (`mtp.*`) were idle in the source as well.
    """
    ours = source_names | set(plan.tensor_edits())
    wrong = {
        "missing": sorted(report["missing_keys"]),
        "of another shape": [
            f"{key} {tuple(found)}, expected {tuple(want)}" for key, found, want in report["mismatched_keys"]
        ],
        "not expected": sorted(key for key in report["unexpected_keys"] if key in ours),
    }
    found = "; ".join(f"{what}: {', '.join(keys[:5])} ({len(keys)} in all)" for what, keys in wrong.items() if keys)
    if found or report["error_msgs"]:
        raise SourceError(
            f"the weights in {folder} are not those of its plan: {found or report['error_msgs']}. "
            "Convert the source again."
        )
