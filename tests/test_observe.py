"""The recorder: identity of values, aliases, placeholders, real and meta tensors, source spans, errors."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import normswap
from models import tiny
from normswap.errors import ObserveError
from normswap.observe.inputs import example_inputs
from normswap.observe.run import observe
from normswap.observe.trace import Ref, collapse_norms

WIDTH = 6


class Body(nn.Module):
    """A linear layer, and what a test does with its output."""

    def __init__(self, body):
        super().__init__()
        self.lin = nn.Linear(4, WIDTH)
        self.body = body

    def forward(self, x):
        return self.body(self, self.lin(x))


def seen(body, x=None):
    return observe(Body(body), dict(x=torch.randn(2, 3, 4) if x is None else x))


def names(trace):
    return [op.name for op in trace.operations]


def last(trace, name):
    return next(op for op in reversed(trace.operations) if op.name == name)


def made_by(trace, value):
    return trace.operations[trace.values[value].producer]


# -- values ------------------------------------------------------------------------------------------------------------


def test_parameters_are_known_by_name_and_results_by_shape():
    trace = seen(lambda self, y: y * 2)
    linear = trace.operations[0]
    assert (linear.name, linear.module) == ("linear", "lin")
    assert [(trace.values[v].kind, trace.values[v].name) for v in linear.inputs] == [
        ("constant", None),
        ("parameter", "lin.weight"),
        ("parameter", "lin.bias"),
    ]
    (y,) = linear.outputs
    assert (trace.values[y].kind, trace.values[y].shape, trace.values[y].real) == ("computed", (2, 3, WIDTH), None)
    assert names(trace) == ["linear", "mul"] and trace.outputs == trace.operations[1].outputs


def test_a_tied_parameter_is_one_value():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    first, second = observe(Tied(), dict(x=torch.randn(2, 4))).operations
    assert first.inputs[1] == second.inputs[1] and (first.module, second.module) == ("a", "b")


def test_an_operation_run_again_gives_what_it_gave():
    trace = seen(lambda self, y: torch.addmm(y[0], y[1], torch.eye(WIDTH), beta=2, alpha=3))
    op = last(trace, "addmm")
    tensors = {v: torch.randn(trace.values[v].shape, dtype=torch.float64) for v in op.inputs}
    a, b, eye = (tensors[leaf.value] for leaf in op.leaves if isinstance(leaf, Ref))
    (found,) = op.call(tensors)
    assert torch.allclose(found, 2 * a + 3 * b @ eye, atol=1e-12)


# -- writes in place ---------------------------------------------------------------------------------------------------


def write_add(self, y):
    z = y
    y += 1
    return z


def write_method(self, y):
    y.mul_(3)
    return y


def write_item(self, y):
    y[:, 0] = 1.0
    return y


def write_out(self, y):
    torch.exp(y, out=y)
    return y


@pytest.mark.parametrize(
    ("body", "name"), [(write_add, "add"), (write_method, "mul_"), (write_item, "setitem"), (write_out, "exp")]
)
def test_a_write_in_place_makes_a_new_version(body, name):
    trace = seen(body)
    op = trace.operations[-1]
    assert op.name.strip("_") == name.strip("_")
    before, after = trace.operations[0].outputs[0], op.outputs[-1]
    assert op.mutated == (before,) and after != before
    assert trace.outputs == (after,)


def test_an_in_place_operation_run_again_leaves_its_arguments():
    op = seen(write_method).operations[-1]
    x = torch.randn(2, 3, WIDTH, dtype=torch.float64)
    before = x.clone()
    (found,) = op.call({op.inputs[0]: x})
    assert torch.equal(found, 3 * before) and torch.equal(x, before)


def through_view(self, y):
    v = y.view(-1)
    v.add_(1)
    return y * 2


def through_transpose(self, y):
    y.transpose(0, 1).mul_(torch.tensor(2.0))
    return y * 2


def through_base(self, y):
    v = y[0]
    y.add_(1)
    return v * 2


@pytest.mark.parametrize("body", [through_view, through_transpose, through_base])
def test_after_a_write_an_alias_is_no_longer_what_it_was(body):
    """What is read through the other name depends on both, and is not taken for the value before the write."""
    trace = seen(body)
    read = trace.operations[-1]
    write = next(op for op in trace.operations if op.mutated)
    assert read.inputs[0] != trace.operations[0].outputs[0]
    ancestors = trace.ancestors()[read.inputs[0]]
    assert ancestors >> write.outputs[-1] & 1
    mixture = made_by(trace, read.inputs[0])
    with pytest.raises(RuntimeError, match="cannot be run again"):  # and nothing is said of how
        mixture.call({v: torch.zeros(trace.values[v].shape) for v in mixture.inputs})
    assert not trace.strays


# -- values that are not there -----------------------------------------------------------------------------------------


def by_item(self, y):
    return y * 2 if y.sum().item() > 5 else y * 3


def by_bool(self, y):
    return y * 2 if (y > 100).any() else y * 3


def by_index(self, y):
    return y[y[..., 0] > 0]


def by_nonzero(self, y):
    return y.flatten()[torch.nonzero(y.flatten() > 0)[:, 0]]


def by_where(self, y):
    rows, columns = torch.where(y[..., 0] > 0)
    return y[rows, columns]


def by_list(self, y):
    return y * len(y.argmax(-1).tolist())


@pytest.mark.parametrize("body", [by_item, by_bool, by_nonzero, by_where, by_list])
def test_code_that_asks_for_values_runs_and_is_noted(body):
    trace = seen(body)
    assert trace.outputs and trace.values[trace.outputs[0]].kind == "computed"
    assert len(trace.notes) >= 1 and all("reads the value of a result" in note for note in trace.notes)


def test_what_a_number_read_from_a_tensor_depends_on_is_alive():
    trace = seen(by_item)
    total = last(trace, "sum")
    assert total.outputs[0] in trace.live()


def test_boolean_masks_of_one_axis_index_unknown_tensors():
    trace = seen(lambda self, y: y[0][(y[0, :, 0] > 0)])
    assert len(trace.values[trace.outputs[0]].shape) == 2


def by_mask_of_two_axes(self, y):
    return y[y[..., 0] > 0] * 2


def by_counts(self, y):
    return y.repeat_interleave((y[0, 0] > 0).long().sum() + torch.ones(3, dtype=torch.long), dim=1) * 2


def by_masked_select(self, y):
    return y.masked_select(y > 0) * 2


def by_parts(self, y):
    sizes = (y[0] > 0).sum(0).tolist()
    return torch.cat([part * 2 for part in y.flatten().split(sizes)])


@pytest.mark.parametrize("body", [by_mask_of_two_axes, by_counts, by_masked_select, by_parts])
def test_shapes_that_depend_on_unknown_values_are_stood_in_for(body):
    trace = seen(body)
    value = trace.values[trace.outputs[0]]
    assert value.kind == "computed" and all(n > 0 for n in value.shape)
    assert any("reads the value of a result" in note for note in trace.notes)
    assert trace.ancestors()[value.index] >> trace.operations[0].outputs[0] & 1
    assert not trace.strays


def test_parts_of_unknown_size_add_up():
    split = last(seen(by_parts), "split")
    (found, *rest) = split.call({v: torch.randn(2 * 3 * WIDTH) for v in split.inputs})
    assert len(rest) == WIDTH - 1 and len(found) == 6


def known_mask(self, y):
    mask = torch.tensor([[True, False, True], [False, True, True]])
    spread = mask.unsqueeze(-1).expand_as(y)
    assert y[spread].numel() == y[mask].numel() == 4 * WIDTH
    return y.masked_scatter(spread, torch.ones(4 * WIDTH)) * y[mask].sum()


def sizes_in_tensors(self, y):
    half = torch.tensor(WIDTH) // 2
    return y.view(2, 3, 2, half)[:, : torch.tensor(2)]


@pytest.mark.parametrize(("body", "shape"), [(known_mask, (2, 3, WIDTH)), (sizes_in_tensors, (2, 2, 2, WIDTH // 2))])
def test_known_masks_and_sizes_are_used_as_they_are(body, shape):
    trace = seen(body)
    assert trace.values[trace.outputs[0]].shape == shape and not trace.notes


def test_a_mask_made_position_by_position_is_known_and_varies():
    """Inside a `vmap` tensors have no memory; the mask that comes out depends on the padding that went in."""
    padding = torch.tensor([[True, True, False]] * 2)

    class Masked(Body):
        def forward(self, x, padding):
            seen_by = lambda b, i, j: padding[b, j] & (j <= i)  # noqa: E731
            for dims in ((None, None, 0), (None, 0, None), (0, None, None)):
                seen_by = torch.vmap(seen_by, in_dims=dims)
            mask = seen_by(torch.arange(2), torch.arange(3), torch.arange(3))
            y = self.lin(x)
            return (y @ y.transpose(1, 2)).masked_fill(~mask, 0.0)

    trace = observe(Masked(None), dict(x=torch.randn(2, 3, 4), padding=padding))
    filled = last(trace, "masked_fill")
    mask = trace.values[filled.inputs[1]]
    assert mask.real is not None and mask.varies and mask.known is None
    assert mask.real[0].tolist() == [[False, True, True], [False, False, True], [False, False, True]]
    assert not trace.notes


def test_experts_in_a_loop_are_all_visited():
    trace = observe(tiny("phimoe"), dict(input_ids=torch.arange(15).reshape(3, 5)))
    used = {trace.values[v].name for op in trace.operations for v in op.inputs}
    assert {f"model.layers.{i}.mlp.experts.{n}_proj" for i in (0, 1) for n in ("gate_up", "down")} <= used


def test_what_depends_on_no_parameter_is_computed_for_real():
    def body(self, y):
        positions = torch.arange(y.shape[1])
        even = positions[positions % 2 == 0]
        assert even.tolist() == [0, 2]
        if positions.max().item() == 2:
            y = y + positions[:, None]
        return y

    trace = seen(body)
    assert names(trace)[-1] == "add" and not trace.notes
    added = trace.values[trace.operations[-1].inputs[1]]
    assert added.kind == "constant" and added.real.flatten().tolist() == [0, 1, 2] and not added.varies


def test_what_is_computed_from_the_inputs_is_known_to_vary():
    model, mask = tiny("gpt2"), torch.tensor([[1, 1, 0]])
    trace = observe(model, dict(input_ids=torch.tensor([[3, 4, 5]]), attention_mask=mask, use_cache=False))
    ids = [v for v in trace.values if v.kind == "constant" and v.shape == (1, 3) and v.varies]
    assert ids and all(v.known is None for v in ids)
    positions = [v for v in trace.values if v.real is not None and v.real.tolist() == [0, 1, 2]]
    assert positions and not any(v.varies for v in positions)


def test_real_and_meta_tensors_meet():
    def body(self, y):
        out = torch.zeros(2, 3, WIDTH)
        out[:, 1:] = y[:, :-1]  # real memory, unknown values
        out.index_add_(1, torch.tensor([0]), y[:, :1])
        return torch.cat([out, torch.ones(2, 1, WIDTH)], 1).masked_fill(torch.eye(4, WIDTH).bool(), 0.0)

    trace = seen(body)
    value = trace.values[trace.outputs[0]]
    assert value.kind == "computed" and value.shape == (2, 4, WIDTH)
    ancestors = trace.ancestors()[value.index]
    assert all(ancestors >> trace.values[i].index & 1 for i in (0, 1))  # the layer's weight and bias


# -- spans -------------------------------------------------------------------------------------------------------------


def text_at(span):
    lines = Path(span.file).read_text().splitlines()[span.line - 1 : span.end_line]
    lines[-1] = lines[-1].encode()[: span.end_column].decode()
    lines[0] = lines[0].encode()[span.column :].decode()
    return "\n".join(lines)


def written(self, y):
    z = F.gelu(y) + torch.tanh(
        y * 2,
    )
    w = self.lin(z[..., :4]) - y
    w += {"äöü": z}["äöü"] * 3
    return w


def test_spans_point_at_the_very_expression():
    trace = seen(written)
    assert [(op.name.strip("_"), op.module, text_at(op.span)) for op in trace.operations[1:]] == [
        ("gelu", "", "F.gelu(y)"),
        ("mul", "", "y * 2"),
        ("tanh", "", "torch.tanh(\n        y * 2,\n    )"),
        ("add", "", "F.gelu(y) + torch.tanh(\n        y * 2,\n    )"),
        ("getitem", "", "z[..., :4]"),
        # inside torch's own layer: the call of the layer is what the model says
        ("linear", "lin", "self.lin(z[..., :4])"),
        ("sub", "", "self.lin(z[..., :4]) - y"),
        ("mul", "", '{"äöü": z}["äöü"] * 3'),
        ("add", "", 'w += {"äöü": z}["äöü"] * 3'),
    ]
    assert all(op.span.function == "written" for op in trace.operations[1:])
    call = next(call for call in trace.calls[1:][::-1] if call.path == "lin")
    assert text_at(call.span) == "self.lin(z[..., :4])"


def test_spans_in_a_model_of_the_library():
    trace = observe(tiny("gpt_neox"), dict(input_ids=torch.tensor([[1, 2, 3]])))
    calls = {call.path: text_at(call.span) for call in trace.calls if call.path}
    assert calls["gpt_neox.layers.1.input_layernorm"].startswith("self.input_layernorm(")
    sums = [op for op in trace.operations if op.name == "add" and op.module == "gpt_neox.layers.0"]
    assert len(sums) == 2
    assert [text_at(op.span) for op in sums] == ["mlp_output + attn_output", "mlp_output + attn_output + hidden_states"]


def test_frames_lead_from_the_call_to_the_forward_of_its_module():
    trace = observe(tiny("bloom"), dict(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False))
    add = [op for op in trace.operations if op.name == "add" and op.module == "transformer.h.1.mlp"][-1]
    assert [(frame.span.function, frame.module) for frame in add.frames] == [
        ("dropout_add", None),
        ("BloomMLP.forward", "transformer.h.1.mlp"),
    ]
    assert text_at(add.frames[1].span).startswith("dropout_add(")
    # the layer's class has a `__call__` of its own, which is no part of what calls it
    call = next(call for call in trace.calls if call.path == "transformer.h.1")
    assert [(frame.span.function, frame.module) for frame in call.frames] == [("BloomModel.forward", "transformer")]
    assert [trace.values[v].shape for key, v in call.arguments if key == 0] == [(1, 3, 32)]
    assert {key for key, _ in call.arguments} >= {0, "attention_mask"}
    model = next(call for call in trace.calls if call.path == "")
    assert model.frames == () and [key for key, _ in model.arguments] == ["input_ids"]
    # a layer of torch has no code of the model's: its operations belong to the code that calls it
    linear = next(op for op in trace.operations if op.module == "transformer.h.0.mlp.dense_h_to_4h")
    assert [frame.module for frame in linear.frames] == ["transformer.h.0.mlp"]
    norm = next(collapse_norms(trace, {"transformer.ln_f"}).norm_operations())
    assert [frame.module for frame in norm.frames] == ["transformer"]


# -- modules, errors, leaving things alone -----------------------------------------------------------------------------


def test_calls_hold_their_operations_and_callers():
    trace = observe(tiny("gpt2"), dict(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False))
    by_path = {call.path: call for call in trace.calls}
    mlp, fc = by_path["transformer.h.1.mlp"], by_path["transformer.h.1.mlp.c_fc"]
    assert fc.parent == mlp.path and mlp.start <= fc.start < fc.end <= mlp.end
    assert {op.module for op in trace.operations[fc.start : fc.end]} == {fc.path}
    assert made_by(trace, fc.outputs[0]).index in range(fc.start, fc.end)


def test_collapsed_norms_are_one_operation_and_producers_stay_right():
    model = tiny("llama")
    trace = observe(model, dict(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False))
    paths = {path for path, _ in model.named_modules() if path.endswith("norm")}
    small = collapse_norms(trace, paths)
    norms = list(small.norm_operations())
    assert {op.norm for op in norms} == paths and len(norms) == 5
    assert len(small.operations) < len(trace.operations)
    for op in small.operations:
        for v in op.outputs:
            assert small.operations[small.values[v].producer] is op
        assert all(
            small.values[v].producer is None or small.values[v].producer < op.index for v in op.inputs
        )  # producers first


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), Body(lambda self, y: y @ y))

    def forward(self, x):
        return self.inner(x)


def test_an_error_names_the_module_and_the_next_observation_works():
    model = Broken()
    with pytest.raises(ObserveError, match=r"RuntimeError in module 'inner\.1' \(Broken\).*x \(2, 3, 4\)"):
        observe(model, dict(x=torch.randn(2, 3, 4)))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    trace = observe(model.inner[0], dict(input=torch.randn(2, 4)))
    assert names(trace) == ["linear"] and trace.operations[0].module == ""


def test_wrong_inputs_say_what_was_given():
    with pytest.raises(ObserveError, match=r"Expected a forward pass on input_ids \(2, 3\), attention_mask \(5, 7\)"):
        observe(tiny("gpt2"), dict(input_ids=torch.ones(2, 3, dtype=torch.long), attention_mask=torch.ones(5, 7)))
    with pytest.raises(ObserveError, match="module 'transformer' .GPT2LMHeadModel.*images .2,."):
        observe(tiny("gpt2"), dict(images=torch.zeros(2)))


def test_the_model_given_is_not_changed():
    model = tiny("bloom").train()
    model.transformer.h[0].eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    flags = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    config, random = model.config.to_dict(), torch.get_rng_state()
    inputs = example_inputs(model)
    before = {key: value.clone() for key, value in inputs.items() if isinstance(value, torch.Tensor)}
    observe(model, inputs)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == flags
    assert model.config.to_dict() == config and torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(inputs[key], value) and not inputs[key].is_meta for key, value in before.items())
    assert all(p.device.type == "cpu" and p.requires_grad and p.grad is None for p in model.parameters())


def test_no_weights_are_needed_or_read():
    """On the meta device there are none; random ones give the same map."""
    real = tiny("stablelm")
    with torch.device("meta"):
        empty = type(real)(real.config)
    assert normswap.inspect(empty).summary() == normswap.inspect(real).summary()


def test_example_inputs_have_sizes_of_their_own():
    for name in ("gpt2", "t5", "bert"):
        model = tiny(name)
        sizes = {size for p in model.parameters() for size in p.shape}
        batch, length = example_inputs(model)["input_ids"].shape
        assert batch != length and not {batch, length} & sizes


def test_a_module_that_is_none_of_transformers_needs_inputs():
    with pytest.raises(ObserveError, match="Sequential is no model of transformers.*Pass `inputs`"):
        normswap.inspect(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)))


def test_distributions_are_not_asked_for_values_that_are_not_there(monkeypatch):
    # torch.compile turns this off for good
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)

    class Sampling(nn.Module):
        def __init__(self):
            super().__init__()
            self.logits = nn.Linear(4, 5)

        def forward(self, x):
            return torch.distributions.Categorical(logits=self.logits(x)).entropy()

    trace = observe(Sampling(), dict(x=torch.randn(2, 4)))
    assert len(trace.operations) > 3
    with pytest.raises(ValueError):  # outside, they are asked as ever
        torch.distributions.Categorical(logits=torch.full((2,), torch.nan))


def test_writes_through_a_known_mask_are_counted_as_on_real_tensors():
    mask = torch.tensor([[True, False, True], [False, False, True]])

    def scatter(self, y, rows):
        return torch.zeros(2, 3, WIDTH).masked_scatter(mask[..., None], y.flatten(0, 1)[:rows])

    def assign(self, y, rows):
        target = torch.zeros_like(y)
        target[mask] = y.flatten(0, 1)[:rows]
        return target

    for write in (scatter, assign):
        assert seen(lambda self, y, write=write: write(self, y, 3)).outputs
        with pytest.raises(ObserveError, match="places|expanded size|size of tensor"):
            seen(lambda self, y, write=write: write(self, y, 2))


def test_sizes_that_were_not_guessed_are_not_mended():
    with pytest.raises(ObserveError, match="split"):
        seen(lambda self, y: torch.cat(y.split([2, 3], dim=-1), -1))
