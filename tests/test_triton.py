"""Our Triton kernels, in the interpreter where there is no GPU: against the modules' mathematics in float64."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from normswap.errors import KernelError
from normswap.kernels.triton import launch, launch_backward, ops
from normswap.kernels.triton.launch import Norm
from normswap.kernels.triton.rows import rows_of
from normswap.kernels.triton.steps import INTERPRETED
from triton_cases import (
    ROUNDING,
    error,
    gradients,
    inputs,
    options,
    quick_interpreter,
    ran,
    reference,
    rounded_once,
    widened,
)

FORMS = ["norm", "add-norm", "norm-add", "norm-add-norm"]
HALF = [torch.bfloat16, torch.float16]
LAYERNORM = {"kind": "layernorm", "eps": 1e-5, "gain": "w", "casting": "float32"}


@pytest.fixture(scope="module", autouse=True, params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """In the interpreter, or compiled."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    if request.param == "cpu" and not INTERPRETED.value:
        pytest.skip("kernels are compiled in this process")
    if request.param == "cpu":
        quick_interpreter()
    return request.param


def cases():
    for form in FORMS:
        for kind in ("rmsnorm", "layernorm"):
            for casting in ("float32", "float32-before-gain", "input"):
                for gain in ("w", "1 + w") if form == "norm" else ("w",) if kind == "rmsnorm" else ("1 + w",):
                    for dtype in HALF:
                        yield form, kind, casting, gain, dtype
            for dtype in (torch.float32, torch.float64):
                yield form, kind, "float32", "1 + w", dtype


@pytest.mark.parametrize("form, kind, casting, gain, dtype", list(cases()))
def test_forms(form, kind, casting, gain, dtype, device):
    """Within a rounding or two of float64, gradients included, and the very values of the eager module."""
    tensors = inputs(form, (3, 7, 70), dtype, device)
    told = options(form, kind=kind, eps=1e-3, gain=gain, casting=casting)
    found, wanted = ran(form, tensors, told), reference(form, wide := widened(tensors), told)
    for result, exact in zip(found, wanted, strict=True):
        assert result.dtype == dtype
        assert error(result, exact) < 1.5 * ROUNDING[dtype]  # largest 1.24
    for result, exact in zip(gradients(found, tensors), gradients(wanted, wide), strict=True):
        assert error(result, exact) < 3 * ROUNDING[dtype]  # largest 2.63, in float64; 1.43 in half precision
    if dtype in HALF:
        with rounded_once():
            eager = reference(form, tensors, told)
        for result, same in zip(found, eager, strict=True):
            assert (result == same).double().mean() > 0.998  # least 0.9993: a sum in another order


@pytest.mark.parametrize(
    "width, dtype",
    [(1, HALF[0]), (7, HALF[0]), (64, HALF[0]), (2048, HALF[0]), (16384, torch.float32), (20000, torch.float32)],
)
def test_widths(width, dtype, device):
    """No power of two needed; 16384 is the most that the backward holds at once, without the gain."""
    tensors = inputs("add-norm", (2, width), dtype, device)
    found, wanted = ran("add-norm", tensors, LAYERNORM), reference("add-norm", wide := widened(tensors), LAYERNORM)
    if width == 1:  # x is its own mean
        assert torch.equal(found[0], tensors["bias"].expand_as(found[0]))
        return
    for result, exact in zip(found, wanted, strict=True):
        assert error(result, exact) < 1.5 * ROUNDING[dtype]  # largest 0.7
    for result, exact in zip(gradients(found, tensors), gradients(wanted, wide), strict=True):
        assert error(result, exact) < 3 * ROUNDING[dtype]  # 1.43


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind, casting", [("layernorm", "input"), ("rmsnorm", "float32")])
def test_looped_rows(form, kind, casting, device):
    """Rows that do not fit give what rows that do give; the order of sums is another."""
    tensors = {name: value.detach() for name, value in inputs(form, (5, 70), torch.float32, device).items()}
    norm = Norm(torch.float32, kind, 1e-5, "w", casting)
    function = getattr(launch, f"launch_{form.replace('-', '_')}")
    norms = [norm, norm] if form == "norm-add-norm" else [norm]
    fits, looped = function(*tensors.values(), *norms), function(*tensors.values(), *norms, whole=16)
    for one, other in zip(fits, looped, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-6)  # 4.8e-7
    if form == "norm-add":
        return
    tensors["ds"] = torch.randn_like(tensors["x"])
    if form == "norm-add-norm":
        x, _, *parameters, ds = tensors.values()
        arguments = (torch.randn_like(x), x, *fits[1:], *parameters, ds, norm, norm, (True,) * 4)
        function = launch_backward.launch_norm_add_norm_backward
    else:
        read, ds = (tensors["x"], None) if form == "norm" else (fits[1], tensors["ds"])
        parameters = tensors["weight"], tensors["bias"]
        arguments = (torch.randn_like(read), read, fits[-1], *parameters, ds, norm, True, True)
        function = launch_backward.launch_backward
    for one, other in zip(function(*arguments), function(*arguments, 16), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=4e-6)  # 9.5e-7


