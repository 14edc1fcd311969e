"""Residual sums made by the norms beside them: the same bits and gradients; what is not proved stays."""

import copy
import pickle
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import normswap
from models import tiny
from nets import WIDTH, Net, ids, ready
from normswap.errors import KernelError
from normswap.kernels.fused import FusedNorm, Table, fused_class
from normswap.kernels.fusing import Fusing, fuse, unfuse
from normswap.kernels.pairs import find_pairs
from normswap.kernels.swap import restore_kernels
from normswap.norms.centred import centre_input
from normswap.observe.inputs import example_inputs
from normswap.source import classes
from normswap.understand.normmap import NormMap

ASKED = Counter()


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    """No kernel serves anything, and what is asked for is counted: fused norms compute as modules do."""

    def none(self, form, *_):
        ASKED[form] += form != "norm"

    monkeypatch.setattr(FusedNorm, "_kernel", none)


def fused(model, inputs, only=None) -> Fusing:
    """The norms of `model` swapped, and its sums fused with them."""
    normmap = NormMap.of(model, inputs)
    paths = [path for path in normmap.sites if only is None or path in only]
    for path in paths:
        module = model.get_submodule(path)
        module.__class__ = fused_class(type(module))
        module.kernels = Table(path, None, None)
    return fuse(model, find_pairs(normmap, paths))


def run(model, inputs, seed=0):
    """Outputs and the gradients of all parameters; what is drawn at random is the same each time."""
    torch.manual_seed(seed)
    model.zero_grad()
    outputs = model(**inputs)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else [outputs[0]]
    sum(t.sin().sum() for t in outputs).backward()
    return outputs + [p.grad for p in model.parameters() if p.grad is not None]


def same_bits(found, expected):
    assert len(found) == len(expected) > 3
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def inputs_of(model):
    """Small ones that it takes, floating ones in float64."""
    given = example_inputs(model)
    return {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in given.items()}


# of two layers each: the forms, and how many sums stay (of Llama's kind, those that the next layer's norm reads)
FAMILIES = {
    "gpt2": ({}, {"add-norm": 2}, 2),
    "llama": ({}, {"add-norm": 2}, 2),
    "mixtral": ({}, {"add-norm": 2}, 2),
    "gpt_neox": ({}, {}, 2),
    "gpt_neox one by one": (dict(use_parallel_residual=False), {"add-norm": 2}, 2),
    "bert": ({}, {"add-norm": 4}, 0),
    "opt": ({}, {"add-norm": 2}, 2),
    "opt post": (dict(do_layer_norm_before=False, word_embed_proj_dim=32), {"add-norm": 2}, 2),
    "olmo2": ({}, {"norm-add": 4}, 0),
    "gemma2": ({}, {"norm-add-norm": 2, "norm-add": 2}, 0),
    "bart": ({}, {"add-norm": 10}, 0),
    "vit": (dict(hidden_dropout_prob=0.1), {"add-norm": 2}, 2),
}


def made(family, **more):
    overrides, forms, kept = FAMILIES[family]
    return tiny(family.split(" ")[0], **overrides, **more).double(), Counter(forms), kept


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_bits_and_gradients(family):
    model, forms, kept = made(family)
    inputs = inputs_of(model)
    expected = run(model, inputs), run(model.train(), inputs)
    before = {path: type(module) for path, module in model.named_modules()}
    names = {path: type(module).__name__ for path, module in model.named_modules() if not is_norm(module)}
    parameters = [name for name, _ in model.named_parameters()]

    fusing = fused(model, inputs)
    assert Counter(pair.form for pair in fusing.fused) == forms and len(fusing.kept) == kept
    assert all(pair.reason for pair in fusing.kept)
    ASKED.clear()
    # measured: no element differs, by the mathematics of the modules; in training dropout draws the same
    assert same_bits(run(model.eval(), inputs), expected[0])
    assert ASKED == forms
    assert same_bits(run(model.train(), inputs), expected[1])
    assert [name for name, _ in model.named_parameters()] == parameters
    # those who look for blocks by the names of their classes find them
    assert {path: type(model.get_submodule(path)).__name__ for path in names} == names

    assert set(unfuse(model)) == {pair.module for pair in fusing.fused}
    restore_kernels(model)
    assert {path: type(module) for path, module in model.named_modules()} == before
    assert same_bits(run(model.eval(), inputs), expected[0])


