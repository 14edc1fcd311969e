"""What a module does to probe inputs tells whether it is a norm, and which: no class name is ever read.

    scale-invariant, shift-invariant                 layernorm (groupnorm when it spans positions too)
    scale-invariant only                             rmsnorm
    a frozen affine that, in training mode, is both  batchnorm

Gain, bias, eps, axes and casting are measured as well, and the formula of `NormSpec` built from them must reproduce
the module's output; a module that resembles a norm but is none of these is not called one.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F

from normswap.norms.spec import NormSpec
from normswap.observe.trace import ModuleCall, Trace

# norms that cast to float32 inside agree with float64 formulas to about 1e-7
TOLERANCE = 1e-4
#: torch's own norms that a forward may call without a module; there is nothing there to exchange
FUNCTIONS = {F.layer_norm: "layernorm", torch.layer_norm: "layernorm", F.rms_norm: "rmsnorm", torch.rms_norm: "rmsnorm"}
_SCALE = 1e3  # probe inputs are large, so that eps plays no part until it is looked for


def find_norms(model: nn.Module, trace: Trace) -> dict[str, NormSpec]:
    """Every norm module that ran, by path, with its behaviour."""
    modules = dict(model.named_modules())
    inner = {call.parent for call in trace.calls}
    known: dict[tuple, NormSpec | None] = {}
    found: dict[str, NormSpec] = {}
    for call in trace.calls:
        if call.path in found or call.path in inner or (shape := _norm_shape(trace, call)) is None:
            continue
        module = modules[call.path]
        if not _could_be_norm(module, shape):
            continue
        key = _likeness(module, shape)
        if key not in known:
            known[key] = probe(module, shape)
        if known[key] is not None:
            found[call.path] = known[key]
    return found


def _norm_shape(trace: Trace, call: ModuleCall) -> tuple[int, ...] | None:
    """Shape of the input when the call maps one float tensor to another of its shape."""
    floats = [v for v in call.inputs if trace.values[v].is_float]
    outputs = [trace.values[v] for v in call.outputs]
    if len(floats) != 1 or len(outputs) != 1 or call.end == call.start or call.outputs[0] in call.inputs:
        return None
    shape = trace.values[floats[0]].shape
    return shape if outputs[0].is_float and outputs[0].shape == shape and len(shape) > 1 else None


def _could_be_norm(module: nn.Module, shape: tuple[int, ...]) -> bool:
    """Norms own at most a gain and a bias, each no larger than one token's values: cheap to copy and to try."""
    parameters = list(module.parameters())
    if len(parameters) > 2 or next(module.children(), None) is not None:
        return False
    per_token = max(shape[1:]) * (shape[-2] if len(shape) > 2 else 1)
    return all(p.numel() <= per_token and (p.squeeze().ndim <= 1 or p.shape == shape[-p.ndim :]) for p in parameters)


def _likeness(module: nn.Module, shape: tuple[int, ...]) -> tuple:
    """Two modules with the same key behave alike: same class, same plain attributes, same parameter shapes."""
    plain = {k: v for k, v in vars(module).items() if isinstance(v, int | float | str | bool | tuple | torch.Size)}
    tensors = {k: tuple(t.shape) for k, t in (*module.named_parameters(), *module.named_buffers())}
    return type(module), repr(sorted(plain.items())), repr(sorted(tensors.items())), shape


def probe(module: nn.Module, shape: tuple[int, ...]) -> NormSpec | None:
    """The norm that `module` is, on inputs of `shape` (batch first), or None if it is no norm this tool knows.

    The module may be on the meta device; a float64 copy on the CPU with random parameters is what runs.
    """
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return _Probe(module, shape).spec()
    except (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError):
        return None  # it does not run alone on a plain tensor