def test_many_rows_one_row_none(device):
    """Programs walk over many rows, always to the same bits; no rows give gradients of zero."""
    for rows in (700, 1, 0):
        tensors = inputs("norm", (rows, 300), torch.float32, device)
        found, wanted = ran("norm", tensors, LAYERNORM), reference("norm", wide := widened(tensors), LAYERNORM)
        assert found[0].shape == (rows, 300)
        first, again = gradients(found, tensors), gradients(ran("norm", tensors, LAYERNORM), tensors)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
        if rows == 0:
            assert [float(gradient.abs().sum()) for gradient in first] == [0, 0, 0]
            assert first[1].shape == (300,)
            continue
        for one, exact in zip(first, gradients(wanted, wide), strict=True):
            assert error(one, exact) < 1e-6  # 1.3e-7


def test_strides(device):
    """Rows of a slice and of exchanged axes are read where they lie; what arrives expanded is understood."""
    base = torch.randn(4, 5, 3, 2, 32, device=device)
    weight = torch.rand(32, device=device)
    views = {
        "whole": (base[:, :, 0].contiguous(), True),
        "slice of a fused projection": (base[:, :, 1], True),
        "exchanged": (base[:, :, 1, 0].transpose(0, 1), True),
        "every other row": (base[0, ::2, 0, 0], True),
        "three strides": (base[:, :, 1].permute(2, 1, 0, 3), False),
        "last axis not contiguous": (base[..., ::2].expand(4, 5, 3, 2, 16), False),
        "transposed": (base[0, 0].transpose(1, 2).contiguous().transpose(1, 2), False),
        "one value, expanded": (base[:1, :1, :1, :1, :1].expand(2, 3, 1, 1, 32), False),
    }
    for name, (x, in_place) in views.items():
        assert (rows_of(x)[0].data_ptr() == x.data_ptr()) == in_place, name
        told, w = LAYERNORM, weight[: x.shape[-1]]
        x = x.detach().requires_grad_()
        y, same = ops.norm(x, w, **told), ops.norm(x.contiguous(), w, **told)
        assert torch.equal(y, same), name
        (one,), (other,) = torch.autograd.grad(y.sum(), x), torch.autograd.grad(same.sum(), x)
        assert torch.equal(one, other), name


@pytest.mark.filterwarnings("ignore:invalid value")
def test_inf_and_nan(device):
    """Where the eager module gives inf and nan, and nowhere else; one row does not touch another."""
    for form in FORMS:
        for kind in ("rmsnorm", "layernorm"):
            tensors = inputs(form, (6, 33), torch.bfloat16, device)
            with torch.no_grad():
                tensors["x"][0, 3], tensors["x"][1, 4], tensors["x"][2, 5] = torch.inf, -torch.inf, torch.nan
                tensors["x"][4] = 0
            told = options(form, kind=kind, eps=1e-5, gain="w", casting="float32-before-gain")
            for found, eager in zip(ran(form, tensors, told), reference(form, tensors, told), strict=True):
                assert torch.equal(found.isnan(), eager.isnan()) and torch.equal(found.isinf(), eager.isinf())
                assert found[3:].isfinite().all() and not found[:3].isfinite().all()