def is_norm(module):
    return "norm" in type(module).__name__.lower()


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_in_training_with_dropout_and_checkpointing(family):
    model, forms, _ = made(family, **({"resid_pdrop": 0.3} if family == "gpt2" else {"dropout": 0.3}))
    inputs = inputs_of(model)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    expected = run(model, inputs)
    assert not torch.equal(run(model, inputs, seed=1)[0], expected[0])  # dropout is there
    fused(model, inputs)
    ASKED.clear()
    assert same_bits(run(model, inputs), expected)
    assert ASKED["add-norm"] == 2 * forms["add-norm"]  # each again in the backward pass


def lines(fusing, name):
    return [line.strip() for line in fusing.source()[name].splitlines()]


def test_the_source_is_code_that_people_read():
    model, _, _ = made("llama")
    found = lines(fused(model, inputs_of(model)), "FusedLlamaDecoderLayer")
    start = found.index(
        "hidden_states, residual = self.post_attention_layernorm.add_norm(hidden_states, residual)  # changed"
    )
    assert found[start + 1 : start + 6] == [
        "",
        "# Fully Connected",
        "# removed: residual = hidden_states",
        "# removed: hidden_states = self.post_attention_layernorm(hidden_states)",
        "hidden_states = self.mlp(hidden_states)",
    ]
    model, _, _ = made("gemma2")
    text = fused(model, inputs_of(model)).source()["FusedGemma2DecoderLayer"]
    assert "self.post_attention_layernorm.norm_add_norm(\n            hidden_states, residual, self.pre" in text
    model, _, _ = made("bert")
    fusing = fused(model, inputs_of(model))
    assert "hidden_states = self.LayerNorm.add_norm(hidden_states, input_tensor)[0]  # changed" in lines(
        fusing, "FusedBertSelfOutput"
    )
    assert set(fusing.source()) == {"FusedBertSelfOutput", "FusedBertOutput"}  # one for all layers


def test_only_norms_that_were_swapped_are_asked():
    model, _, _ = made("gemma2")
    inputs = inputs_of(model)
    expected = run(model, inputs)
    only = [f"model.layers.{i}.{name}_feedforward_layernorm" for i in (0, 1) for name in ("pre", "post")]
    fusing = fused(model, inputs, only)
    assert Counter(pair.form for pair in fusing.pairs) == {"add-norm": 2, "norm-add": 2}
    assert same_bits(run(model, inputs), expected)
    model, _, _ = made("gemma2")
    fusing = fused(model, inputs, only[:1])
    assert len(fusing.fused) == 1
    assert all("no kernel serves it" in pair.reason for pair in fusing.kept)


def test_branches_that_the_observed_pass_did_not_take():
    """GPT-2 with cross-attention, observed without an encoder's output and run with one, and the other way round."""
    memory = torch.randn(3, 4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for observed_with in (False, True):
        model, _, _ = made("gpt2", add_cross_attention=True)
        without = {name: v for name, v in inputs_of(model).items() if not name.startswith("encoder")}
        inputs = [without, {**without, "encoder_hidden_states": memory}]
        expected = [run(model, each) for each in inputs]
        assert not torch.equal(expected[0][0], expected[1][0])
        fusing = fused(model, inputs[observed_with])
        assert len(fusing.fused) == (4 if observed_with else 2)
        for each, bits in zip(inputs, expected, strict=True):
            assert same_bits(run(model, each), bits)


@pytest.mark.parametrize(("name", "placement", "forms"), [
    ("llama", "post", {"add-norm": 4}),
    ("llama", "sandwich", {"norm-add-norm": 2, "norm-add": 2}),
    ("gpt2", "keel", {"add-norm": 4}),
])  # fmt: skip
def test_models_whose_norms_were_moved(name, placement, forms):
    model = tiny(name).double()
    normswap.convert_model(model, placement=placement, verify=False)
    inputs = inputs_of(model)
    expected = run(model, inputs)
    fusing = fused(model, inputs)
    assert Counter(pair.form for pair in fusing.fused) == forms and not fusing.kept
    ASKED.clear()
    assert same_bits(run(model, inputs), expected) and ASKED == Counter(forms)
    assert all(text.startswith("class FusedRewritten") for text in fusing.source().values())


def test_fused_blocks_compile_without_a_break():
    """`fullgraph` raises where there would be one: in the block with branches that forget, too."""
    model, _, _ = made("gpt2", n_layer=1)
    block, x = model.transformer.h[0], torch.randn(2, 5, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = block(x)
        assert "normed = None" in "".join(fused(model, inputs_of(model)).source().values())
        torch._dynamo.reset()
        found = torch.compile(block, fullgraph=True, backend="eager")(x)
    assert float((found - expected).abs().max()) < 1e-12  # measured: 0


def test_what_changed_since():
    model, _, _ = made("llama")
    layers, inputs = model.model.layers, inputs_of(model)
    plain = type(layers[0])
    fused(model, inputs)
    centre_input(layers[1])
    unfuse(model)
    assert type(layers[0]) is plain and type(layers[1]).__mro__[2] is plain  # still centred
    restore_kernels(model)
    fused(model, inputs)
    layers[1].__class__ = type("Sharded", (type(layers[1]),), {})
    with pytest.raises(KernelError, match=r"layers\.1 has become a Sharded since its sums were fused"):
        unfuse(model)
    assert type(layers[0]) is not plain


def test_copied_and_pickled(monkeypatch):
    model, _, _ = made("gemma2")
    inputs = inputs_of(model)
    fused(model, inputs)
    copied, pickled = copy.deepcopy(model), pickle.dumps(model)
    assert type(copied.model.layers[0]) is type(model.model.layers[0])
    monkeypatch.setattr(classes, "_BUILT", {})  # as in another process
    expected, again = run(model, inputs), pickle.loads(pickled)
    assert type(again.model.layers[1]) is not type(model.model.layers[1])
    for other in (copied, again):
        ASKED.clear()
        assert same_bits(run(other, inputs), expected) and ASKED["norm-add-norm"] == 2
        assert len(unfuse(other)) == 2 and type(other.model.layers[0]).__name__ == "Gemma2DecoderLayer"
    centre_input(model.model.layers[0])
    centred = copy.deepcopy(model)
    assert type(centred.model.layers[0]) is type(model.model.layers[0])
    assert not same_bits(run(centred, inputs), expected)


def test_norms_that_were_not_swapped_are_refused():
    model, _, _ = made("llama")
    normmap = NormMap.of(model, inputs_of(model))
    plain = type(model.model.layers[0])
    with pytest.raises(KernelError, match="layernorm: expected a fused norm, found a LlamaRMSNorm"):
        fuse(model, find_pairs(normmap, ["model.layers.0.post_attention_layernorm"]))
    assert type(model.model.layers[0]) is plain


# -- blocks that do something in between -------------------------------------------------------------------------------


class Odd(nn.Module):
    """`x + f; norm; + g`, each as a subclass says."""

    def __init__(self):
        super().__init__()
        self.norm, self.after = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH)])
        self.f, self.g = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(0.5)
        self.flag = False


