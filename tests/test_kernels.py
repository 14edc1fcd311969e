"""Kernels under models: chosen, measured before they are used, swapped in and away."""

import copy
import io
import json
import pickle
import re
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.nn import functional as F

import normswap
from models import tiny
from normswap.cli.main import main
from normswap.kernels.backend import Abilities, Backend
from normswap.kernels.backends import BACKENDS
from normswap.kernels.backends.hub import _layer
from normswap.kernels.call import Call, Norm
from normswap.kernels.decomposed import decomposed
from normswap.kernels.fused import FusedNorm
from normswap.kernels.timing import Timings
from normswap.observe.inputs import example_inputs


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NORMSWAP_CACHE", str(tmp_path / "cache"))


class Plain(Backend):
    """The call in plain torch: right, and seen to be called."""

    name = "plain"
    about = "for tests"
    abilities = Abilities(
        devices=("cpu",),
        castings=("float32", "float32-before-gain", "input"),
        compile="traced",
        distributed="plain tensors",
    )

    def __init__(self):
        self.calls = 0

    def build(self, call):
        function = decomposed(call)

        def run(*tensors):
            self.calls += 1
            return function(*tensors)

        return run


@pytest.fixture
def plain(monkeypatch) -> Plain:
    backend = Plain()
    monkeypatch.setitem(BACKENDS, "plain", backend)
    return backend


def loss_and_gradients(model, inputs):
    model.zero_grad()
    out = model(**inputs)
    values = out.logits if "logits" in out else out.last_hidden_state
    values.float().square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return values.detach(), gradients


# ten families: pre, post, parallel, reordered, sandwich; gains w and 1 + w; q/k norms; encoders, decoders, pictures
# -> the forms that their blocks have
FAMILIES = {
    "gpt2": {"norm", "add-norm"},
    "llama": {"norm", "add-norm"},
    "gpt_neox": {"norm"},
    "opt": {"norm", "add-norm"},
    "bert": {"norm", "add-norm"},
    "bart": {"norm", "add-norm"},
    "olmo2": {"norm", "norm-add"},
    "gemma2": {"norm", "norm-add", "norm-add-norm"},
    "t5": {"norm"},
    "vit": {"norm", "add-norm"},
    "mixtral": {"norm", "add-norm"},
    "cohere": {"norm"},
}


def counted(name, monkeypatch) -> list[str]:
    """The forms of the calls that a backend serves, as they come."""
    forms, build = [], BACKENDS[name].build

    def built(call):
        kernel = build(call)
        return lambda *tensors: forms.append(call.form) or kernel(*tensors)

    monkeypatch.setattr(BACKENDS[name], "build", built)
    return forms


