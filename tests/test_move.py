"""Planned moves compute what placements written by hand compute: outputs, gradients, constants that are not 1."""

import copy
import functools

import pytest
import torch

from normswap.apply.live import apply_plan
from normswap.errors import RefusedError
from normswap.planning.planner import plan_moves
from normswap.planning.request import Request
from normswap.planning.rewrites.moved import Scales
from normswap.understand.normmap import NormMap
from normswap.verification.precision import LiftFloat32
from placement_families import FAMILIES, Norm, Stack
from placement_references import pre, reference
from sweep import targets
from test_placement_references import POST, RAW, prepared

TOLERANCE = 1e-10  # measured: outputs up to 2e-15, gradients up to 1e-14
PLAIN = [name for name in RAW if name not in ("gemma2", "olmo2")]  # the two have norms on their branches


@functools.cache
def observed(name: str):
    model, inputs = prepared(name)
    return model.requires_grad_(True), inputs, NormMap.of(model, inputs)


def counts(normmap: NormMap) -> list[int]:
    return [len(targets.steps(normmap, info.found)) for info in normmap.streams]


def numbers(normmap: NormMap) -> tuple[list[list[float]], list[list[float]], Scales]:
    """A constant of its own for each step: c and t by stream, and both as the planner takes them."""
    c = [[0.7 + 0.15 * i + 0.04 * k for i in range(count)] for k, count in enumerate(counts(normmap))]
    t = [[1.4 - 0.13 * i - 0.04 * k for i in range(count)] for k, count in enumerate(counts(normmap))]
    named = [{}, {}]
    for found, values in zip(named, (c, t), strict=True):
        for info, own in zip(normmap.streams, values, strict=True):
            found |= {f"{info.name}[{i}]": value for i, value in enumerate(own)}
    # the end of each stream is read by a norm alone, and no norm sees a scale
    named[0] |= {f"{info.name}[end]": 3.0 for info in normmap.streams}
    return c, t, Scales(named[0], {(name, 0): value for name, value in named[1].items()})


def moved(name: str, target: str, scales: Scales | None = None):
    """A copy of the model, its norms moved, and the plan."""
    model, _, normmap = observed(name)
    plan, steps = plan_moves(normmap, Request.of(placement=target), scales=scales)
    assert len(steps) == len(plan.moved) > 0
    assert all(step.before != step.after == target for step in steps)
    return apply_plan(copy.deepcopy(model), plan), plan


def check_same(name: str, result: torch.nn.Module, expected: torch.Tensor, fewest: int = 6) -> None:
    """Logits, and the gradient of each parameter that the plan left as it was, which are `fewest` and more."""
    model, inputs, _ = observed(name)
    with LiftFloat32():
        logits = result(**inputs).logits
        assert (logits - expected).abs().max() < TOLERANCE * expected.abs().max()
        mine, theirs = dict(result.named_parameters()), dict(model.named_parameters())
        same = [n for n, p in mine.items() if n in theirs and torch.equal(p, theirs[n])]
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        a, b = (
            torch.autograd.grad((weights * y).sum(), [own[n] for n in same], allow_unused=True)
            for y, own in ((logits, mine), (expected, theirs))
        )
    largest = max(float(g.abs().max()) for g in b if g is not None)
    checked = 0
    for n, x, y in zip(same, a, b, strict=True):
        assert (x is None) == (y is None), n
        if y is None or max(y.abs().max(), x.abs().max()) <= 1e-12 * largest:
            continue  # rounding: attention does not see the biases of keys
        assert (x - y).abs().max() < TOLERANCE * y.abs().max(), n
        checked += 1
    assert checked >= fewest  # measured: 7 and more where nothing else is said


def norm_of(normmap: NormMap, path: str, gain: float) -> Norm:
    spec = normmap.sites[path].spec
    return Norm(spec.kind == "layernorm", spec.eps, gain)


# -- raw sources -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["post", "deepnorm", "keel"])
@pytest.mark.parametrize("name", RAW)
def test_a_raw_stream_becomes_a_normalised_one(name, target):
    model, inputs, normmap = observed(name)
    c, _, scales = numbers(normmap)
    if name == "olmo2" and target != "post":
        with pytest.raises(RefusedError, match="its branch reads the stream without a norm, and would miss its scale"):
            moved(name, target, scales)
        return
    result, plan = moved(name, target, scales)
    assert plan.claim == "calibrated" and len(plan.moved) == sum(counts(normmap))
    with LiftFloat32():
        expected = reference(model, inputs, target, c)
        # neither the model as it was, nor the same with every constant at 1
        for other in (model(**inputs).logits, reference(model, inputs, target)):
            assert (expected - other).abs().max() > 0.01 * expected.abs().max()
    check_same(name, result, expected)


@pytest.mark.parametrize("target", ["sandwich", "reordered"])
@pytest.mark.parametrize("name", PLAIN)
def test_branches_get_norms(name, target):
    model, inputs, normmap = observed(name)
    c, t, scales = numbers(normmap)
    result, _ = moved(name, target, scales)
    norms = [
        [
            norm_of(normmap, step[0].n_in[0], gain)
            for step, gain in zip(targets.steps(normmap, info.found), own, strict=True)
        ]
        for info, own in zip(normmap.streams, t, strict=True)
    ]
    with LiftFloat32():
        if name == "gpt_neox":
            expected = FAMILIES[name](model, inputs, lambda stack: summed_branches(stack, c[0], norms[0], target))
        else:
            expected = reference(model, inputs, target, c, norms)
    check_same(name, result, expected)