class Dropped(Odd):
    def forward(self, x):
        h = self.drop(x + self.f(x))
        return h + self.g(self.norm(h))


class DroppedLater(Odd):
    def forward(self, x):
        h = x + self.f(x)
        h = self.drop(h)
        return h + self.g(self.norm(h))


class DroppedNorm(Odd):
    def forward(self, x):
        return x + self.drop(self.norm(self.f(x)))


class InPlace(Odd):
    def forward(self, x):
        h = x + self.f(x)
        y = h
        y.mul_(1.5)
        return h + self.g(self.norm(h))


class AddedInPlace(Odd):
    def forward(self, x):
        h = self.f(x)
        h += x
        return h + self.g(self.norm(h))


class ReadTwice(Odd):
    def forward(self, x):
        y = self.norm(self.f(x))
        return x + y + self.g(y)


class Remembering(nn.LayerNorm):
    def forward(self, x):
        self.last = super().forward(x)
        return self.last


class Remembered(Odd):
    def __init__(self):
        super().__init__()
        self.norm = Remembering(WIDTH)

    def forward(self, x):
        x = x + self.norm(self.f(x))
        return x + self.g(self.norm.last)


class ChangedUnder(Odd):
    def forward(self, x):
        h = self.f(x)
        z = h.clone()
        y = self.norm(h)
        z.mul_(2)
        y = x + y
        return y * 1.5 + z


class MaybeChangedUnder(Odd):
    def forward(self, x):
        h = self.f(x)
        y = self.norm(h)
        if self.flag:
            h.mul_(2)
        y = x + y
        return y * 1.5


class UsedBetween(Odd):
    def forward(self, x):
        h = self.norm(self.f(x))
        width = h.shape[-1]
        h = x + h
        return h * (width / width)


class InAList(Odd):
    def forward(self, x):
        h = x + self.f(x)
        return h + self.g(self.norms[0](h))


class Replaced(Odd):
    def forward(self, x):
        h = x + self.f(x)
        if self.flag:
            self.norm = self.after
        return h + self.g(self.norm(h))


class Loop(Odd):
    def forward(self, x):
        h = x + self.f(x)
        for _ in range(1):
            h = h + self.g(self.norm(h))
        return h


class Context(Odd):
    def forward(self, x):
        h = x + self.f(x)
        with torch.autocast("cpu", enabled=False):
            y = self.norm(h)
        return h + self.g(y)


class Choice(Odd):
    def forward(self, x):
        h = x + self.f(x)
        h = h if not self.flag else -h
        return h + self.g(self.norm(h))


