"""LayerNorm Scaling: pre-norm blocks whose norms are divided by the root of the layer's number, and back, exactly."""

import copy
import inspect
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import normswap
from models import tiny
from nets import WIDTH, Block, Net, check_refused, ids, ready, relative
from normswap.errors import RefusedError
from normswap.understand.normmap import NormMap, find_sites
from test_unscale import logits, logits_without_normswap

INPUTS = dict(ids=ids(3, 6))


class Layers(Net):
    """Three numbered layers."""

    def __init__(self, block=Block):
        super().__init__()
        self.layers = nn.ModuleList([block() for _ in range(3)])

    def forward(self, ids, mask=None):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.last(x))


class Damped(Block):
    """A block of a model that was trained so; `number` is its layer's."""

    number = 1

    def __init__(self):
        super().__init__()
        self.root = 1.0

    def branch(self, x):
        x = self.norm(x) / self.root
        return self.down(F.gelu(self.up(x)))


def damped(block=Damped) -> Layers:
    model = Layers(block)
    for i, layer in enumerate(model.layers):
        layer.root = math.sqrt(i + 1)
    return ready(model)


def reference(model, ids, at):
    """`x + F(N(x) / sqrt(l))` with the norms' own gains, the gains multiplied by `at(l)`."""
    x = model.embed(ids)
    for number, layer in enumerate(model.layers, 1):
        n = F.layer_norm(x, (WIDTH,), at(number) * layer.norm.weight, at(number) * layer.norm.bias)
        x = x + layer.down(F.gelu(layer.up(n / math.sqrt(number))))
    return model.head(model.last(x))


def gradients(model, y):
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=y.dtype)
    own = {n: p for n, p in model.named_parameters() if "first" not in n and "second" not in n}
    return dict(zip(own, torch.autograd.grad((weights * y).sum(), [*own.values()]), strict=True))


def test_a_net_written_by_hand_there_and_back():
    model = ready(Layers())
    there = copy.deepcopy(model)
    plan = normswap.convert_model(there, placement="layernorm-scaling", exact=True, inputs=INPUTS)
    assert plan.claim == "exact" and [(b.layer, b.after) for b in plan.moved] == [
        (1, "layernorm-scaling"),
        (2, "layernorm-scaling"),
    ]
    text = inspect.getsource(type(there.layers[2]).branch)
    assert "self.up(self.norm_scale * self.norm(x))))  # changed" in text
    assert there.layers[2].norm_scale == 3**-0.5
    expected = model(**INPUTS)
    assert relative(there(**INPUTS).detach(), expected.detach()) < 1e-12  # measured: 4e-16
    assert relative(reference(model, INPUTS["ids"], math.sqrt).detach(), expected.detach()) < 1e-12
    assert relative(reference(model, INPUTS["ids"], lambda _: 1.0).detach(), expected.detach()) > 0.05
    # a step of training moves the product sqrt(l) g by 1 / l of what it moves g: that is what the method is for
    a, b = gradients(model, expected), gradients(there, there(**INPUTS))
    checked = 0
    for name, gradient in a.items():
        number = int(name.split(".")[1]) + 1 if ".norm." in name else 1
        assert relative(b[name], gradient / math.sqrt(number)) < 1e-10, name  # measured: 2e-14
        checked += number > 1
    assert checked == 4
    blocks = NormMap.of(there, INPUTS).streams[0].blocks
    assert [b.placement for b in blocks] == ["pre", "layernorm-scaling", "layernorm-scaling"]
    with pytest.raises(RefusedError, match="every block stands so already"):
        normswap.plan(there, placement="layernorm-scaling", inputs=INPUTS)
    back = normswap.convert_model(there, placement="pre", exact=True, inputs=INPUTS)
    assert back.claim == "exact" and len(back.moved) == 2
    assert "self.up(self.norm(x))))  # changed" in inspect.getsource(type(there.layers[2]).branch)
    assert relative(there(**INPUTS).detach(), expected.detach()) < 1e-12
    for name, parameter in model.named_parameters():
        assert torch.allclose(there.get_parameter(name), parameter, rtol=1e-14)


