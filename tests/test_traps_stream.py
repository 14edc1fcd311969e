"""What is done to a stream between norms, and has fooled an analysis before: hand-written models.

Every model is converted exactly, on inputs other than those observed, or refused with the module and the reason.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import normswap
from nets import WIDTH, Block, Net, check_exact, check_refused, ids, kinds, ready, relative
from normswap.apply.live import apply_plan

# -- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, WIDTH), (WIDTH, 5), (WIDTH, WIDTH), (2, 3 * WIDTH), (1, 1)])
def test_sequence_or_batch_of_the_streams_width(shape):
    converted, _ = check_exact(ready(Net()), dict(ids=ids(*shape)))
    assert kinds(converted) == ["rmsnorm"] * 3


@pytest.mark.parametrize("hidden", [WIDTH, 2 * WIDTH, 4 * WIDTH])
def test_square_and_multiple_weights(hidden):
    model = ready(Net(lambda: Block(hidden)))
    _, plan = check_exact(model, dict(ids=ids(WIDTH, WIDTH)))
    centred = {(edit.tensor, edit.axis, edit.groups) for edit in plan.edits if edit.edit == "centre"}
    blocks = {(f"{b}.down.{p}", 0, 1) for b in ("first", "second") for p in ("weight", "bias")}
    assert centred == blocks | {("embed.weight", 1, 1)}


def test_the_vocabulary_may_be_as_large_as_the_width():
    model = Net()
    model.embed, model.head = nn.Embedding(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
    model = ready(model)
    inputs = [dict(ids=ids(*shape, seed=2) % WIDTH) for shape in ((3, 5), (WIDTH, WIDTH))]
    plan = normswap.plan(model, norm="rmsnorm", fold=True, inputs=inputs[0])
    converted = apply_plan(copy.deepcopy(model), plan)
    with torch.no_grad():
        for batch in inputs:
            # measured: 9e-16
            assert relative(converted(**batch), model(**batch)) < 1e-10


# -- consumers that would notice -------------------------------------------------------------------------------------


class Gated(Net):
    def between(self, x, mask):
        return x * torch.sigmoid(x)


class GatedBranch(Net):
    """A gate computed from the stream itself, on a branch: the sum alone does not show it."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(WIDTH, WIDTH)

    def between(self, x, mask):
        return x + torch.sigmoid(self.gate(x)) * self.first.branch(x)


class Scaled(Net):
    """Divided by the stream's own size: an RMSNorm in the open."""

    def between(self, x, mask):
        return x + x / x.norm(dim=-1, keepdim=True)


class Sliced(Net):
    def between(self, x, mask):
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a, b + a], -1)


class Depthwise(Net):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)

    def between(self, x, mask):
        return x + self.conv(x.transpose(1, 2)).transpose(1, 2)


class LayerScaled(Net):
    """A writer's branch, once as it is and once times a gain of each channel: it cannot be both."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def between(self, x, mask):
        return x + self.scale * self.first.branch(x)


class Mixed(Net):
    def __init__(self):
        super().__init__()
        self.second.norm = nn.RMSNorm(WIDTH, eps=1e-6)


class RawOutput(Net):
    def forward(self, ids, mask=None):
        x = self.first(self.embed(ids))
        return self.head(self.last(self.second(x))), x


class Imaginary(Net):
    """The stream as the imaginary part of complex numbers, and back."""

    def between(self, x, mask):
        return x + torch.sigmoid(torch.complex(torch.zeros_like(x), x).imag)


class Activated(Net):
    """What an activation gives is no writer's to centre."""

    def between(self, x, mask):
        return x + F.relu(self.first.branch(x))


NOTICED = {
    Gated: ["embed.weight", "sigmoid in the model"],
    GatedBranch: ["embed.weight", "linear in gate"],
    Scaled: ["embed.weight", "norm in the model"],
    Sliced: ["embed.weight", "chunk in the model"],
    Depthwise: ["embed.weight", "conv1d in conv"],
    LayerScaled: ["first.down", "mul in the model scales it by scale"],
    Mixed: ["embed.weight", "rmsnorm second.norm is not invariant to shifts"],
    RawOutput: ["embed.weight", "output of the model"],
    Imaginary: ["embed.weight", "in the model would notice"],
    Activated: ["relu in the model"],
}