class _Probe:
    def __init__(self, module: nn.Module, shape: tuple[int, ...]):
        self.shape = shape
        self.original = module
        self.module = _randomised(module)
        self.parameters = dict(self.module.named_parameters())
        self.x = torch.randn(shape, dtype=torch.float64) * _SCALE
        self.y = self.module(self.x)

    def spec(self) -> NormSpec | None:
        if not torch.isfinite(self.y).all() or _close(self.y, self.x):
            return None
        if not _close(self.module(3 * self.x), self.y):
            return self._batchnorm()
        touched = self._touched()
        if touched is None:
            return None
        axes, width, whole = touched
        shift_invariant = _close(self.module(self.x + 7 * _SCALE), self.y)
        kind = ("layernorm" if shift_invariant else "rmsnorm") if whole else "groupnorm"
        gain, weight, bias = self._affine()
        eps = self._eps(axes)
        spec = NormSpec(kind=kind, axes=axes, width=width, gain=gain, weight=weight, bias=bias, eps=eps)
        if not (self._reproduces(spec) if whole else self._standardises(spec)):
            return None
        return spec.model_copy(update={"casting": self._casting(spec)}) if whole else spec

    def _touched(self) -> tuple[tuple[int, ...], int, bool] | None:
        """Which outputs one input moves: the normalised axes, how many values, and whether those axes are whole."""
        x = self.x.clone()
        x[(0,) * x.ndim] += 100 * _SCALE  # large enough to move every output that shares the statistic
        moved = self.module(x) != self.y
        if not moved[0].any() or moved[1:].any():
            return None
        reached = [sorted(set(column)) for column in moved.nonzero().T.tolist()]
        axes = tuple(i - x.ndim for i, positions in enumerate(reached) if len(positions) > 1)
        width = int(moved.sum())
        on_channels = self._stands_on_channels(axes)
        if not axes or on_channels is None:
            return None
        return axes, width, all(len(reached[axis]) == self.shape[axis] for axis in axes) and on_channels

    def _stands_on_channels(self, axes: tuple[int, ...]) -> bool | None:
        """A gain that lies along other axes than those normalised belongs to an instance or group norm.

        None where one value of a gain moves all outputs: something comes after it, as in a norm centred at its output.
        """
        for p in self.parameters.values():
            before = p.clone()
            p.view(-1)[0] += 1
            differs = (self.module(self.x) - self.y).abs() > TOLERANCE * self.y.abs().mean()
            p.copy_(before)
            if p.numel() == 1 or not differs.any():
                continue
            reached = [set(column) for column in differs.nonzero().T.tolist()]
            across = {i - self.x.ndim for i, at in enumerate(reached) if len(at) == 1 < self.shape[i]}
            if not across:
                return None
            if not across & set(axes):
                return False
        return True

    def _affine(self):
        """Gain form, and the names of gain and bias, from what setting each parameter to 0 and 1 does."""
        gain = weight = bias = None
        for name, p in self.parameters.items():
            saved = {k: q.clone() for k, q in self.parameters.items()}
            for q in self.parameters.values():
                q.zero_()
            at_zero = self.module(self.x)
            p.fill_(1)
            at_one = self.module(self.x)
            for k, q in self.parameters.items():
                q.copy_(saved[k])
            if _close(at_one - at_zero, torch.ones_like(at_one)):
                bias = name
            elif not _close(at_one, at_zero):
                weight = name
                gain = "w" if not at_zero.any() else "1 + w"
        return gain, weight, bias

    def _eps(self, axes: tuple[int, ...]) -> float:
        """On inputs with statistics of exactly `d^2` the output is `r = d / sqrt(d^2 + eps)` of that on large ones."""
        offset = self.module(torch.zeros_like(self.x)).nan_to_num()  # the bias, if any
        unit = self.x - self.x.mean(axes, keepdim=True)
        unit = unit / unit.square().mean(axes, keepdim=True).sqrt()
        full = (self.module(unit * _SCALE) - offset).norm()
        d = 1.0
        while d > 1e-12:
            r = float((self.module(unit * d) - offset).norm() / full)
            if r < 0.9:
                return self._exact_eps(d * d * (1 / (r * r) - 1))
            d /= 3
        return 0.0

    def _exact_eps(self, measured: float) -> float:
        """The number the module itself holds, where one agrees with the measurement; else the measurement, rounded."""
        held = [v for v in _numbers(self.original) if v and abs(v / measured - 1) < 1e-3]
        return held[0] if held else float(f"{measured:.4g}")

    def _reproduces(self, spec: NormSpec) -> bool:
        """Whether the formula gives the module's output, at sizes where eps matters and where it does not."""
        small = max(spec.eps, 1e-12) ** 0.5
        for x in (self.x, torch.randn_like(self.x) * small):
            if not _close(formula(x, spec, self.parameters), self.module(x)):
                return False
        return True

    def _standardises(self, spec: NormSpec) -> bool:
        """Whether, without gain and bias, the values of the first group have mean 0 and variance 1."""
        saved = {name: p.clone() for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            p.fill_(1.0 if name == spec.weight and spec.gain == "w" else 0.0)
        y, x = self.module(self.x), self.x.clone()
        x[(0,) * x.ndim] += 100 * _SCALE
        group = y[self.module(x) != y]
        for name, p in self.parameters.items():
            p.copy_(saved[name])
        return bool(group.mean().abs() < TOLERANCE and (group.square().mean() - 1).abs() < 10 * TOLERANCE)

    def _casting(self, spec: NormSpec):
        """In which precision bfloat16 is computed: the form that agrees with the module on the most elements."""
        half = copy.deepcopy(self.module).to(torch.bfloat16)
        x = torch.randn(self.shape, dtype=torch.bfloat16)
        parameters = dict(half.named_parameters())
        try:
            y = half(x)
        except RuntimeError:
            return "float32"
        if y.dtype != torch.bfloat16:
            return "float32"
        forms = ("float32", "float32-before-gain", "input") if spec.gain else ("float32", "input")
        agree = {
            c: float((formula(x, spec.model_copy(update={"casting": c}), parameters) == y).float().mean())
            for c in forms
        }
        return max(agree, key=agree.get)

    def _batchnorm(self) -> NormSpec | None:
        """A frozen per-channel affine with running statistics that normalises over the batch when training."""
        buffers = [b for b in self.module.buffers() if b.is_floating_point() and b.numel() > 1]
        if len(buffers) < 2:
            return None
        training = copy.deepcopy(self.module).train()
        if not _close(training(3 * self.x + 7), training(self.x)):
            return None
        axis = next((i for i, n in enumerate(self.shape) if i and n == buffers[0].numel()), None)
        if axis is None:
            return None
        gain, weight, bias = self._affine()
        return NormSpec(
            kind="batchnorm",
            axes=(axis - self.x.ndim,),
            width=1,
            gain=gain,
            weight=weight,
            bias=bias,
            eps=self._running_eps(),
        )

    def _running_eps(self) -> float:
        """eps from the slope of the affine: slope = gain / sqrt(var + eps), with var set to zero."""
        module = copy.deepcopy(self.module)
        for b in module.buffers():
            if b.is_floating_point():
                b.zero_()
        for p in module.parameters():
            p.fill_(1)
        slope = (module(torch.ones_like(self.x)) - module(torch.zeros_like(self.x))).abs().max()
        return self._exact_eps(float(slope) ** -2) if slope > 0 else 0.0


def formula(x: torch.Tensor, spec: NormSpec, parameters: dict[str, torch.Tensor]) -> torch.Tensor:
    """`spec` applied to `x`: the mathematics of `NormSpec`, for layernorm and rmsnorm, with its casting."""
    h = x if spec.casting == "input" else x.to(torch.promote_types(x.dtype, torch.float32))
    if spec.kind == "layernorm":
        h = h - h.mean(spec.axes, keepdim=True)
    h = h * torch.rsqrt(h.square().mean(spec.axes, keepdim=True) + spec.eps)
    if spec.casting == "float32-before-gain":
        h = h.to(x.dtype)

    def placed(name: str) -> torch.Tensor:
        p = parameters[name].to(h.dtype)
        if p.ndim > 1 or len(spec.axes) > 1 or spec.axes == (-1,):
            return p
        return p.reshape([-1 if i - x.ndim == spec.axes[0] else 1 for i in range(x.ndim)])

    if spec.weight is not None:
        h = h * (1 + placed(spec.weight) if spec.gain == "1 + w" else placed(spec.weight))
    if spec.bias is not None:
        h = h + placed(spec.bias)
    return h.to(x.dtype)


def _randomised(module: nn.Module) -> nn.Module:
    """A float64 copy on the CPU with random parameters and plausible statistics."""
    real = copy.deepcopy(module).to_empty(device="cpu").double().eval()
    for p in real.parameters():
        p.requires_grad_(False).copy_(1 + 0.3 * torch.randn_like(p))
    for b in real.buffers():
        if b.is_floating_point():
            b.copy_(0.5 + torch.rand_like(b))
    return real


def _numbers(module: nn.Module) -> list[float]:
    return [v for v in vars(module).values() if isinstance(v, float)]


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= TOLERANCE * b.abs().max())