class Scaled(Odd):
    def forward(self, x):
        h = x + self.f(x)
        return h + self.g(self.norm(2 * h))


class Oneself(Odd):
    def forward(this, x):  # noqa: N805
        h = x + this.f(x)
        return h + this.g(this.norm(h))


class Helper(Odd):
    def forward(self, x):
        h = added(x, self.f(x))
        return h + self.g(self.norm(h))


class BothDrop(Odd):
    def forward(self, x):
        return self.drop(x) + self.norm(self.drop(self.f(x)))


def added(x, y):
    return x + y


REFUSED = {
    Dropped: "the sum is part of `h = self.drop(x + self.f(x))`",
    DroppedLater: "`h` is given another value between them",
    DroppedNorm: "its result goes through",
    InPlace: "",
    AddedInPlace: "made in place",
    ReadTwice: "`y` is used elsewhere as well",
    Remembered: "others read what it gives as well",
    ChangedUnder: "something is changed in place between them",
    MaybeChangedUnder: "a branch between them may change what it reads",
    UsedBetween: "`h` is used elsewhere as well",
    InAList: "expected an attribute of the module",
    Replaced: "the method sets norm",
    Loop: "a `for` begins or ends between them",
    Context: "a `with` begins or ends between them",
    Choice: "`h` is given another value between them",
    Scaled: "",
    Oneself: "expected an attribute of the module",
    Helper: "the sum is made elsewhere, in a function that this calls",
    BothDrop: "the sides would change places",
}


@pytest.mark.parametrize("block", REFUSED, ids=lambda block: block.__name__)
def test_what_is_not_proved_stays(block):
    model = ready(Net(block))
    inputs = dict(ids=ids(3, 5))
    expected = run(ready(Net(block)).train(), inputs)
    fusing = fused(model, inputs)
    assert not fusing.fused and not fusing.source()
    assert any(REFUSED[block] in pair.reason for pair in fusing.kept)
    assert same_bits(run(model.train(), inputs), expected)


class Branching(Odd):
    """What the observed pass does not do changes the sum in place, gives its name another value, or leaves."""

    def forward(self, x):
        h = x + self.f(x)
        if self.flag == "in place":
            h.mul_(0.5)
        elif self.flag == "another":
            h = h * 2
        elif self.flag == "leave":
            return h
        elif self.flag:
            raise ValueError("no such flag")
        residual = h
        h = self.norm(h)
        return residual + self.g(h)


class Reshaping(Odd):
    """In branches of constant choice, and in another shape."""

    def forward(self, x):
        shape = x.shape
        if not self.flag:
            x = self.f(x) + x
        flat = x.view(-1, WIDTH)
        if self.flag == "both" or not self.flag:
            y = self.norm(flat)
            flat = flat + self.g(y)
        return flat.view(shape)


class Keyword(Odd):
    def forward(self, x):
        x = torch.add(x, self.f(x))
        y = self.norm(input=x)
        return self.after(self.g(y).add(x))


class OneLine(Odd):
    """As few write it; a comment in the place of a statement would hide the next."""

    def forward(self, x):
        x = x + self.f(x); y = self.norm(x); z = self.g(y)  # fmt: skip  # noqa: E702
        return x + z


class Sandwiched(Odd):
    def forward(self, x):
        x = self.norm(self.f(x)) + x
        y = self.after(x)
        return x + self.g(y)


PROVED = {
    Branching: ({"add-norm": 2}, ["in place", "another", "leave"]),
    Reshaping: ({"add-norm": 2}, ["both", "other"]),
    Keyword: ({"add-norm": 4}, []),
    OneLine: ({"add-norm": 2}, []),
    Sandwiched: ({"norm-add-norm": 2}, []),
}


@pytest.mark.parametrize("block", PROVED, ids=lambda block: block.__name__)
def test_what_is_proved_holds_in_every_branch(block):
    forms, flags = PROVED[block]
    model = ready(Net(block))
    inputs = dict(ids=ids(3, 5))
    original = copy.deepcopy(model)
    fusing = fused(model, inputs)
    assert Counter(pair.form for pair in fusing.fused) == forms
    for flag in (False, *flags):
        for each in (model, original):
            each.first.flag = each.second.flag = flag
        assert same_bits(run(model, inputs), run(original, inputs))


def test_gelu_is_no_residual_sum():
    """Sums of other things beside norms are left alone."""

    class Mixed(Odd):
        def forward(self, x):
            return x + self.g(self.after(self.f(x) + F.gelu(self.f(x))))

    assert all(pair.form is None for pair in find_pairs(NormMap.of(ready(Net(Mixed)), dict(ids=ids(3, 5)))))