@pytest.mark.parametrize("name", ["cpu", "triton"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_models_compute_what_they_did(monkeypatch, name, model_type):
    model = tiny(model_type)
    inputs = example_inputs(model)
    names = list(model.state_dict())
    expected, gradients = loss_and_gradients(model, inputs)
    forms = counted(name, monkeypatch)
    sums = name == "triton"
    made = normswap.use_kernels(model, name, fuse_residual=sums)
    forms.clear()
    found, now = loss_and_gradients(model, inputs)
    assert len(made.served) == len(made.sites) >= 3
    assert sorted(set(forms)) == (sorted(FAMILIES[model_type]) if sums else ["norm"])
    assert list(model.state_dict()) == names
    # float32; measured 6e-7 at most, of values and of each gradient
    assert (found - expected).norm() <= 5e-6 * expected.norm()
    largest = max(g.norm() for g in gradients.values())
    assert now.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (now[name] - gradient).norm() <= 5e-6 * gradient.norm() + 1e-7 * largest, name
    assert sorted(normswap.restore_kernels(model)) == sorted(made.served)
    assert not any(isinstance(module, FusedNorm) for module in model.modules())
    assert all(map(torch.equal, loss_and_gradients(model, inputs)[0], expected))


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2"])
def test_half_precision_rounds_where_the_site_does(plain, model_type):
    model = tiny(model_type).bfloat16()
    inputs = example_inputs(model)
    expected = model(**inputs).logits
    made = normswap.use_kernels(model, ["torch", "plain"])
    backends = {site.backend for site in made.sites}
    # F.rms_norm rounds once, at the end, and has no 1 + w; F.layer_norm is the module of GPT-2
    assert backends == ({"torch"} if model_type == "gpt2" else {"plain"})
    assert (model(**inputs).logits == expected).float().mean() > 0.97  # measured: all


class Wrong(Plain):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def build(self, call):
        return lambda x, weight, bias: self.function(x, weight, bias, call)


class InPlace(torch.autograd.Function):
    """Writes the gradient of its input where it found that of its output: the trap of in-place backwards."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return F.rms_norm(x, x.shape[-1:], weight, eps)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = (t.detach().requires_grad_() for t in ctx.saved_tensors)
        with torch.enable_grad():
            y = F.rms_norm(x, x.shape[-1:], weight, ctx.eps)
        dx, dw = torch.autograd.grad(y, (x, weight), gradient)
        return gradient.copy_(dx), dw, None


def no_gain_gradient(x, weight, bias, call):
    return F.rms_norm(x, (call.width,), weight.detach(), call.norm.eps) + 0 * weight


WRONG = {
    "in place": (lambda x, w, b, call: InPlace.apply(x, w, call.norm.eps), "writes into its input or its incoming"),
    "other eps": (lambda x, w, b, call: F.rms_norm(x, (call.width,), w, 1e-2), "its y is .* from the mathematics"),
    "no gain gradient": (no_gain_gradient, "its gradient of gain 0 is"),
    "shape": (lambda x, w, b, call: F.rms_norm(x, (call.width,), w)[:1], "gives .*, the module"),
    "dtype": (lambda x, w, b, call: F.rms_norm(x, (call.width,), w).double(), "gives .*float64, the module"),
    "error": (lambda x, w, b, call: x.no_such_thing, "fails: AttributeError"),
    "nan": (lambda x, w, b, call: F.rms_norm(x, (call.width,), w) * float("nan"), "its y is nan from"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_kernel_that_computes_something_else_is_not_taken(monkeypatch, what):
    function, why = WRONG[what]
    monkeypatch.setitem(BACKENDS, "wrong", Wrong(function))
    model = tiny("llama")
    made = normswap.use_kernels(model, "wrong")
    assert made.served == [] and not any(isinstance(module, FusedNorm) for module in model.modules())
    assert len(made.sites) == 5
    assert all(re.search(why, site.first.rejected["wrong"]) for site in made.sites), made.sites[0].first.rejected


def test_a_kernel_that_rounds_elsewhere_is_not_taken(monkeypatch):
    once = Wrong(lambda x, w, b, call: F.rms_norm(x, (call.width,), w, call.norm.eps))
    monkeypatch.setitem(BACKENDS, "once", once)
    made = normswap.use_kernels(tiny("llama").bfloat16(), "once")
    assert made.served == []
    assert "it rounds elsewhere" in made.sites[0].first.rejected["once"]  # 74% of elements


def test_what_no_backend_serves_is_listed(plain):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.batch, self.group, self.norm = nn.BatchNorm1d(16), nn.GroupNorm(4, 16), nn.LayerNorm(16)
            self.patched = nn.LayerNorm(16)
            self.patched.forward = self.patched.forward  # as hooks of accelerate do

        def forward(self, x):
            x = self.group(self.batch(x.transpose(1, 2))).transpose(1, 2)
            return self.patched(self.norm(x))

    model = Odd().eval()
    made = normswap.use_kernels(model, "plain", inputs={"x": torch.randn(2, 5, 16)})
    assert made.served == ["norm"]
    kept = {site.path: site.kept for site in made.sites if site.kept}
    assert kept.keys() == {"batch", "group", "patched"}
    assert "a batchnorm: kernels are for rmsnorm and layernorm" in kept["batch"]
    assert "replaced on the module itself" in kept["patched"]


def test_auto_takes_the_fastest_and_keeps_the_table(plain, monkeypatch, tmp_path):
    taken = {"module": 30.0, "torch": 20.0, "plain": 10.0}
    monkeypatch.setattr(Timings, "of", lambda self, call, contenders: {n: taken.get(n, 99.0) for n in contenders})
    only = {name: BACKENDS[name] for name in ("torch", "plain", "quack")}
    monkeypatch.setattr("normswap.kernels.choice.BACKENDS", only)
    model = tiny("llama")
    made = normswap.use_kernels(model)
    assert {site.backend for site in made.sites} == {"plain"} and "3.00 times as fast" in made.sites[0].why
    assert "not installed" in made.sites[0].first.rejected["quack"]
    taken["module"] = 9.0
    assert normswap.use_kernels(model).served == []
    json.dumps(made.summary())
    # what was chosen is taken over as it is
    again = normswap.use_kernels(model, chosen=made.chosen())
    assert {site.backend for site in again.sites} == {"plain"} and again.sites[0].why == "as before"


def test_timings_are_measured_once(tmp_path):
    call = Call(
        "norm", 64, torch.float32, "cpu", Norm("rmsnorm", 1e-6, "w", False, "float32", torch.float32, torch.float32)
    )
    runs = []
    first = Timings({}, tmp_path).of(call, {"a": lambda: runs.append(1)})
    count = len(runs)
    assert count > 10 and 0 < first["a"] < 1e4
    assert Timings({}, tmp_path).of(call, {"a": lambda: runs.append(1)}) == first and len(runs) == count
    assert Timings({"torch2": "other"}, tmp_path).known == {}
    (tmp_path / "timings-broken.json").write_text("{")
    only = next(path for path in tmp_path.iterdir() if "broken" not in path.name)
    only.write_text("{")
    assert Timings({}, tmp_path).known == {}


def test_copies_and_files_keep_their_kernels(plain):
    model = tiny("llama")
    inputs = example_inputs(model)
    normswap.use_kernels(model, "plain")
    expected = model(**inputs).logits
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        plain.calls = 0
        assert torch.equal(copied(**inputs).logits, expected) and plain.calls == 5
        assert len(normswap.restore_kernels(copied)) == 5
        assert torch.allclose(copied(**inputs).logits, expected, rtol=1e-5, atol=1e-6)
    assert type(pickle.loads(pickle.dumps(model.model.norm))) is type(model.model.norm)


@pytest.mark.parametrize("name", ["torch", "cpu", "triton"])
def test_compiled_as_a_whole(name):
    """In one graph, sums made by norms included."""
    torch._dynamo.reset()

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.map, self.norm, self.last = nn.Linear(16, 16), nn.LayerNorm(16), nn.LayerNorm(16)

        def forward(self, x):
            f = self.map(x)
            x = self.norm.norm_add(f, x) if isinstance(self.norm, FusedNorm) else x + self.norm(f)
            return self.last(x)

    model, x = Block(), torch.randn(3, 16)
    with torch.no_grad():
        expected = model(x)
    normswap.use_kernels(model, name, inputs={"x": x})
    assert isinstance(model.norm, FusedNorm) and isinstance(model.last, FusedNorm)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x), expected, atol=1e-6)


def test_under_autocast_what_was_prepared(plain):
    model = tiny("llama")
    inputs = example_inputs(model)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**inputs).logits
    for prepared, calls in ((torch.bfloat16, 5), (None, 0)):
        normswap.use_kernels(model, "plain", autocast=prepared)
        plain.calls = 0
        with torch.autocast("cpu", torch.bfloat16):
            assert (model(**inputs).logits - expected).norm() <= 5e-3 * expected.norm()  # measured: 0
        assert plain.calls == calls


@pytest.mark.parametrize("model_type", ["llama", "olmo2", "gemma2", "bert"])
def test_under_autocast_a_float32_residual_meets_half_branches(plain, monkeypatch, model_type):
    model = tiny(model_type)
    inputs = example_inputs(model)
    with torch.autocast("cpu", torch.bfloat16):
        expected, gradients = loss_and_gradients(model, inputs)
    forms = counted("plain", monkeypatch)
    normswap.use_kernels(model, "plain", autocast=torch.bfloat16, fuse_residual=True)
    forms.clear()
    with torch.autocast("cpu", torch.bfloat16):
        found, now = loss_and_gradients(model, inputs)
    assert set(forms) == FAMILIES[model_type]
    # bfloat16 between norms: measured 0, and 8e-3 of gradients
    assert (found - expected).norm() <= 5e-3 * expected.norm()
    for name, gradient in gradients.items():
        assert (now[name] - gradient).norm() <= 5e-2 * gradient.norm() + 1e-6, name


def test_hooks_are_not_left_out(plain):
    """Forms that take a sum and a norm together call no module: one that is hooked is called as it was."""
    norm = nn.Sequential(nn.LayerNorm(16))
    normswap.use_kernels(norm, "plain", inputs={"input": torch.randn(3, 16)})
    x, residual, seen = torch.randn(3, 16), torch.randn(3, 16), []
    norm[0].register_forward_hook(lambda *args: seen.append(1))
    y, s = norm[0].add_norm(x, residual)
    assert torch.equal(s, residual + x) and torch.equal(y, norm[0](s)) and len(seen) == 2
    assert torch.equal(norm[0].norm_add(x, residual), residual + norm[0](x))


def test_other_tensors_go_to_the_module(plain):
    class Marked(torch.Tensor):
        pass

    norm = nn.Sequential(nn.LayerNorm(16))
    normswap.use_kernels(norm, "plain", inputs={"input": torch.randn(3, 16)})
    plain.calls = 0
    assert isinstance(norm(torch.randn(3, 16).as_subclass(Marked)), Marked) and plain.calls == 0
    norm(torch.randn(3, 16))
    assert plain.calls == 1
    assert norm(torch.randn(3, 16, dtype=torch.float32)).dtype == torch.float32


def test_what_cannot_be_is_said(plain):
    model = tiny("gpt2")
    with pytest.raises(normswap.KernelError, match="no backend 'ligr': expected auto, or of .*liger"):
        normswap.use_kernels(model, "ligr")
    with pytest.raises(normswap.KernelError, match=r"quack: quack-kernels is not installed \(pip install"):
        normswap.use_kernels(model, "quack")
    with pytest.raises(normswap.KernelError, match="has no values here"):
        normswap.use_kernels(copy.deepcopy(model).to("meta"), "plain")
    normswap.use_kernels(model, "plain")
    with pytest.raises(normswap.PlanError, match="ln_1 is computed by a kernel.*restore_kernels first"):
        normswap.convert_model(model, norm="rmsnorm")
    norm = model.transformer.ln_f
    norm.__class__ = type("FSDP", (type(norm),), {})
    with pytest.raises(normswap.KernelError, match="has become a FSDP since use_kernels"):
        normswap.restore_kernels(model)


def test_a_converted_model_has_kernels_too(plain):
    model = tiny("gpt2").double()
    normswap.convert_model(model, norm="rmsnorm")
    model = model.float()
    inputs = example_inputs(model)
    expected = model(**inputs).logits
    made = normswap.use_kernels(model, "plain")
    assert len(made.served) == 5 and {site.first.call.norm.kind for site in made.sites} == {"rmsnorm"}
    assert torch.allclose(model(**inputs).logits, expected, rtol=1e-5, atol=1e-6)


def test_command(checkpoints):
    run = CliRunner().invoke(main, ["kernels", str(checkpoints / "gpt2-shakespeare"), "--backend", "torch"])
    assert run.exit_code == 0 and "13 of 13 norms have a kernel, in float32 on cpu" in run.stdout
    assert "transformer.h.0-5.ln_1" in run.stdout
    run = CliRunner().invoke(
        main, ["kernels", str(checkpoints / "llama-shakespeare"), "--backend", "torch", "--dtype", "bfloat16", "--json"]
    )
    found = json.loads(run.stdout)
    assert found["dtype"] == "bfloat16" and {site["backend"] for site in found["sites"]} == {None}
    assert "does not round as the site does" in found["sites"][0]["calls"][0]["rejected"]["torch"]
    run = CliRunner().invoke(main, ["kernels", "--json"])
    assert {backend["name"] for backend in json.loads(run.stdout)} == set(BACKENDS)
    for words in (["--backend", "nope"], ["--device", "nowhere"]):
        run = CliRunner().invoke(main, ["kernels", str(checkpoints / "gpt2-shakespeare"), *words])
        assert run.exit_code == 2 and words[1] in run.stderr and "Traceback" not in run.stderr


def test_sums_are_made_by_norms_where_a_backend_can(plain):
    model = tiny("gemma2")
    inputs = example_inputs(model)
    blocks = [type(module) for module in model.modules()]
    expected, gradients = loss_and_gradients(model, inputs)
    made = normswap.use_kernels(model, "plain", fuse_residual=True)
    forms = [pair.form for pair in made.fusing.fused]
    assert forms.count("norm-add-norm") == 2 and forms.count("norm-add") == 2
    assert "norm_add_norm(" in "".join(made.fusing.source().values())
    plain.calls = 0
    found, now = loss_and_gradients(model, inputs)
    assert plain.calls == 9 - 2  # of nine norms two are in calls of others
    assert (found - expected).norm() <= 5e-6 * expected.norm()  # measured: 1e-7
    assert all((now[n] - g).norm() <= 1e-5 * g.norm() for n, g in gradients.items())
    assert json.dumps(made.summary())
    normswap.restore_kernels(model)
    assert [type(module) for module in model.modules()] == blocks
    # of a backend without such forms the smaller ones, or none, are taken
    plain.abilities = replace(plain.abilities, forms=("norm", "add-norm"))
    made = normswap.use_kernels(model, "plain", fuse_residual=True)
    assert {pair.form for pair in made.fusing.fused} == {"add-norm"}
    kept = [pair.reason for pair in made.fusing.kept]
    assert kept and all("no backend serves it" in reason for reason in kept), kept
    found, _ = loss_and_gradients(model, inputs)
    assert (found - expected).norm() <= 5e-6 * expected.norm()


def test_command_shows_the_new_source(plain, checkpoints):
    words = ["kernels", str(checkpoints / "llama-shakespeare"), "--backend", "plain", "--fuse-residual"]
    run = CliRunner().invoke(main, words)
    assert run.exit_code == 0
    assert "model.layers.0-5   model.layers.*.post_attention_layernorm" in run.stdout
    assert "hidden_states, residual = self.post_attention_layernorm.add_norm(hidden_states, residual)" in run.stdout


def test_layers_of_the_hub_by_semantics(monkeypatch):
    """Layers from an object in this process: nothing is downloaded."""
    kernels = pytest.importorskip("kernels")

    class Layer(nn.Module):
        has_backward = can_torch_compile = True

        def forward(self, x):
            h = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.variance_epsilon)
            return self.weight * h.to(x.dtype)

    class Repository:
        layer_name = "Layer"

        def load(self):
            return Layer

    _layer.cache_clear()
    mapping = {"RMSNorm-rounded-before-gain": {"cpu": Repository()}, "RMSNorm-1+w": {"cpu": Repository()}}
    with kernels.use_kernel_mapping(mapping):
        model = tiny("llama").bfloat16()
        inputs = example_inputs(model)
        expected = model(**inputs).logits
        made = normswap.use_kernels(model, "hub")
        assert len(made.served) == 5 and torch.equal(model(**inputs).logits, expected)
        # a layer that is registered for what it does not compute
        made = normswap.use_kernels(tiny("gemma2"), "hub")
        assert made.served == [] and "from the mathematics" in made.sites[0].first.rejected["hub"]
        made = normswap.use_kernels(tiny("gpt2"), "hub")
        assert "no layer is registered as LayerNorm-bias for cpu" in made.sites[0].first.rejected["hub"]
    _layer.cache_clear()


def test_liger_is_never_in_place(monkeypatch):
    """Its kernels need a GPU; how they are called does not."""
    from liger_kernel.ops import fused_add_rms_norm, layer_norm, rms_norm

    asked = {}
    for module, name in (
        (rms_norm, "LigerRMSNormFunction"),
        (fused_add_rms_norm, "LigerFusedAddRMSNormFunction"),
        (layer_norm, "LigerLayerNormFunction"),
    ):
        made = type(name, (), {"apply": staticmethod(lambda *a, name=name: asked.setdefault(name, a))})
        monkeypatch.setattr(module, name, made)
    liger = BACKENDS["liger"]
    gemma = Norm("rmsnorm", 1e-6, "1 + w", False, "float32", torch.bfloat16, torch.bfloat16)
    call = Call("norm", 64, torch.bfloat16, "cuda", gemma)
    liger.build(call)("x", "w", None)
    assert asked["LigerRMSNormFunction"] == ("x", "w", 1e-6, 1.0, "gemma", False)
    llama = replace(gemma, gain="w", casting="float32-before-gain")
    liger.build(replace(call, form="add-norm", norm=llama))("x", "r", "w", None)
    assert asked["LigerFusedAddRMSNormFunction"] == ("x", "r", "w", 1e-6, 0.0, "llama", False)
    liger.build(replace(call, norm=replace(gemma, kind="layernorm", gain="w", bias=True)))("x", "w", "b")
    assert asked["LigerLayerNormFunction"] == ("x", "w", "b", 1e-6)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (8, 0))
    for changed, why in (
        (dict(form="norm-add"), "has no norm-add"),
        (dict(width=100000), "takes rows up to 65536, not 100000"),
        (dict(device="cpu"), "runs on cuda and xpu, not on cpu"),
        (
            dict(norm=replace(llama, weight_dtype=torch.float32)),
            "takes gains, residuals and outputs in the input's dtype",
        ),
        (dict(norm=replace(llama, casting="input")), "does not round as the site does"),
        (dict(norm=replace(llama, kind="layernorm", casting="float32")), "its layernorm has a gain and a bias"),
    ):
        found = liger.rejects(replace(call, **{"norm": llama, **changed}))
        assert found is not None and found.startswith(why)
    assert liger.rejects(replace(call, norm=llama)) is None


@pytest.mark.parametrize("name", ["torch", "compile", "cpu", "triton"])
def test_every_backend_on_odd_inputs(name):
    """One row, many, none, rows with a stride, infinities: as the module in outputs and gradients, on a width of 70."""
    module = nn.LayerNorm(70)
    with torch.no_grad():
        module.weight.normal_(1, 0.3), module.bias.normal_()
    call = Call(
        "norm", 70, torch.float32, "cpu", Norm("layernorm", 1e-5, "w", True, "float32", torch.float32, torch.float32)
    )
    kernel = BACKENDS[name].build(call)
    torch.manual_seed(0)
    wide = torch.randn(3, 11, 140)
    wide[0, 0, 0], wide[1, 1, 2], wide[2, 2, 4] = float("inf"), float("nan"), -float("inf")
    checked = 0
    for x in (wide[..., ::2], wide[:1, :1, :70].squeeze(0), wide[:, :, 70:], wide[:0, :, :70]):
        found, expected = [], []
        for results, function in (
            (expected, module),
            (found, lambda x: kernel(x, module.weight, module.bias)),
        ):
            leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
            module.zero_grad()
            y = function(leaf)
            (y * torch.linspace(-1, 1, 70)).nan_to_num().sum().backward()
            results += [y.detach(), leaf.grad, module.weight.grad, module.bias.grad]
        for a, b in zip(found, expected, strict=True):
            # float32; measured 2e-7 of values and 1e-6 of sums over rows
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)
            checked += 1
    assert checked == 16
