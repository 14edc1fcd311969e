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
