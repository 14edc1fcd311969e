"""A small net written by hand, to put one thing into that has fooled an analysis; and what must hold of it then."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import normswap
from models import randomise
from normswap.apply.live import apply_plan
from normswap.errors import RefusedError
from normswap.understand.normmap import find_sites

WIDTH, VOCAB = 12, 20


class Block(nn.Module):
    """`x + down(gelu(up(norm(x))))`"""

    def __init__(self, hidden=18, norm=None, bias=True):
        super().__init__()
        self.norm = norm or nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, hidden, bias=bias)
        self.down = nn.Linear(hidden, WIDTH, bias=bias)

    def branch(self, x):
        return self.down(F.gelu(self.up(self.norm(x))))

    def forward(self, x):
        return x + self.branch(x)


class Net(nn.Module):
    """Embedding, blocks, a last norm and a head; `between` is what a test puts into the stream."""

    def __init__(self, block=Block, norm=nn.LayerNorm):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.first = block()
        self.second = block()
        self.last = norm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)

    def between(self, x, mask):
        return x

    def forward(self, ids, mask=None):
        x = self.first(self.embed(ids))
        x = self.second(self.between(x, mask))
        return self.head(self.last(x))


def ready(model):
    return randomise(model).double().eval()


def ids(*shape, seed=0):
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def relative(found, expected):
    return float((found - expected).abs().max() / expected.std())


def check_exact(model, observed=None, others=(), **request):
    """Convert a copy, compare it with the original on all inputs, and return it with its plan."""
    observed = observed or dict(ids=ids(3, 5))
    request = request or dict(norm="rmsnorm")
    plan = normswap.plan(model, inputs=observed, **request)
    converted = apply_plan(copy.deepcopy(model), plan)
    with torch.no_grad():
        for inputs in (observed, *(others or [dict(ids=ids(2, 7, seed=1))])):
            # measured: 1e-16 to 5e-15
            assert relative(converted(**inputs), model(**inputs)) < 1e-10
    return converted, plan


def kinds(model, observed=None):
    return [spec.kind for _, spec in find_sites(model, observed or dict(ids=ids(3, 5)))]


def check_refused(model, words, observed=None, **request):
    """With weights alone the request is refused for the reason in `words`, and the model is as it was."""
    observed = observed or dict(ids=ids(3, 5))
    request = {"explicit": "never", **(request or dict(norm="rmsnorm"))}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RefusedError) as caught:
        normswap.plan(model, inputs=observed, **request)
    assert caught.value.refusals
    for word in words:
        assert word in str(caught.value), word
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return caught.value
