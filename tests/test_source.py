"""Source of methods: found, located by what a trace saw, rewritten at single expressions, or refused."""

import ast
import functools

import pytest
import torch
from torch import nn

from models import tiny
from normswap.errors import PlanError, RefusedError
from normswap.norms.centred import centre_input
from normswap.observe.inputs import example_inputs
from normswap.observe.run import observe
from normswap.planning.edits import Change
from normswap.source.methods import Method, place
from normswap.source.render import rewrite


def helper(x):
    return x


class Written(nn.Module):
    """Lines that a rewrite meets; never run."""

    def sums(self, x, y):
        """Adds."""
        z = x + self.ln(y)
        x += y if z is None else z
        self.parts[0] += self.ln(x + y) * 2
        w = self.ln(
            x + y,  # both
        )
        w = self.ln(w)
        return (
            x
            + self.mlp(hidden_states=self.ln(hidden_states=w))
        )  # fmt: skip

    def grouped(self, x: torch.Tensor, y=helper):
        "äöü", x.view(-1) ** 2, -x, x[..., 0], y(x) / x, x - y, not x
        if x is None:
            x = self.ln(x)
        return [super().forward(t + helper(x)) for t in y]

    def long(self, hidden_states, residual_with_a_long_name, another_argument_with_a_long_name):
        hidden_states = helper(residual_with_a_long_name + hidden_states * another_argument_with_a_long_name + 1)  # why
        return hidden_states

    def short(self, x): return x  # fmt: skip  # noqa: E704


def find(name, text, n=0):
    """The span of the `n`-th expression of that text."""
    method = Method.of(Written, name)
    nodes = [node for node in ast.walk(method.tree) if isinstance(node, ast.expr | ast.AugAssign)]
    return sorted(place(node) for node in nodes if method.source(node) == text)[n]


def changed(name, *changes):
    """The lines that differ, without marks and margins."""
    method = Method.of(Written, name)
    given = [Change(kind=kind, name=attribute, span=find(name, *where)) for kind, attribute, *where in changes]
    before = method.text.splitlines()
    found = [line for line in rewrite(method, given).splitlines() if line not in before]
    assert "# changed" in "".join(found) or "# removed" in "".join(found)
    return [line.strip().removesuffix("# changed").strip() for line in found if line.strip() != "# changed"]


