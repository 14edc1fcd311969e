"""Blocks evaluated by interception against the same placements written by hand: outputs and gradients, float64."""

import pytest
import torch
from torch import nn

from normswap.errors import VerificationError
from normswap.understand.normmap import NormMap
from normswap.understand.transfer import Prober
from normswap.verification.precision import LiftFloat32
from placement_families import Norm
from placement_references import reference
from sweep import targets
from sweep.slots import Placement, Slots, placed
from test_placement_references import POST, RAW, prepared

TOLERANCE = 1e-10  # 1e-14 is measured


def numbers(count: int) -> list[float]:
    return [0.7 + 0.15 * i for i in range(count)]


def compare(model, inputs, normmap, placement, expected) -> None:
    """Logits, and the gradient of each parameter that has one."""
    parameters = dict(model.named_parameters())
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def gradients(logits):
        found = torch.autograd.grad((weights * logits).sum(), list(parameters.values()), allow_unused=True)
        return {name: g for name, g in zip(parameters, found, strict=True) if g is not None}

    with placed(model, normmap, placement):
        logits = model(**inputs).logits
    assert (logits - expected).abs().max() < TOLERANCE * expected.abs().max()
    ours, theirs = gradients(logits), gradients(expected)
    largest = max(gradient.abs().max() for gradient in theirs.values())
    checked = 0
    for name in theirs.keys() | ours.keys():
        a, b = (found.get(name, torch.zeros_like(parameters[name])) for found in (ours, theirs))
        size = b.abs().max()
        if max(size, a.abs().max()) > 1e-12 * largest:  # those of key biases are rounding: attention does not see them
            checked += 1
            assert (a - b).abs().max() < TOLERANCE * size, name
    assert checked > 5


def observed(name):
    model, inputs = prepared(name)
    model.requires_grad_(True)
    return model, inputs, NormMap.of(model, inputs)


def by_value(normmap, scales):
    """The scale of each step, by the value that the step adds to."""
    found = {}
    for info, own in zip(normmap.streams, scales, strict=True):
        before = info.found.start
        for scale, step in zip(own, targets.steps(normmap, info.found), strict=True):
            found[before], before = scale, step[-1].result
    return found


def scales_of(normmap):
    return [numbers(len(targets.steps(normmap, info.found))) for info in normmap.streams]


@pytest.mark.parametrize("name", RAW)
def test_raw_streams_become_normalised_ones(name):
    model, inputs, normmap = observed(name)
    scales = scales_of(normmap)
    with LiftFloat32():
        expected = reference(model, inputs, "post", scales)
        streams = list(targets.raw_streams(normmap))
        assert len(streams) == len(scales)
        compare(
            model, inputs, normmap, targets.normalised(model, normmap, streams, by_value(normmap, scales)), expected
        )


@pytest.mark.parametrize("moved", [[True, True, False, False], [False, True, False, True]])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_some_blocks_move(name, moved):
    model, inputs, normmap = observed(name)
    scales = scales_of(normmap)
    (stream,) = targets.raw_streams(normmap)
    only = {block.add for block, moves in zip(stream.blocks, moved, strict=True) if moves}
    with LiftFloat32():
        expected = reference(model, inputs, "mixed", scales, moved=[moved])
        placement = targets.normalised(model, normmap, [stream], by_value(normmap, scales), only=only)
        compare(model, inputs, normmap, placement, expected)


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_first_norms_may_stay(name):
    model, inputs, normmap = observed(name)
    scales = scales_of(normmap)
    with LiftFloat32():
        expected = reference(model, inputs, "keel", scales)
        streams = targets.raw_streams(normmap)
        placement = targets.normalised(model, normmap, streams, by_value(normmap, scales), keep_n_in=True)
        compare(model, inputs, normmap, placement, expected)


@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_branches_get_norms(name):
    model, inputs, normmap = observed(name)
    norm = Norm(True, 1e-5, gain=0.3)
    scales = scales_of(normmap)
    norms = [[norm] * len(own) for own in scales]
    streams = [info.found for info in normmap.streams]
    with LiftFloat32():
        expected = reference(model, inputs, "sandwich", norms=norms)
        compare(model, inputs, normmap, targets.sandwiched(normmap, streams, norm), expected)
        expected = reference(model, inputs, "reordered", scales, norms)
        placement = targets.reordered(model, normmap, streams, norm, by_value(normmap, scales))
        compare(model, inputs, normmap, placement, expected)


