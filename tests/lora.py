"""Small models in float64, LoRA adapters that PEFT made of them, and what both compute."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import normswap
from models import tiny
from normswap.observe.run import make_eager
from normswap.verification.outputs import outputs_of


def saved(folder: Path, model_type: str, **overrides) -> Path:
    """A random model of that type in a folder; of short texts, so that measuring it on some takes no time."""
    if model_type in ("llama", "gemma2", "stablelm"):
        overrides = {"max_position_embeddings": 64, **overrides}
    tiny(model_type, **overrides).double().save_pretrained(folder)
    return folder


def adapter_of(source: Path, folder: Path, **settings) -> Path:
    """An adapter of the model in `source`, each of its values moved from where training begins."""
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = get_peft_model(opened(source), LoraConfig(**{"r": 3, **settings}), autocast_adapter_dtype=False)
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        made.save_pretrained(folder)
    return folder


def opened(folder: Path, adapter: Path | None = None) -> nn.Module:
    """The model in a folder, by the stock class or the one that lies beside it; with an adapter as PEFT loads it."""
    if (folder / "normswap.json").exists():
        model = normswap.load(folder, dtype="auto", attn_implementation="eager")
    else:
        (name,) = json.loads((folder / "config.json").read_text())["architectures"]
        model = getattr(transformers, name).from_pretrained(folder, dtype="auto", attn_implementation="eager")
    make_eager(model)  # experts one by one: the fast way is not in float64
    if adapter is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(model, str(adapter), autocast_adapter_dtype=False).get_base_model()
    return model.eval()


def logits(model: nn.Module) -> torch.Tensor:
    """In float64 throughout, casts to float32 inside the model lifted."""
    pixels = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ids = torch.arange(80).reshape(2, 40)
    inputs = {"pixel_values": pixels} if model.main_input_name == "pixel_values" else {"input_ids": ids}
    return outputs_of(model, inputs, True, "of a test")["logits"]


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / a.norm())
