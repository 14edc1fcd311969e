"""Blocks whose norms cannot be moved are refused with the reason, and with the line where the source says it."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import normswap
from nets import WIDTH, Block, Net, check_refused, ids, ready, relative
from normswap.apply.live import apply_plan

INPUTS = dict(ids=ids(3, 6))


class GatedPostBlock(nn.Module):
    """A post-norm block whose branch reads the stream in two lines."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.gate, self.down = nn.Linear(WIDTH, 18), nn.Linear(WIDTH, 18), nn.Linear(18, WIDTH)

    def forward(self, x):
        gate = torch.sigmoid(self.gate(x))
        return self.norm(x + self.down(self.up(x) * gate))


class GatedPostNet(Net):
    def __init__(self):
        super().__init__(GatedPostBlock)
        self.enter = nn.LayerNorm(WIDTH)

    def forward(self, ids, mask=None):
        return self.head(self.second(self.first(self.enter(self.embed(ids)))))


class WithoutEntry(GatedPostNet):
    def forward(self, ids, mask=None):
        return self.head(self.second(self.first(self.embed(ids))))


class InTheModel(Net):
    def forward(self, ids, mask=None):
        x = self.embed(ids)
        x = x + self.first.branch(x)
        x = x + self.second.branch(x)
        return self.head(self.last(x))


class Loop(nn.Module):
    """Two blocks in one line."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.maps = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)])

    def forward(self, x):
        for norm, linear in zip(self.norms, self.maps, strict=True):
            x = x + linear(norm(x))
        return x


def halved(x):
    return F.avg_pool1d(x.transpose(1, 2), 2).transpose(1, 2)


class Pooling(Block):
    """Every two tokens become one, on the skip and behind the norm before the branch."""

    def forward(self, x):
        return halved(x) + self.down(F.gelu(self.up(halved(self.norm(x)))))


class ScaledSkip(Block):
    def forward(self, x):
        return 0.5 * x + self.branch(x)


class Spread(Block):
    def forward(self, *values):
        return values[0] + self.branch(values[0])


class InOneCall(Block):
    """The sum has no expression for the skip alone."""

    def forward(self, x):
        return torch.add(*(x, self.branch(x)))


class TwoKinds(Net):
    def __init__(self):
        super().__init__()
        self.second.norm = nn.RMSNorm(WIDTH)


class Shared(Net):
    def __init__(self):
        super().__init__()
        self.second.norm = self.first.norm


def of(block: type) -> Net:
    return Net(block)


IN_THE_MODEL = (
    "it stands in InTheModel itself and not in a layer",
    "x = x + self.first.branch(x)",
    "test_move_refused",
)
SKIP = "the skip is no expression of its own in this sum"
CASES = {
    "two readers, to pre": (GatedPostNet, "pre", ["model[1]: its branch reads the stream in several places"]),
    "no norm at the entry, to pre": (
        WithoutEntry,
        "pre",
        ["expected a norm on the embeddings and one after each block"],
    ),
    "sums in the model, to post": (InTheModel, "post", IN_THE_MODEL),
    "sums in the model, to sandwich": (InTheModel, "sandwich", IN_THE_MODEL),
    "a loop, to post": (lambda: of(Loop), "post", ["run for several blocks", "x = x + linear(norm(x))"]),
    "a pooled skip, to post": (lambda: of(Pooling), "post", ["its skip pools or scales the stream"]),
    "a scaled skip, to post": (lambda: of(ScaledSkip), "post", ["its skip has a factor of its own (0.5)"]),
    "no name for the stream, to post": (
        lambda: of(Spread),
        "post",
        ["is made here and not in first", "x = self.first(self.embed(ids))"],
    ),
    "no expression, to deepnorm": (lambda: of(InOneCall), "deepnorm", [SKIP, "torch.add(*(x, self.branch(x)))"]),
    "no expression, to post exactly": (lambda: of(InOneCall), "post exact", [SKIP, "torch.add(*(x, self.branch(x)))"]),
    "two kinds of norm, to post": (TwoKinds, "post", ["expected one kind of norm on it, found layernorm, rmsnorm"]),
    "one norm for two blocks, to post": (Shared, "post", ["first.norm reads the stream in several blocks"]),
}


@pytest.mark.parametrize("name", CASES)
def test_what_cannot_move_is_refused(name):
    make, asked, words = CASES[name]
    placement, *exact = asked.split()
    check_refused(ready(make()), words, INPUTS, placement=placement, exact=bool(exact))


@pytest.mark.parametrize("block", [Block, InOneCall])
def test_the_same_nets_without_the_obstacle_move(block):
    model = ready(of(block))
    moved = apply_plan(copy.deepcopy(model), normswap.plan(model, placement="post", inputs=INPUTS))

    def plain(x):
        return F.layer_norm(x, (WIDTH,))

    with torch.no_grad():
        x = plain(model.embed(INPUTS["ids"]))
        for layer in (model.first, model.second):
            x = plain(x + layer.down(F.gelu(layer.up(x * layer.norm.weight + layer.norm.bias))))
        expected = model.head(x * model.last.weight + model.last.bias)
        assert relative(moved(**INPUTS), expected) < 1e-12  # measured: 2e-15


def test_what_refuses_in_one_tower_is_left_with_partial():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = Net(), TwoKinds()

        def forward(self, ids):
            return self.one(ids) + self.other(ids)

    model = ready(Two())
    refused = check_refused(model, ["other: expected one kind of norm"], INPUTS, placement="post")
    assert "--partial does what can be done" in str(refused)
    plan = normswap.plan(model, placement="post", partial=True, inputs=INPUTS)
    assert {block.name.partition("[")[0] for block in plan.moved} == {"one"}
    assert ["other" in refusal.site for refusal in plan.refused] == [True]
    moved = apply_plan(copy.deepcopy(model), plan)
    with torch.no_grad():
        assert torch.equal(moved.other(**INPUTS), model.other(**INPUTS))
        assert relative(moved.one(**INPUTS), model.one(**INPUTS)) > 0.01
