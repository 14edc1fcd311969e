"""Under LiftFloat32 a float64 model computes in float64 throughout."""

from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models import CAUSAL, tiny
from normswap.verification.precision import LiftFloat32


class Dtypes(TorchDispatchMode):
    """Counts the floating results of every operation, and notes the operations whose result is not float64."""

    def __init__(self):
        super().__init__()
        self.checked, self.low = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
                self.checked += 1
                if leaf.dtype not in (torch.float64, torch.complex128):
                    self.low.append((str(function), leaf.dtype))
        return result


def run(model, lift):
    ids = torch.randint(3, 90, (2, 10), generator=torch.Generator().manual_seed(0))
    dtypes = Dtypes()
    with torch.no_grad(), LiftFloat32() if lift else nullcontext(), dtypes:
        logits = model(input_ids=ids).logits
    return logits, dtypes


@pytest.mark.parametrize("model_type", CAUSAL)
def test_every_intermediate_is_float64(model_type):
    logits, dtypes = run(tiny(model_type).double(), lift=True)
    assert dtypes.checked > 100
    assert dtypes.low == []
    assert logits.dtype == torch.float64


@pytest.mark.parametrize("model_type", ["llama", "olmo", "mpt"])
def test_without_lifting_they_are_not(model_type):
    """Guards the test above: these models do compute in float32 inside."""
    lifted, _ = run(tiny(model_type).double(), lift=True)
    plain, dtypes = run(tiny(model_type).double(), lift=False)
    assert dtypes.low
    assert 1e-12 < (lifted - plain).abs().max() < 1e-4


CASTS = {
    "float": lambda x: x.float(),
    "to": lambda x: x.to(torch.float32),
    "to keyword": lambda x: x.to(dtype=torch.float32),
    "to device and dtype": lambda x: x.to("cpu", torch.float32),
    "to another tensor": lambda x: x.to(OUTSIDE),
    "type": lambda x: x.type(torch.float32),
    "type by name": lambda x: x.type("torch.FloatTensor"),
    "type by class": lambda x: x.type(torch.FloatTensor),
    "type_as": lambda x: x.type_as(OUTSIDE),
    "softmax": lambda x: torch.softmax(x, -1, dtype=torch.float32),
    "sum": lambda x: x.sum(-1, dtype=torch.float32),
    "zeros_like": lambda x: torch.zeros_like(x, dtype=torch.float32),
    "new_ones": lambda x: x.new_ones(3, dtype=torch.float32),
    "arange": lambda x: torch.arange(0, 8, 2, dtype=torch.float32),
    "tensor": lambda x: torch.tensor([0.5], dtype=torch.float32),
    "default dtype": lambda x: torch.tensor([0.5]),
    "integer": lambda x: torch.arange(3).float(),
    "promotion": lambda x: x.to(torch.promote_types(torch.bfloat16, torch.float32)),
    "no autocast": lambda x: autocast_off(x),
}
OUTSIDE = torch.ones(2, dtype=torch.float32)


def autocast_off(x):
    with torch.autocast("cpu", enabled=False):
        return x.float() @ x.float().T


@pytest.mark.parametrize("cast", CASTS)
def test_casts(cast):
    x = torch.randn(2, 4, dtype=torch.float64)
    with LiftFloat32():
        assert CASTS[cast](x).dtype == torch.float64


def test_complex_rotations_are_lifted():
    x = torch.randn(2, 4, dtype=torch.float64)
    with LiftFloat32():
        assert torch.view_as_complex(x.float().reshape(2, 2, 2)).to(torch.complex64).dtype == torch.complex128


def test_values_are_not_rounded_on_the_way():
    x = torch.tensor([1 + 1e-12], dtype=torch.float64)
    with LiftFloat32():
        assert x.float().to(torch.float32).type_as(OUTSIDE).item() == x.item()


def test_half_precision_still_rounds():
    x = torch.ones(2, dtype=torch.float64)
    with LiftFloat32():
        assert x.to(torch.bfloat16).dtype == torch.bfloat16
        assert x.half().dtype == torch.float16


def test_nothing_stays_behind():
    with pytest.raises(ZeroDivisionError), LiftFloat32():
        raise ZeroDivisionError
    assert torch.get_default_dtype() == torch.float32
    assert torch.ones(1, dtype=torch.float64).float().dtype == torch.float32