@pytest.mark.parametrize("name", POST)
def test_normalised_streams_become_raw_ones(name):
    model, inputs, normmap = observed(name)
    streams = [info.found for info in normmap.streams]
    scales = [numbers(len(stream.blocks)) for stream in streams]
    by_norm = {}
    for stream, own in zip(streams, scales, strict=True):
        first = stream.embedding[-1:] or [None]
        by_norm |= dict(zip([*first, *(block.n_out[0] for block in stream.blocks)], own, strict=False))
    with LiftFloat32():
        expected = reference(model, inputs, "pre", scales)
        compare(model, inputs, normmap, targets.raw(model, normmap, streams, by_norm), expected)
        expected = reference(model, inputs, "pre-normalized-skip")
        compare(model, inputs, normmap, targets.normalised_skip(model, normmap, streams), expected)


class Layer(nn.Module):
    def __init__(self, in_place: bool):
        super().__init__()
        self.in_place = in_place
        self.norm = nn.LayerNorm(16)
        self.linear = nn.Linear(16, 16)

    def forward(self, x, times=1):
        for _ in range(times):
            y = self.linear(self.norm(x))
            if self.in_place:
                y += x
                x = y
            else:
                x = y + x
        return x


class Net(nn.Module):
    def __init__(self, in_place: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(5, 16)
        self.layers = nn.ModuleList([Layer(in_place) for _ in range(2)])
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 7)

    def forward(self, x, times=1):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x, times)
        return self.head(self.norm(x))


def test_sums_in_place_are_written_to():
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    results = []
    for in_place in (False, True):
        model = Net(in_place).double()
        normmap = NormMap.of(model, {"x": x})
        placement = targets.normalised(model, normmap, targets.raw_streams(normmap))
        assert all(bool(normmap.trace.operations[add].mutated) == in_place for add in placement.blocks)
        with placed(model, normmap, placement):
            output = model(x)
        output.sum().backward()
        results.append((output, model.embed.weight.grad))
    assert torch.allclose(*(output for output, _ in results), rtol=1e-13)
    assert torch.allclose(*(gradient for _, gradient in results), rtol=1e-12)
    assert (results[0][0] - Net().double()(x)).abs().max() > 0.1


def test_one_expression_in_several_turns_is_told_apart():
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    model = Net().double()
    normmap = NormMap.of(model, {"x": x, "times": 2})
    (stream,) = [info.found for info in normmap.streams]
    assert len(stream.blocks) == 4
    seen = []
    placement = Placement(
        {block.add: Slots(n_out=lambda x, i=i: seen.append(i) or x) for i, block in enumerate(stream.blocks)}
    )
    with placed(model, normmap, placement):
        output = model(x, times=2)
        assert seen == [0, 1, 2, 3]
        model(x, times=2)  # a second pass begins anew
    assert seen == [0, 1, 2, 3] * 2
    assert torch.equal(output, model(x, times=2))
    with placed(model, normmap, Placement({stream.blocks[1].add: Slots(branch=0.0)})):
        changed = model(x, times=2)
    layer = model.layers
    expected = layer[1](layer[0](model.embed(x)), times=2)
    assert torch.allclose(changed, model.head(model.norm(expected)), rtol=1e-13)


class Pooled(Net):
    def forward(self, x, times=1):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x, times)
        return self.head(self.norm(x.mean(1)))


def test_a_norm_behind_a_mean_over_tokens_stays_a_norm():
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    for model, final in ((Net().double(), ["norm"]), (Pooled().double(), [])):
        normmap = NormMap.of(model, {"x": x})
        (stream,) = targets.raw_streams(normmap)
        assert targets.final_norms(normmap, stream) == final


@pytest.mark.parametrize(
    ("function", "answer"),
    [
        (lambda x: x.transpose(1, 2), True),
        (lambda x: 3 * x[:, 0], True),
        (lambda x: x.mean(1), False),
        (lambda x: nn.functional.avg_pool1d(x, 2), False),
        (lambda x: x.roll(1, 0) + x, False),
        (torch.relu, False),
    ],
)
def test_what_rearranges_values(function, answer):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(5, 16)

        def forward(self, x):
            return function(self.embed(x))

    trace = NormMap.of(Model(), {"x": torch.randn(3, 4, 5)}).trace
    after = trace.operations[1:]
    assert after and all(Prober(trace, 16).rearranges(op, 0) for op in after) == answer


def test_a_run_that_is_not_the_traces_is_refused():
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    model = Net().double()
    normmap = NormMap.of(model, {"x": x})
    placement = targets.normalised(model, normmap, targets.raw_streams(normmap))
    with pytest.raises(VerificationError, match="more often"), placed(model, normmap, placement):
        model(x, times=2)
    with pytest.raises(VerificationError, match="shape"), placed(model, normmap, placement):
        model(x[:2])
    with pytest.raises(VerificationError, match="not met"), placed(model, normmap, placement):
        model(x, times=0)
    with pytest.raises(VerificationError, match="no residual sum"), placed(model, normmap, Placement({0: Slots()})):
        model(x)