def test_a_model_that_was_trained_so_becomes_pre_norm():
    model = damped()
    blocks = NormMap.of(model, INPUTS).streams[0].blocks
    assert [b.placement for b in blocks] == ["pre", "layernorm-scaling", "layernorm-scaling"]
    moved = copy.deepcopy(model)
    plan = normswap.convert_model(moved, placement="pre", exact=True, inputs=INPUTS)
    assert plan.claim == "exact" and plan.converted == ("layers.1.norm", "layers.2.norm")
    assert "x = self.norm(x)  # changed" in inspect.getsource(type(moved.layers[1]).branch)
    expected = reference(model, INPUTS["ids"], lambda _: 1.0)
    assert relative(moved(**INPUTS).detach(), expected.detach()) < 1e-12  # measured: 4e-16
    a, b = gradients(model, model(**INPUTS)), gradients(moved, moved(**INPUTS))
    assert relative(b["embed.weight"], a["embed.weight"]) < 1e-10  # measured: 1e-15


def test_with_another_kind_and_for_some_layers():
    model = tiny("gpt2", n_layer=4).double()
    moved = copy.deepcopy(model)
    plan = normswap.convert_model(moved, norm="rmsnorm", placement="layernorm-scaling", layers="1,3")
    assert plan.claim == "exact" and {block.layer for block in plan.moved} == {1, 3}
    assert relative(logits(moved), logits(model)) < 1e-12  # 1e-15
    assert {spec.kind for _, spec in find_sites(moved)} == {"rmsnorm"}


def test_beside_layers_that_are_moved():
    """Post in some layers is another function, the same with damped layers as without."""
    model = tiny("llama", num_hidden_layers=3).double()
    plain, both = copy.deepcopy(model), copy.deepcopy(model)
    normswap.convert_model(plain, placement="post", layers="0")
    plan = normswap.convert_model(both, placement=["post", "layernorm-scaling"], layers=["0", "2"])
    assert plan.claim == "untrained" and [b.after for b in plan.moved] == ["post"] * 2 + ["layernorm-scaling"] * 2
    assert relative(logits(both), logits(plain)) < 1e-12


def test_a_folder_there_and_back(tmp_path):
    tiny("gpt2", n_layer=3).save_pretrained(tmp_path / "source")
    done = normswap.convert(tmp_path / "source", tmp_path / "out", placement="layernorm-scaling", verify="fast")
    assert done.plan.claim == "exact" and len(done.plan.moved) == 4
    assert done.report.mathematics.comparison.output.error.max < 1e-12  # measured: 1e-15
    text = (tmp_path / "out" / "modeling_normswap.py").read_text()
    assert "hidden_states = self.ln_1_scale * self.ln_1(hidden_states)  # changed" in text
    assert logits_without_normswap(tmp_path / "out", tmp_path) < 1e-5  # float32; measured: 1e-6
    back = normswap.undo(tmp_path / "out", tmp_path / "back", verify="fast")
    assert back.report.mathematics.comparison.output.error.max < 1e-6  # float64 on weights rounded to float32


# -- refused -----------------------------------------------------------------------------------------------------------


class SeenFirst(Damped):
    """Something else reads what the norm gives before it is divided, and makes the branch's first map of it."""

    def branch(self, x):
        n = self.norm(x)
        return self.down(F.gelu(self.up(n / self.root))) * torch.sigmoid(n)


class Elsewhere(Damped):
    """The division is by something that the method makes."""

    def branch(self, x):
        root = self.root
        return self.down(F.gelu(self.up(self.norm(x) / root)))


def test_what_is_not_proved_is_refused():
    words = ["expected a product with one number, written out or held by the module", "self.norm(x) / root"]
    check_refused(damped(Elsewhere), words, INPUTS, placement="pre")
    # read in two ways it is no damped norm, and nothing is taken for one
    blocks = NormMap.of(damped(SeenFirst), INPUTS).streams[0].blocks
    assert not any(block.is_damped for block in blocks)
    with pytest.raises(RefusedError, match="every block stands so already"):
        normswap.plan(damped(SeenFirst), placement="pre", inputs=INPUTS)
    check_refused(ready(Net()), ["stands in no numbered layer"], INPUTS, placement="layernorm-scaling")


def test_another_factor_is_not_taken_for_it():
    model = damped()
    for layer in model.layers:
        layer.root = 3.0
    assert [b.placement for b in NormMap.of(model, INPUTS).streams[0].blocks] == ["pre"] * 3