@pytest.mark.parametrize("model", NOTICED, ids=lambda cls: cls.__name__)
def test_what_would_notice_a_shift_is_named(model):
    error = check_refused(ready(model()), NOTICED[model])
    assert "last" in dict(error.refusals) and "No site of this model can be converted" in str(error)


# after what notices, one subtraction serves the second block's norm and the last
SERVED = [Gated, GatedBranch, Scaled, Sliced, Depthwise, LayerScaled, Imaginary, Activated]


@pytest.mark.parametrize("model", SERVED, ids=lambda cls: cls.__name__)
def test_where_weights_cannot_one_subtraction_serves_the_norms_behind_it(model):
    converted, plan = check_exact(ready(model()), norm="rmsnorm", partial=True)
    assert [edit.module for edit in plan.edits if edit.edit == "centre_input"] == ["second"]
    assert kinds(converted)[-2:] == ["rmsnorm"] * 2


@pytest.mark.parametrize("model", NOTICED, ids=lambda cls: cls.__name__)
def test_in_front_of_each_norm_a_mean_can_always_be_subtracted(model):
    model = ready(model())
    plan = normswap.plan(model, norm="rmsnorm", explicit="always", inputs=dict(ids=ids(3, 5)))
    assert not plan.refused
    converted = apply_plan(copy.deepcopy(model), plan)
    with torch.no_grad():
        found, expected = (m(ids(2, 7, seed=1)) for m in (converted, model))
    for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (found, expected)), strict=True):
        # measured: 3e-16 to 4e-15
        assert relative(a, b) < 1e-10


def test_one_norm_alone_gains_nothing_by_a_subtraction():
    """RawOutput's norms can each be had so only, which is what a LayerNorm does."""
    check_refused(ready(RawOutput()), ["output of the model", "--explicit always"], norm="rmsnorm", explicit="shared")


class LayerScaledTwice(Net):
    """The same scale on both branches, which each have their writer, as a layer's `lambda` may be shared."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, ids, mask=None):
        x = self.embed(ids)
        x = x + self.scale * self.first.branch(x)
        x = x + self.scale * self.second.branch(x)
        return self.head(self.last(x))


def test_a_scale_of_each_channel_folds_into_the_writer_behind_it():
    converted, plan = check_exact(ready(LayerScaledTwice()), norm="rmsnorm", explicit="never")
    assert kinds(converted) == ["rmsnorm"] * 3
    assert torch.equal(converted.scale, torch.ones_like(converted.scale))
    scaled = {edit.tensor for edit in plan.edits if edit.edit == "fold_gain"}
    assert scaled == {f"{b}.down.{p}" for b in ("first", "second") for p in ("weight", "bias")}
    both, _ = check_exact(ready(LayerScaledTwice()), norm="rmsnorm", fold=True)


class ScaleUsedTwice(LayerScaledTwice):
    """The scale also does something else, so it cannot become one."""

    def forward(self, ids, mask=None):
        return super().forward(ids) * self.scale.sum()


def test_a_scale_that_is_used_otherwise_does_not_fold():
    check_refused(ready(ScaleUsedTwice()), ["scale", "used for something else"])
    _, plan = check_exact(ready(ScaleUsedTwice()), norm="rmsnorm", explicit="always")
    assert "scale" not in plan.tensor_edits()


class OutputToo(Net):
    """A module's own output counts as one of the model's, whoever reads it."""

    def __init__(self):
        super().__init__()
        self.look = nn.Linear(WIDTH, 2)

    def forward(self, ids, mask=None):
        x = self.first(self.embed(ids))
        return dict(logits=self.head(self.last(self.second(x))), pooled=torch.tanh(self.look(x)))


def test_a_second_output_read_from_the_raw_stream_counts():
    check_refused(ready(OutputToo()), ["linear in look"])


class Softmaxed(Net):
    """Softmax over the channels does not see their mean."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)

    def between(self, x, mask):
        return x + self.mix(x.softmax(-1))