def summed_branches(stack: Stack, c: list[float], norms: list[Norm], target: str) -> torch.Tensor:
    """Parallel branches whose sum is what the model adds to the stream: one branch, with one norm behind it."""
    x = stack.first
    for s, norm, step in zip(c, norms, stack.steps, strict=True):
        assert len(step.branches) == 2
        x = x + norm(sum(b.apply(b.n_in(x) if target == "sandwich" else b.n_in.affine(x / s)) for b in step.branches))
    return stack.final(x)


def from_branch_norms(stack: Stack, c: list[float], t: list[float], n_in: bool, n_branch: bool) -> torch.Tensor:
    """`x + F(c n(x))` where a norm comes before a branch, `(g / c) x + b` where one goes; `(g / t) F + b` behind."""
    x = stack.first
    for i, step in enumerate(stack.steps):
        (branch,) = step.branches
        given, own = x, branch.n_in
        if n_in:
            given = own(x) if own else c[i] * stack.norm_at(i).plain(x)
        elif own:
            given = own.affine(x / c[i])
        y = branch.function(given)
        x = x + (branch.n_branch(y) if n_branch else branch.n_branch.affine(y / t[i]))
    return stack.final(x)


@pytest.mark.parametrize(
    ("name", "target", "n_in", "n_branch"),
    [
        ("gemma2", "pre", True, False),
        ("gemma2", "reordered", False, True),
        ("olmo2", "pre", True, False),
        ("olmo2", "sandwich", True, True),
    ],
)
def test_norms_on_branches_go_and_stay(name, target, n_in, n_branch):
    model, inputs, normmap = observed(name)
    (c,), (t,), scales = numbers(normmap)
    result, _ = moved(name, target, scales)
    with LiftFloat32():
        expected = FAMILIES[name](model, inputs, lambda stack: from_branch_norms(stack, c, t, n_in, n_branch))
    check_same(name, result, expected)


# -- post-norm sources -------------------------------------------------------------------------------------------------


class Streams:
    """Takes each stream to its end in a placement, with the constants of that stream."""

    def __init__(self, target, constants):
        self.target, self.constants = target, iter(constants)

    def __call__(self, stack: Stack) -> torch.Tensor:
        return self.target(stack, next(self.constants))


def lifted(stack: Stack, s: list[float]) -> torch.Tensor:
    """Pre-norm, of what the norm on the embeddings gives without gain and bias, which has the scale 1."""
    first = Stack(stack.entry.plain(stack.first), stack.steps, stack.entry, stack.final)
    return pre(first, [1.0, *s[1:]])


def keel(stack: Stack, c: list[float]) -> torch.Tensor:
    x = stack.entry(stack.first) if stack.entry else stack.first
    for i, step in enumerate(stack.steps):
        (branch,) = step.branches
        x = step.n_out(x + branch.apply(c[i] * step.n_out.plain(x)))
    return x if stack.final is None else stack.final(x)


def family(name: str):
    return FAMILIES["opt" if name == "opt-after" else name]


@pytest.mark.parametrize("name", POST)
def test_post_to_pre(name):
    model, inputs, normmap = observed(name)
    c, _, scales = numbers(normmap)
    if name == "opt-after":
        with pytest.raises(RefusedError, match="expected a norm on the embeddings and one after each block"):
            moved(name, "pre", scales)
        return
    result, plan = moved(name, "pre", scales)
    assert plan.claim == "calibrated"
    with LiftFloat32():
        expected = family(name)(model, inputs, Streams(lifted, c))
    check_same(name, result, expected)


@pytest.mark.parametrize("name", POST)
def test_post_to_a_normalised_skip_is_exact(name):
    model, inputs, normmap = observed(name)
    result, plan = moved(name, "pre-normalized-skip")
    assert plan.claim == "exact"
    with LiftFloat32():
        expected = reference(model, inputs, "pre-normalized-skip")
    check_same(name, result, expected)


@pytest.mark.parametrize("name", POST)
def test_post_to_deepnorm_has_scales_of_one(name):
    model, inputs, normmap = observed(name)
    result, _ = moved(name, "deepnorm", numbers(normmap)[2])
    with LiftFloat32():
        expected = reference(model, inputs, "deepnorm")
    check_same(name, result, expected)


@pytest.mark.parametrize("name", POST)
def test_post_to_keel(name):
    model, inputs, normmap = observed(name)
    c, _, scales = numbers(normmap)
    result, _ = moved(name, "keel", scales)
    with LiftFloat32():
        expected = family(name)(model, inputs, Streams(keel, c))
    check_same(name, result, expected)


@pytest.mark.parametrize("target", ["sandwich", "reordered"])
@pytest.mark.parametrize("name", ["bert", "bart"])
def test_what_a_normalised_stream_cannot_become(name, target):
    with pytest.raises(RefusedError, match="from there all its layers go to pre or pre-normalized-skip, or none"):
        moved(name, target)