def test_weights_of_another_dtype(device):
    """A float32 gain on half precision gives float32, as torch promotes; an output may be narrower than that."""
    for dtype in HALF:
        tensors = inputs("norm", (4, 50), dtype, device, weight_dtype=torch.float32)
        told = {"kind": "rmsnorm", "eps": 1e-5, "gain": "w", "casting": "float32-before-gain"}
        y = ops.norm(**tensors, **told, out_dtype=torch.float32)
        x = tensors["x"].float()
        hat = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)).to(dtype)
        promoted = tensors["weight"] * hat + tensors["bias"]
        assert y.dtype == torch.float32
        assert (y - promoted).abs().max() < 1e-6  # 2.4e-7
        assert torch.equal(ops.norm(**tensors, **told), y.to(dtype))
        gradient = torch.autograd.grad(y.sum(), list(tensors.values()))
        assert [one.dtype for one in gradient] == [dtype, torch.float32, torch.float32]
        residual = torch.randn(4, 50, device=device)  # a float32 stream under half-precision branches
        y, s = ops.add_norm(tensors["x"], residual, tensors["weight"], **told, out_dtype=dtype)
        assert torch.equal(s, residual + tensors["x"]) and y.dtype == dtype


def test_shared_gradient(device):
    """In `residual + norm(x)` one gradient belongs to both: two blocks of OLMo-2's shape, against eager."""
    tensors = inputs("norm-add", (2, 4, 64), torch.float32, device)
    x, r, w, b = tensors.values()

    def blocks(norm_add):
        s = norm_add(x.sin(), r)
        return norm_add(s.cos(), s)

    found = blocks(lambda x, r: ops.norm_add(x, r, w, b, **LAYERNORM))
    eager = blocks(lambda x, r: r + torch.nn.functional.layer_norm(x, (64,), w, b))
    seen = []
    found.register_hook(lambda gradient: seen.append((gradient, gradient.clone())))
    for one, other in zip(
        torch.autograd.grad(found.square().sum(), list(tensors.values())),
        torch.autograd.grad(eager.square().sum(), list(tensors.values())),
        strict=True,
    ):
        assert error(one, other) < 1e-6  # 2.8e-7
    assert len(seen) == 1 and torch.equal(*seen[0])


def test_frozen(device, monkeypatch):
    """Without gradients of gain and bias there are no partial sums, nor a kernel that sums them."""
    tensors = inputs("add-norm", (5, 32), torch.float32, device)
    whole = gradients(ran("add-norm", tensors, LAYERNORM), tensors)
    frozen = tensors | {name: tensors[name].detach() for name in ("weight", "bias")}
    monkeypatch.delattr(launch_backward, "reduce_kernel")
    found = torch.autograd.grad(
        ran("add-norm", frozen, LAYERNORM),
        [frozen["x"], frozen["residual"]],
        [torch.ones(5, 32, device=device)] * 2,
    )
    again = torch.autograd.grad(
        reference("add-norm", wide := widened(tensors), LAYERNORM),
        [wide["x"], wide["residual"]],
        [torch.ones(5, 32, device=device).double()] * 2,
    )
    assert len(whole) == 4
    assert max(error(one, other) for one, other in zip(found, again, strict=True)) < 1e-6  # 4.1e-8
    unused = ran("add-norm", tensors, LAYERNORM)[1]  # of the sum alone: no norm, no kernel
    assert [g is None for g in torch.autograd.grad(unused.sum(), list(tensors.values()), allow_unused=True)] == [
        False,
        False,
        True,
        True,
    ]