class Rearranged(Net):
    """Transposed, flipped along the channels, rolled in time, averaged over positions: the mean passes through all."""

    def between(self, x, mask):
        y = x.transpose(1, 2).flip(1).contiguous()
        y = y.permute(0, 2, 1).roll(1, dims=1)
        return x + 0.5 * y + x.mean(1, keepdim=True).expand_as(x) - y.cumsum(1)


class Multiplied(Net):
    """The embedding multiplier of Gemma, as a constant tensor, and a mask on the stream."""

    def between(self, x, mask):
        x = x * torch.tensor(WIDTH**0.5, dtype=x.dtype)
        return x if mask is None else x * mask[..., None].to(x.dtype)


@pytest.mark.parametrize("model", [Softmaxed, Rearranged, Multiplied], ids=lambda cls: cls.__name__)
def test_what_does_not_notice_is_no_obstacle(model):
    converted, _ = check_exact(ready(model()))
    assert kinds(converted) == ["rmsnorm"] * 3


class Gathered(Net):
    """Positions put in another order by an index that is spread over the channels (V-JEPA's predictor)."""

    def between(self, x, mask):
        order = torch.arange(x.shape[1] - 1, -1, -1)[None, :, None].repeat(len(x), 1, WIDTH)
        return x + x.gather(1, order)


class StridedIndex(Net):
    """An index of one entry cut out of a longer one, whose bytes do not lie as those of a new one would."""

    def between(self, x, mask):
        return x + x.index_select(1, torch.arange(4)[::2][1:])


def test_an_index_cut_out_of_another_is_told_by_its_value():
    check_exact(ready(StridedIndex()))


class GatheredChannels(Net):
    """The index differs from channel to channel: what it picks has another mean."""

    def between(self, x, mask):
        order = (torch.arange(x.shape[1])[:, None] + torch.arange(WIDTH)) % x.shape[1]
        return x + x.gather(1, order.expand(x.shape))


@pytest.mark.parametrize("length", [5, 40])
def test_an_index_for_all_channels_alike_passes_a_mean_on(length):
    """A long sequence is tried on a short one, with the index cut to size."""
    check_exact(ready(Gathered()), dict(ids=ids(3, length)))
    check_refused(ready(GatheredChannels()), ["gather in the model"], dict(ids=ids(3, length)))


class Scattered(Net):
    """Features of another kind take the places that a mask names, as a picture's take those of its tokens."""

    def __init__(self):
        super().__init__()
        self.features = nn.Parameter(torch.randn(40, WIDTH))

    def between(self, x, mask):
        return x.masked_scatter(mask[..., None] == 0, torch.tanh(self.features[: int((mask == 0).sum())]))


@pytest.mark.parametrize("left", [0, 1, 9])
def test_features_scattered_by_a_mask_are_not_overlooked(left):
    """Found wrong: tried on fewer features than the mask has places, the operation ran with an empty mask alone."""
    mask = torch.zeros(4, 9, dtype=torch.long)
    mask[:, :left] = 1  # of none, some or all of the ids the observed pass has anything to see
    model, observed = ready(Scattered()), dict(ids=ids(4, 9), mask=mask)
    check_refused(model, ["second.norm", "in the model"], observed)
    other = dict(ids=ids(4, 9, seed=3), mask=torch.ones(4, 9, dtype=torch.long).index_fill(1, torch.tensor([2]), 0))
    check_exact(model, observed, [other], norm="rmsnorm", partial=True)


class FirstOfTuple(Net):
    """A module that gives out more than the stream; the norms behind it are served by one subtraction there."""

    class Look(nn.Module):
        def forward(self, x):
            return torch.tanh(x), x.sum()

    def __init__(self):
        super().__init__()
        self.look = self.Look()
        self.extra = nn.LayerNorm(WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, ids, mask=None):
        x, _ = self.look(self.embed(ids))
        x = x + self.mix(self.extra(x))
        return self.head(self.last(self.second(x)))


