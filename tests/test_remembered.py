"""What is worked out once and looked up later is what working it out again would give."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import normswap
from models import tiny
from nets import WIDTH, Net, ids, ready
from normswap.norms.probe import find_norms
from normswap.observe.alike import alike
from normswap.observe.inputs import example_inputs
from normswap.observe.run import observe
from normswap.understand.normmap import find_sites

X, N = torch.empty(3, 4, device="meta"), torch.ones(3, 4, dtype=torch.int64, device="meta")
CALLS = [
    (F.linear, (X, torch.empty(5, 4, device="meta")), {}),
    (torch.add, (N, 1), {}),
    (torch.add, (N, 1.0), {}),
    (torch.add, (N, True), {}),
    (torch.sum, (X, 0), {}),
    (torch.sum, (X,), {"dim": 0, "keepdim": True}),
    (torch.mean, (X.t(), -1), {}),
    (torch.relu, (X.t(),), {}),
    (torch.cat, ([X, X], 1), {}),
    (torch.cat, ([X, X], 0), {}),
    (torch.Tensor.contiguous, (X.t(),), {}),
]


def test_calls_alike_give_tensors_alike():
    for _ in range(2):
        for function, args, kwargs in CALLS:
            expected, found = function(*args, **kwargs), alike(function, args, kwargs)
            assert (found.shape, found.stride(), found.dtype) == (expected.shape, expected.stride(), expected.dtype)
            assert found.is_meta and found.untyped_storage()._cdata != X.untyped_storage()._cdata
    a, b = (alike(torch.relu, (X,), {}) for _ in range(2))
    assert a is not b and a.untyped_storage()._cdata != b.untyped_storage()._cdata


def test_views_stay_views_and_writes_are_made():
    for _ in range(3):
        assert alike(torch.Tensor.view, (X, (12,)), {}).untyped_storage()._cdata == X.untyped_storage()._cdata
        assert alike(torch.Tensor.contiguous, (X,), {}) is X
        y = torch.empty(3, device="meta")
        before = y._version
        assert alike(torch.Tensor.add_, (y, 1), {}) is y and y._version == before + 1
        with pytest.raises(RuntimeError):
            alike(torch.add, (X, torch.empty(7, device="meta")), {})


class OfAnObject(nn.Module):
    """Which norm it is stands in no number of its own."""

    def __init__(self, centred: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.options = {"centred": centred}

    def forward(self, x):
        return (
            F.layer_norm(x, (WIDTH,), self.weight) if self.options["centred"] else F.rms_norm(x, (WIDTH,), self.weight)
        )


def test_norms_that_an_object_tells_apart_are_told_apart():
    for centred in (True, False, True):
        net = Net()
        net.first.norm = OfAnObject(centred)
        net, inputs = ready(net), {"ids": ids(2, 5)}
        found = find_norms(net, observe(net, inputs)).specs
        assert found["first.norm"].kind == ("layernorm" if centred else "rmsnorm")


def test_a_forward_that_is_replaced_is_tried_again(monkeypatch):
    model = tiny("gpt2")
    assert {spec.kind for _, spec in find_sites(model)} == {"layernorm"}
    monkeypatch.setattr(nn.LayerNorm, "forward", lambda self, x: F.rms_norm(x, self.normalized_shape, self.weight))
    assert {spec.kind for _, spec in find_sites(model)} == {"rmsnorm"}


def test_inputs_are_made_again_for_a_model_that_has_changed():
    model = tiny("gpt2")
    first = example_inputs(model)
    first["input_ids"].zero_()  # the caller's own
    assert example_inputs(model)["input_ids"].any()
    size = first["input_ids"].shape[1]
    model.register_parameter("extra", nn.Parameter(torch.zeros(size)))  # a size that no axis may be taken for
    assert size not in example_inputs(model)["input_ids"].shape


@pytest.mark.parametrize("scale", [2.0, 3.0, 2.0])
def test_factors_of_one_form_are_measured_each(scale):
    class Scaled(Net):
        def forward(self, ids):
            u = self.embed(ids) * scale
            return self.head(self.last(self.second(self.first(u))))

    net = ready(Scaled()).double()
    plan = normswap.plan(net, norm="rmsnorm", inputs={"ids": ids(2, 5)})
    assert plan.claim == "exact" and len(plan.converted) == 3
    normswap.convert_model(net, plan=plan, inputs={"ids": ids(2, 5)})
