"""Converted adapters in the folder that is to be published, `adapters/NAME`, and what the record says of them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from normswap.adapters.carry import Carried
from normswap.adapters.folder import CONFIG, WEIGHTS
from normswap.adapters.measure import AdapterProof, measure
from normswap.calibration.data import Progress
from normswap.checkpoint.saving import save_tensors
from normswap.checkpoint.source import Source
from normswap.errors import DestinationError, PlanError
from normswap.planning.plans import Plan
from normswap.verification.proof import VerifyMode

#: a folder of its own: transformers loads an adapter that lies beside a model by itself
ADAPTERS = "adapters"


def publish_adapters(
    carried: Sequence[Carried],
    source: Source,
    plan: Plan,
    folder: Path,
    verify: VerifyMode,
    text: str | Path | None,
    progress: Progress,
    base: str | None = None,
) -> list[dict[str, Any]]:
    """Write the adapters into the unpublished `folder` and measure them there; what the record keeps of each.

    Args:
        base: the name that the converted model will have on the Hub, for the adapters' settings; None: it has none yet.

    Raises:
        VerificationError: one does not do on the converted model what it did on the source.
        PlanError: a value does not fit the dtype that it is stored in.
        DestinationError: a file cannot be written.
    """
    places = {one.adapter.name: folder / ADAPTERS / one.adapter.name for one in carried}
    hashes = {one.adapter.name: _write(one, places[one.adapter.name], base) for one in carried}
    proofs = measure(source, plan, folder, carried, places, verify, text, progress)
    return [_recorded(one, hashes[one.adapter.name], proofs.get(one.adapter.name)) for one in carried]


def _write(one: Carried, place: Path, base: str | None) -> dict[str, str]:
    """The adapter's two files; their SHA-256."""
    shutil.rmtree(place, ignore_errors=True)  # settings of the same name that lay beside the source's weights
    tensors = {key: _rounded(one, key, tensor) for key, tensor in one.tensors.items()}
    config = {**one.config, "base_model_name_or_path": base}
    try:
        place.mkdir(parents=True)
        (place / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        save_tensors(tensors, place / WEIGHTS, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise DestinationError(f"{place}: cannot be written: {error}. Free the space and run again.") from error
    return {name: hashlib.sha256((place / name).read_bytes()).hexdigest() for name in (CONFIG, WEIGHTS)}


def _rounded(one: Carried, key: str, tensor: torch.Tensor) -> torch.Tensor:
    rounded = tensor.to(one.dtypes[key]).contiguous()
    if not rounded.isfinite().all():
        raise PlanError(
            f"the adapter {one.adapter.name}: {key} has values up to {tensor.abs().max().item():.3g}, which do not fit "
            f"{rounded.dtype}: store the adapter as float32."
        )
    return rounded


def _recorded(one: Carried, hashes: dict[str, str], proof: AdapterProof | None) -> dict[str, Any]:
    return {
        "name": one.adapter.name,
        "source": one.adapter.digest,
        "files": hashes,
        "tensors": len(one.tensors),
        "changed": list(one.changed),
        "biased": bool(one.config.get("lora_bias")) and not one.adapter.config.get("lora_bias"),
        "measured": None if proof is None else proof.model_dump(mode="json"),
    }


def leave_adapters(record: Mapping[str, Any], folder: Path) -> tuple[str, ...]:
    """Take what was copied of a converted folder's adapters out of `folder`; where they lay.

    Args:
        record: of the converted folder.
    """
    names = [str(entry.get("name")) for entry in record.get("adapters", ())]
    places = {name: (folder / ADAPTERS / name).resolve() for name in names}
    for place in places.values():
        if place.parent == (folder / ADAPTERS).resolve():  # a record may say anything
            shutil.rmtree(place, ignore_errors=True)
    with suppress(OSError):  # others may lie beside them
        (folder / ADAPTERS).rmdir()
    return tuple(f"{ADAPTERS}/{name}" for name in names)