def test_the_first_of_several_outputs_is_centred():
    _, plan = check_exact(ready(FirstOfTuple()), norm="rmsnorm")
    assert [edit.module for edit in plan.edits if edit.edit == "centre_output"] == ["look"]


# -- masks and constants: what they were in the observed pass says nothing about the next ------------------------------

PADDED = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
FULL = torch.ones_like(PADDED)


def test_a_mask_that_multiplies_the_stream():
    model = ready(Multiplied())
    observed = dict(ids=ids(3, 5), mask=FULL)
    check_exact(model, observed, others=[dict(ids=ids(3, 5, seed=4), mask=PADDED)])


class AddedMask(Net):
    """Zero when all is there, and a mean where something is padded."""

    def between(self, x, mask):
        return x + (1 - mask[..., None].to(x.dtype)) * 3


class FilledMask(Net):
    def between(self, x, mask):
        return x.masked_fill(mask[..., None] == 0, 3.0)


class ChosenMask(Net):
    def between(self, x, mask):
        return torch.where(mask[..., None] > 0, x, torch.full_like(x, 3.0))


class PatternMask(Net):
    """Pads get a pattern over the channels."""

    def between(self, x, mask):
        return x + torch.outer(1 - mask.flatten(), torch.arange(WIDTH)).view(*mask.shape, WIDTH)


@pytest.mark.parametrize("model", [AddedMask, FilledMask, ChosenMask, PatternMask], ids=lambda cls: cls.__name__)
def test_what_a_mask_adds_is_not_what_it_added_once(model):
    """Observed with a mask of ones, each of these would be converted, and be wrong by 0.1 and more on padded text."""
    model = ready(model())
    check_refused(model, ["in the model"], dict(ids=ids(3, 5), mask=FULL))


class ZeroMask(Net):
    """Pads are set to zero, which has no mean."""

    def between(self, x, mask):
        return x.masked_fill(mask[..., None] == 0, 0.0)


def test_padding_with_zeros_is_no_obstacle():
    model = ready(ZeroMask())
    check_exact(model, dict(ids=ids(3, 5), mask=FULL), others=[dict(ids=ids(3, 5, seed=4), mask=PADDED)])


class TwoConstants(Net):
    """Two constants of one shape, of which only the first has no mean."""

    def between(self, x, mask):
        wave = torch.tensor([1.0, -1.0], dtype=x.dtype).repeat(WIDTH // 2)
        return x + wave + (wave + 2.0 if self.offset else wave)


@pytest.mark.parametrize("offset", [False, True])
def test_constants_of_one_shape_are_told_apart(offset):
    model = ready(TwoConstants())
    model.offset = offset
    if offset:
        check_refused(model, ["add in the model"])
    else:
        check_exact(model)


class Positions(Net):
    """Sinusoids made on the fly: nothing holds them, so nothing can be centred."""

    def between(self, x, mask):
        angle = torch.arange(x.shape[1])[:, None] / 10 ** torch.linspace(0, 2, WIDTH // 2)
        return x + torch.cat([angle.sin(), angle.cos()], -1).to(x.dtype)


def test_sinusoids_made_on_the_fly_are_refused():
    check_refused(ready(Positions()), ["cat in the model"])


class Table(Net):
    def __init__(self, persistent):
        super().__init__()
        self.register_buffer("table", torch.randn(9, WIDTH) + 2, persistent=persistent)

    def between(self, x, mask):
        return x + self.table[: x.shape[1]]


def test_a_stored_buffer_is_a_writer():
    _, plan = check_exact(ready(Table(persistent=True)))
    assert [edit.axis for edit in plan.edits if getattr(edit, "tensor", "") == "table"] == [1]


def test_a_buffer_that_is_not_stored_is_refused():
    check_refused(ready(Table(persistent=False)), ["table", "buffer that checkpoints do not store"])
