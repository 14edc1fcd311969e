"""What every test shares: no network, one thread per worker, the trained checkpoints."""

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))  # coverage.py and its sweep

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: its kernels run on the CPU

CHECKPOINTS = Path(__file__).parent / "checkpoints"


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Small models gain nothing from threads, and two workers would fight over the cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoints() -> Path:
    """The folder of the trained checkpoints: `gpt2-shakespeare`, `gpt_neox-shakespeare`, `llama-shakespeare`."""
    return CHECKPOINTS


@pytest.fixture(scope="session")
def small(tmp_path_factory, checkpoints) -> dict[str, Path]:
    """Two of the trained checkpoints' kinds with two layers and less of all, random, and their tokenizers."""
    sizes = {
        "gpt2": dict(n_layer=2, n_embd=40, n_head=2),
        "llama": dict(num_hidden_layers=2, hidden_size=40, intermediate_size=80, num_attention_heads=2,
                      num_key_value_heads=2, head_dim=20),
    }  # fmt: skip
    found = {}
    for name, size in sizes.items():
        source, folder = checkpoints / f"{name}-shakespeare", tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source, **size))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
        found[name] = folder
    return found