@pytest.mark.parametrize("form", FORMS)
def test_operators(form, device):
    """What torch checks of an operator, and a whole graph of it with the eager gradients."""
    tensors = inputs(form, (2, 5, 16), torch.float32, device)
    told = options(form, kind="layernorm", eps=1e-5, gain="w", casting="float32")
    how = (torch.float32, "layernorm", 1e-5, "w", "float32")
    how2 = (torch.float32, "rmsnorm", 1e-5, "1 + w", "float32")
    operator = getattr(torch.ops.normswap, form.replace("-", "_"))
    torch.library.opcheck(operator, (*tensors.values(), *how, *(how2 if form == "norm-add-norm" else ())))
    compiled = torch.compile(lambda **given: ran(form, given, told), fullgraph=True, backend="aot_eager")
    eager, found = ran(form, tensors, told), compiled(**tensors)
    assert all(torch.equal(one, other) for one, other in zip(found, eager, strict=True))
    for one, other in zip(gradients(found, tensors), gradients(eager, tensors), strict=True):
        assert torch.equal(one, other)


def test_backward_operator(device):
    """The same of the backward; a gradient of a gradient is refused, in eager mode as in a graph."""
    x, weight, bias = inputs("norm", (5, 16), torch.float32, device).values()
    y, stats = launch.launch_norm(x, weight, bias, Norm(torch.float32, *LAYERNORM.values()))
    given = (torch.randn_like(y), x.detach(), stats, weight.detach(), None, None, torch.float32, *LAYERNORM.values())
    torch.library.opcheck(torch.ops.normswap.norm_backward, (*given, True, False))
    norm = Norm(torch.float32, *LAYERNORM.values())
    s, w, b = x.detach().cos(), weight.detach(), bias.detach()
    both = (given[0], x.detach(), s, stats, launch.new_stats(s, norm).fill_(0.7), w, b, w, None, s, *norm, *norm)
    torch.library.opcheck(torch.ops.normswap.norm_add_norm_backward, (*both, True, True, False, False))
    (gradient,) = torch.autograd.grad(ops.norm(x, weight, bias, **LAYERNORM).sin().sum(), x, create_graph=True)
    with pytest.raises(KernelError, match="gradient of a gradient .* backend 'torch'"):
        gradient.sum().backward()


def test_checkpointing_and_autocast(device):
    """Recomputed activations give the same gradients; autocast changes nothing that it is told."""
    tensors = inputs("norm", (5, 16), torch.float32, device)
    wanted = gradients(ran("norm", tensors, LAYERNORM), tensors)
    for reentrant in (True, False):
        found = torch.utils.checkpoint.checkpoint(
            lambda *given: ops.norm(*given, **LAYERNORM), *tensors.values(), use_reentrant=reentrant
        )
        if reentrant:  # has no `grad`
            found.backward(torch.ones_like(found))
            assert all(tensor.grad is not None for tensor in tensors.values())
        else:
            assert all(torch.equal(one, other) for one, other in zip(gradients((found,), tensors), wanted, strict=True))
    with torch.autocast(device, torch.bfloat16):
        y = ops.norm(**tensors, **LAYERNORM)
    assert y.dtype == torch.float32 and torch.equal(y, ops.norm(**tensors, **LAYERNORM))


def test_refusals(device, monkeypatch):
    """What cannot be is said, with what was found."""
    x, w = torch.randn(4, 8, device=device), torch.ones(8, device=device)
    for match, call in {
        r"residual of shape \(4, 8\), found \(8,\)": lambda: ops.add_norm(x, w, w, **LAYERNORM),
        r"gain of shape \(8,\), found \(4,\)": lambda: ops.norm(x, w[:4], **LAYERNORM),
        r"float64 for all tensors .* torch.float32, torch.float64": lambda: ops.norm(x, w.double(), **LAYERNORM),
        r"found torch.float32, torch.int64": lambda: ops.norm(x, w.long(), **LAYERNORM),
        r"rows of 1 to": lambda: ops.norm(x[:, :0], **LAYERNORM),
        r"gain's form where there is a gain": lambda: ops.norm(x, w, **LAYERNORM | {"gain": None}),
    }.items():
        with pytest.raises(KernelError, match=match):
            call()
    monkeypatch.setattr(launch, "INTERPRETED", type(INTERPRETED)(not INTERPRETED.value))
    with pytest.raises(KernelError, match="run on GPUs.*TRITON_INTERPRET=1"):
        ops.norm(x, w, **LAYERNORM)