CASES = {
    "wrap": ([("wrap", "n", "x + self.ln(y)")], ["z = self.n(x + self.ln(y))"]),
    "unwrap": ([("unwrap", None, "self.ln(y)")], ["z = x + y"]),
    "scale a term": ([("scale", "a", "x"), ("unwrap", None, "self.ln(y)")], ["z = self.a * x + y"]),
    "scale a sum": ([("scale", "a", "x + self.ln(y)")], ["z = self.a * (x + self.ln(y))"]),
    "unwrap, scale, wrap": (
        [("wrap", "n", "x + self.ln(y)"), ("unwrap", None, "self.ln(y)"), ("scale", "a", "self.ln(y)")],
        ["z = self.n(x + self.a * y)"],
    ),
    "first listed is innermost": (
        [("scale", "a", "x + self.ln(y)"), ("wrap", "n", "x + self.ln(y)")],
        ["z = self.n(self.a * (x + self.ln(y)))"],
    ),
    "sum in place": ([("wrap", "n", "x += y if z is None else z")], ["x = self.n(x + (y if z is None else z))"]),
    "scaled target": ([("scale", "a", "x", 1)], ["x = self.a * x + (y if z is None else z)"]),
    "target of another kind": (
        [("wrap", "n", "self.parts[0] += self.ln(x + y) * 2"), ("unwrap", None, "self.ln(x + y)")],
        ["self.parts[0] = self.n(self.parts[0] + (x + y) * 2)"],
    ),
    "value of a sum in place": (
        [("unwrap", None, "self.ln(x + y)"), ("scale", "a", "self.ln(x + y) * 2")],
        ["self.parts[0] += self.a * ((x + y) * 2)"],
    ),
    "call on lines of its own": (
        [("unwrap", None, "self.ln(\n            x + y,  # both\n        )")],
        ["w = x + y"],
    ),
    "what says nothing goes": ([("unwrap", None, "self.ln(w)")], ["# removed: w = self.ln(w)"]),
    "keyword": (
        [("unwrap", None, "self.ln(hidden_states=w)")],
        ["+ self.mlp(hidden_states=w)"],
    ),
    "a sum that a norm makes": ([("merge-left", "n.f", "x + self.ln(y)")], ["z = self.n.f(x, self.ln(y))"]),
    "and both that it gives": (
        [("merge-right", "n.add_norm", "x + self.ln(y)"), ("before", "y", "z"), ("unwrap", None, "self.ln(y)")],
        ["y, z = self.n.add_norm(y, x)"],
    ),
    "one of what it gives": (
        [
            ("merge-left", "n.norm_add", "x + y", 1),
            ("first", None, "x + y", 1),
            ("unwrap", None, "self.ln(\n            x + y,  # both\n        )"),
        ],
        ["w = self.n.norm_add(x, y)[0]"],
    ),
    "what was kept": ([("recall", "kept", "self.ln(w)")], ["w = kept"]),
    "what may have been kept": ([("recall-if", "kept", "self.ln(w)")], ["w = self.ln(w) if kept is None else kept"]),
    "a statement less": ([("remove", None, "w", 1)], ["# removed: w = self.ln(w)"]),
    "a statement more": ([("forget", "kept", "w", 1)], ["kept = None"]),
    "keyword of another call": (
        [("unwrap", None, "self.mlp(hidden_states=self.ln(hidden_states=w))"), ("wrap", "n", "w", 3)],
        ["+ self.ln(hidden_states=self.n(w))"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_changes_of_sums(name):
    changes, expected = CASES[name]
    assert changed("sums", *changes) == expected


def test_expressions_on_several_lines_stay_laid_out():
    text = "x\n            + self.mlp(hidden_states=self.ln(hidden_states=w))"
    assert changed("sums", ("wrap", "n", text)) == ["self.n(x", "+ self.mlp(hidden_states=self.ln(hidden_states=w)))"]


def test_parentheses_only_where_the_source_needs_them():
    x = ("x", 0)  # the name in `x.view`
    spots = [("x.view(-1)", 0), ("-x", 0), ("x[..., 0]", 0), ("y(x)", 0), ("x - y", 0)]
    line = changed("grouped", *(("scale", "a", *spot) for spot in spots))[0]
    assert line == (
        '"äöü", (self.a * x.view(-1)) ** 2, self.a * -x, self.a * x[..., 0], self.a * y(x) / x, self.a * (x - y), not x'
    )
    assert changed("grouped", ("wrap", "n", *x))[0].startswith('"äöü", self.n(x).view(-1) ** 2')
    assert '"äöü", (self.a * x).view(-1) ** 2' in changed("grouped", ("scale", "a", *x))[0]
    # the only statement of a block has to stay, whatever it says
    assert "x = x" in changed("grouped", ("unwrap", None, "self.ln(x)"))


def test_a_product_becomes_one_of_its_sides():
    double = "self.ln(x + y) * 2"
    assert changed("sums", ("left", None, double)) == ["self.parts[0] += self.ln(x + y)"]
    within = changed("sums", ("left", None, double), ("unwrap", None, "self.ln(x + y)"))
    assert within == ["self.parts[0] += x + y"]
    assert changed("grouped", ("left", None, "y(x) / x"))[0].endswith("x[..., 0], y(x), x - y, not x")
    long = changed("long", ("right", None, "hidden_states * another_argument_with_a_long_name"))
    assert "residual_with_a_long_name + another_argument_with_a_long_name + 1" in long[0]


def test_super_names_the_class_that_it_was_written_in():
    expected = "return [super(Written, self).forward(self.n(t + helper(x))) for t in y]"
    assert changed("grouped", ("wrap", "n", "t + helper(x)")) == [expected]
    names = Method.of(Written, "grouped").global_names()
    assert names == {"torch": torch, "helper": helper, "Written": Written}


def test_lines_too_long_are_broken_in_the_call_that_was_put_in():
    text = "residual_with_a_long_name + hidden_states * another_argument_with_a_long_name + 1"
    assert changed("long", ("wrap", "norm_after", text)) == [
        "hidden_states = helper(self.norm_after(",
        text,
        "))  # why",
    ]


def test_enter_is_the_first_statement():
    method = Method.of(Written, "sums")
    text = rewrite(method, [Change(kind="enter", argument="x", name="n")])
    assert '"""Adds."""\n        x = self.n(x)  # changed\n        z = x + self.ln(y)\n' in text
    assert rewrite(Method.of(Written, "long"), [Change(kind="enter", argument="hidden_states", name="n")]).count(
        "long_name):\n        hidden_states = self.n(hidden_states)  # changed\n"
    )
    assert rewrite(method, []) == method.text


def test_every_sum_of_a_model_is_located():
    """Each residual sum and norm call of blocks of several kinds: wrapped, or taken away, in source that compiles."""
    located = 0
    for model_type in ("llama", "bart", "gpt_neox", "opt"):
        model = tiny(model_type)
        trace = observe(model, example_inputs(model))
        changes: dict[str, tuple[Method, list[Change]]] = {}
        calls = [call for call in trace.calls if type(model.get_submodule(call.path)).__name__.endswith("Norm")]
        sums = [op for op in trace.operations if op.name in ("add", "iadd") and op.frames]
        for seen in [op for op in sums if op.frames[0].module is not None] + calls:
            frame = seen.frames[0]
            method = Method.of(type(model.get_submodule(frame.module)), frame.span.function.rpartition(".")[2])
            node = method.locate(frame.span)
            kind = "unwrap" if seen in calls else "wrap"
            assert method.source(node).startswith("self.") or kind == "wrap"
            change = Change(kind=kind, span=place(node), name="norm")
            kept = changes.setdefault(method.where, (method, []))[1]
            kept += [change] if change not in kept else []
        for method, made in changes.values():
            text = rewrite(method, made)
            assert text.count("self.norm(") - method.text.count("self.norm(") >= 0 and text != method.text
            located += len(made)
    assert located > 30


# -- refusals ----------------------------------------------------------------------------------------------------------


def hidden(function):
    def around(self, x):
        return function(self, x)

    return around


class Odd(nn.Module):
    anonymous = lambda self, x: x  # noqa: E731
    assigned = helper

    @hidden
    def decorated(self, x):
        return x

    @functools.lru_cache  # noqa: B019
    def cached(self, x):
        return x

    FACTOR = 2

    def default(self, x, factor=FACTOR):
        return x * factor

    def private(self, x):
        return self.__x + x


exec("class Made(nn.Module):\n    def forward(self, x):\n        return x")


def local_class():
    y = 1

    class Local(nn.Module):
        def forward(self, x):
            return x + y

    return Local


@pytest.mark.parametrize(
    ("cls", "name", "message"),
    [
        (Odd, "anonymous", "expected a method that stands in its own class"),
        (Odd, "assigned", "is test_source.helper: expected"),
        (Odd, "decorated", "A decorator that hides what it wraps"),
        (Odd, "private", "uses __x, which is bound to its class"),
        (Odd, "missing", "has no method missing"),
        (Odd, "__call__", "expected a method that stands in its own class"),
        (torch.Tensor, "add", "expected a method written in Python"),
        (globals()["Made"], "forward", "source cannot be read"),
        (local_class(), "forward", "uses y of a function around its class"),
    ],
)
def test_what_is_not_all_in_its_source_is_refused(cls, name, message):
    with pytest.raises(RefusedError, match=message):
        Method.of(cls, name)


def test_names_of_the_class_body_cannot_be_had():
    with pytest.raises(RefusedError, match="its signature or decorators use FACTOR"):
        Method.of(Odd, "default").global_names()


def test_decorators_that_say_what_they_wrap_are_seen_through():
    assert Method.of(Odd, "cached").text.startswith("    @functools.lru_cache  # noqa: B019\n    def cached")


def test_a_method_that_a_base_defines_is_found_there():
    layer = type(tiny("llama").model.layers[0])  # whose subclasses each hold a wrapped form of `forward`
    inherited = Method.of(type("Other", (layer,), {"__module__": __name__}), "forward")
    assert (inherited.owner, inherited.text) == (layer, Method.of(layer, "forward").text)


def test_centring_around_a_module_is_seen_through():
    model = tiny("llama")
    layer = model.model.layers[0]
    plain = Method.of(type(layer), "forward")
    centre_input(layer)
    found = Method.of(type(layer), "forward")
    assert (found.owner, found.digest) == (plain.owner, plain.digest) and len(plain.digest) == 64


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("sums", dict(kind="wrap", name="n", span=(0, 0, 0, 1)), "expects an expression at"),
        ("sums", dict(kind="unwrap", span=find("sums", "x + self.ln(y)")), "unwrap expects a call with an argument"),
        ("sums", dict(kind="left", span=find("sums", "x + self.ln(y)")), "left expects a product or quotient"),
        ("grouped", dict(kind="right", span=find("grouped", "y(x) / x")), "right expects a product, found"),
        ("sums", dict(kind="wrap", span=find("sums", "x + self.ln(y)")), "needs the name"),
        (
            "sums",
            dict(kind="merge-left", name="n.f", span=find("sums", "self.ln(y)")),
            "merge-left expects a sum, found",
        ),
        ("sums", dict(kind="before", name="n", span=find("sums", "self.ln(y)")), "before expects a target, found"),
        ("short", dict(kind="forget", name="n", span=find("short", "x")), "expects a statement that begins a line"),
        ("sums", dict(kind="enter", argument="q", name="n"), "enter expects an argument q, found self, x, y"),
        ("short", dict(kind="enter", argument="x", name="n"), "a body on lines of its own"),
    ],
)
def test_changes_that_do_not_fit_are_refused(name, change, message):
    with pytest.raises(PlanError, match=message):
        rewrite(Method.of(Written, name), [Change(**change)])


def test_a_change_of_what_another_deletes_is_refused():
    spans = find("sums", "self.ln(y)"), find("sums", "self.ln")
    with pytest.raises(PlanError, match="of which it leaves nothing"):
        rewrite(
            Method.of(Written, "sums"),
            [Change(kind="unwrap", span=spans[0]), Change(kind="wrap", name="n", span=spans[1])],
        )


def test_a_change_of_the_side_that_goes_is_refused():
    spans = find("sums", "self.ln(x + y) * 2"), find("sums", "self.ln(x + y)")
    with pytest.raises(PlanError, match="of which it leaves nothing"):
        rewrite(
            Method.of(Written, "sums"),
            [Change(kind="right", span=spans[0]), Change(kind="unwrap", span=spans[1])],
        )


def test_a_span_of_another_method_is_refused():
    model = tiny("llama")
    trace = observe(model, example_inputs(model))
    call = next(call for call in trace.calls if call.path == "model.layers.0.mlp.down_proj")
    with pytest.raises(RefusedError, match="found none in this method:\n    def forward"):
        Method.of(type(model.model.layers[0]), "forward").locate(call.span)
