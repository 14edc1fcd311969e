"""The sweep over moved models finds what is wrong with one that was moved wrongly."""

import pytest
import torch
from torch import nn

from normswap.understand.normmap import NormMap
from sweep import targets
from sweep.place import Wrong, compare, moved_sums
from sweep.placement_table import summary, summary_lines, table_lines
from test_slots import Layer, Net


class MovedLayer(Layer):
    def __init__(self, closed: bool, skip: float):
        super().__init__(in_place=False)
        self.out = nn.LayerNorm(16, elementwise_affine=False) if closed else nn.Identity()
        self.skip = skip

    def forward(self, x, times=1):
        return self.out(self.skip * x + self.linear(self.norm.weight * x + self.norm.bias))


class MovedNet(Net):
    """`Net` as a plan to `post` has to make it, or with a mistake in its second layer."""

    def __init__(self, closed: bool = True, skip: float = 1.0):
        super().__init__()
        self.enter = nn.LayerNorm(16, elementwise_affine=False)
        self.layers = nn.ModuleList([MovedLayer(True, 1.0), MovedLayer(closed, skip)])
        self.load_state_dict(example().state_dict())

    def forward(self, x, times=1):
        x = self.enter(self.embed(x))
        for layer in self.layers:
            x = layer(x)
        return {"logits": self.head(self.norm.weight * x + self.norm.bias)}


class Original(Net):
    def forward(self, x, times=1):
        return {"logits": super().forward(x, times)}


def example() -> Net:
    model = Original()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) + 0.3)
    return model


@pytest.fixture
def original():
    model = example().double()
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    return model, {"x": x}, NormMap.of(model, {"x": x})


def placement(model, normmap):
    return targets.normalised(model, normmap, targets.raw_streams(normmap))


def test_a_model_moved_rightly_is_confirmed(original):
    model, inputs, before = original
    moved = MovedNet().double()
    assert len(moved_sums(before, NormMap.of(moved, inputs))) == 2
    found = compare(model, moved, before, placement(model, before), [inputs])
    assert found["error"] < 1e-13 and found["gradient_error"] < 1e-12  # 1e-15
    assert found["checked"] == len(list(model.parameters()))


def test_another_scale_is_seen_in_outputs_and_gradients(original):
    model, inputs, before = original
    moved = MovedNet(skip=1.001).double()
    assert len(moved_sums(before, NormMap.of(moved, inputs))) == 2
    found = compare(model, moved, before, placement(model, before), [inputs])
    assert found["error"] > 1e-5 and found["gradient_error"] > 1e-5


def test_sums_without_a_norm_are_seen_in_the_second_trace(original):
    model, inputs, before = original
    first, _ = [block.add for block in before.streams[0].blocks]
    assert moved_sums(before, NormMap.of(MovedNet(closed=False).double(), inputs)) == {first}
    assert moved_sums(before, NormMap.of(model, inputs)) == set()


def test_other_sums_are_seen_in_the_second_trace(original):
    model, inputs, before = original
    with pytest.raises(Wrong, match="no stream with the 2 sums from layers.0 to layers.1"):
        moved_sums(before, NormMap.of(model, inputs | {"times": 2}))


def test_records_make_a_table():
    confirmed = {
        "streams": 2,
        "asked": 8,
        "moved": 4,
        "error": 1e-15,
        "gradient_error": 1e-14,
        "checked": 9,
        "class": "A",
    }
    records = [
        {"type": "a", "status": "inspected", "placement": "post", "result": "confirmed", **confirmed},
        {
            "type": "b",
            "status": "inspected",
            "placement": "post",
            "result": "refused",
            "refused": {"x": ["x: no", "_: no"]},
        },
        {"type": "c", "status": "inspected", "placement": "post", "result": "WRONG", "why": "off | by 1"},
        {"type": "d", "status": "missing", "why": "no class"},
    ]
    found = summary(records)
    assert found["results"] == {"confirmed": 1, "refused": 1, "WRONG": 1}
    assert found["whole"] == 0 and found["moved"] == 4 and found["worst gradient"] == 1e-14
    assert found["reasons"] == [{"reason": "_: no", "types": ["b"]}]
    assert [bad["type"] for bad in found["bad"]] == ["c"]
    text = "\n".join([*summary_lines(found), *table_lines(records)])
    assert "| 1 | 1 | 1 | 0 | 0 | 0 |" in text and "| c |  | WRONG |  |  |  | off / by 1 |" in text