@pytest.mark.long
def test_compiled():
    """All that is launched compiles for a GPU, and what a program holds fits into its registers."""
    script = Path(__file__).with_name("triton_compile.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    told = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=True).stdout
    lines = [line.split() for line in told.splitlines()]
    assert len(lines) == 19 and {line[1] for line in lines} == {
        "forward_kernel",
        "sandwich_kernel",
        "sandwich_backward_kernel",
        "backward_kernel",
        "reduce_kernel",
    }
    assert {int(stack) for _, _, _, stack, _ in lines} == {0}
    assert max(int(shared) for *_, shared in lines) <= 232448  # of an H200; 99328 here


@pytest.mark.long
@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes in the interpreter")
def test_two_processes(tmp_path):
    """DTensors with sharded rows stay so, their gradients of weights are partial; FSDP2 and DDP train as one does."""
    script = Path(__file__).with_name("triton_distributed.py")
    told = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, check=True).stdout
    assert told.split("\n")[0] == "dtensors 34 fsdp 5 ddp 5"


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows, width", [(8192, 4096), (300, 16384), (64, 65536), (100_000, 64), (5000, 770)])
def test_large(form, rows, width, device):
    """Shapes of real models, whose programs walk over many rows."""
    if device == "cpu":
        pytest.skip("too large for the interpreter")
    tensors = inputs(form, (rows, width), torch.bfloat16, device)
    told = options(form, kind="layernorm", eps=1e-5, gain="w", casting="float32")
    found, wanted = ran(form, tensors, told), reference(form, wide := widened(tensors), told)
    for result, exact in zip(found, wanted, strict=True):
        assert error(result, exact) < 1.5 * ROUNDING[torch.bfloat16]
    for result, exact in zip(gradients(found, tensors), gradients(wanted, wide), strict=True):
        assert error(result, exact) < 3 * ROUNDING[torch.bfloat16]


@pytest.mark.gpu
def test_far_offsets(device):
    """Beyond 2**31 values, forward and backward."""
    if device == "cpu":
        pytest.skip("takes 20 GB")
    rows = 2**31 // 4096 + 8
    x = torch.randn(rows, 4096, dtype=torch.bfloat16, device=device).requires_grad_()
    weight = torch.rand(4096, dtype=torch.bfloat16, device=device)
    y = ops.norm(x, weight, kind="rmsnorm", eps=1e-5)
    (found,) = torch.autograd.grad(y, x, torch.ones_like(y))
    last = x.detach()[-8:].requires_grad_()
    same = ops.norm(last, weight, kind="rmsnorm", eps=1e-5)
    (of_last,) = torch.autograd.grad(same, last, torch.ones_like(same))
    assert torch.equal(y[-8:], same) and torch.equal(found[-8:], of_last)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_inductor(form, device):
    """A whole graph by Inductor, gradients included, is what eager mode gives."""
    if device == "cpu":
        pytest.skip("test_operators has it without Inductor")
    tensors = inputs(form, (64, 512), torch.bfloat16, device)
    told = options(form, kind="layernorm", eps=1e-5, gain="w", casting="float32")
    compiled = torch.compile(lambda **given: ran(form, given, told), fullgraph=True)
    eager, found = ran(form, tensors, told), compiled(**tensors)
    assert all(torch.equal(one, other) for one, other in zip(found, eager, strict=True))
    for one, other in zip(gradients(found, tensors), gradients(eager, tensors), strict=True):
        assert torch.equal(one, other)
