"""What a module does to probe inputs tells whether it is a norm, and which: no class name is ever read.

    scale-invariant, shift-invariant                     layernorm (groupnorm when it spans positions too)
    scale-invariant only                                 rmsnorm
    affine, by two vectors that act as mean and variance batchnorm

Gain, bias, eps, axes, gate and casting are measured as well, and the formula of `NormSpec` built from them must
reproduce the module's output; what resembles a norm but is none of these is not called one.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from types import CodeType, FunctionType
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import functional as F

from normswap.norms.formula import formula
from normswap.norms.reach import Reach, probe_shapes, reach
from normswap.norms.running import Running, exact_eps
from normswap.norms.spec import Gate, NormSpec
from normswap.observe.trace import ModuleCall, Trace
from normswap.verification.precision import LiftFloat32

TOLERANCE = 1e-8  # float64 throughout, casts to float32 lifted: about 1e-15 is measured
#: torch's own norms that a forward may call without a module; there is nothing there to exchange
FUNCTIONS = {F.layer_norm: "layernorm", torch.layer_norm: "layernorm", F.rms_norm: "rmsnorm", torch.rms_norm: "rmsnorm"}
# probe inputs are large, so that eps plays no part until it is looked for; then larger, for an eps that is large itself
_SCALES = 1e6, 1e15
_OPENING = 1.3  # what a gate reads while the rest is measured
_ACTIVATIONS = ("silu", "sigmoid", "gelu", "relu", "tanh", "softplus")
_OF_ANY_MODULE = vars(nn.Module()).keys()
_kept: WeakKeyDictionary[type, dict[tuple, NormSpec | bool]] = WeakKeyDictionary()
_FAILURES = (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError, AttributeError, AssertionError)


@dataclass
class Found:
    """The norms of a model: `specs` per module path, and modules that are `like` a norm and none that is known."""

    specs: dict[str, NormSpec] = field(default_factory=dict)
    like: list[str] = field(default_factory=list)


def find_norms(model: nn.Module, trace: Trace) -> Found:
    """Every norm module that ran, by path, with its behaviour."""
    modules = dict(model.named_modules())
    inner = {call.parent for call in trace.calls}
    known: dict[tuple, NormSpec | bool] = {}
    found = Found()
    for call in trace.calls:
        if call.path in found.specs or call.path in found.like or call.path in inner:
            continue
        module = modules[call.path]
        shapes = _shapes(trace, call)
        if shapes is None or not _could_be_norm(module, shapes[0]):
            continue
        key = _likeness(module, shapes)
        if key not in known:
            known[key] = _examined_once(module, shapes, key)
        if isinstance(known[key], NormSpec):
            found.specs[call.path] = known[key]
        elif known[key]:
            found.like.append(call.path)
    return found


def _shapes(trace: Trace, call: ModuleCall) -> tuple[tuple[int, ...], ...] | None:
    """Shapes of the input, of the gate if there is one, and of the output, when a call could be one of a norm."""
    floats = [trace.values[v] for v in call.inputs if trace.values[v].is_float]
    outputs = [trace.values[v] for v in call.outputs]
    if not 1 <= len(floats) <= 2 or len(outputs) != 1 or call.end == call.start or call.outputs[0] in call.inputs:
        return None
    if floats[0].kind == "parameter" or not outputs[0].is_float or not floats[0].shape:
        return None
    if len(floats) == 2 and floats[1].shape != floats[0].shape:
        return None
    shapes = (*(value.shape for value in floats), outputs[0].shape)
    alone = len(shapes[0]) == 1  # one vector; norms take several
    return tuple((3, *shape) for shape in shapes) if alone else shapes


def _could_be_norm(module: nn.Module, shape: tuple[int, ...]) -> bool:
    """Norms own at most a gain and a bias, each no larger than one token's values: cheap to copy and to try."""
    parameters = list(module.parameters())
    if len(parameters) > 2 or next(module.children(), None) is not None:
        return False
    per_token = max(shape[1:]) * (shape[-2] if len(shape) > 2 else 1)
    return all(p.numel() <= per_token and (p.squeeze().ndim <= 1 or p.shape == shape[-p.ndim :]) for p in parameters)


def _likeness(module: nn.Module, shapes: tuple[tuple[int, ...], ...]) -> tuple:
    """Two modules with the same key behave alike: same class, same plain attributes, same parameter shapes."""
    plain = {k: v for k, v in vars(module).items() if isinstance(v, int | float | str | bool | tuple | torch.Size)}
    tensors = {k: tuple(t.shape) for k, t in (*module.named_parameters(), *module.named_buffers())}
    return type(module), repr(sorted(plain.items())), repr(sorted(tensors.items())), shapes


def _examined_once(module: nn.Module, shapes: tuple[tuple[int, ...], ...], key: tuple) -> NormSpec | bool:
    """`_examined`, kept for models to come where class, numbers and words are all there is to the module."""
    codes = _plain_code(module)
    if codes is None:
        return _examined(module, shapes)
    kept = _kept.setdefault(type(module), {})
    key = codes, *key[1:], tuple(p.dtype for p in module.parameters())
    if key not in kept:
        kept[key] = _examined(module, shapes)
    return kept[key]


def _plain_code(module: nn.Module) -> tuple[CodeType, ...] | None:
    """The code of a module's methods; None where it may do otherwise, by a buffer, a hook, an object, a closure."""
    bases = [base for base in type(module).__mro__ if base not in nn.Module.__mro__]
    methods = [f for base in bases for f in vars(base).values() if isinstance(f, FunctionType)]
    own = {k: v for k, v in vars(module).items() if k not in _OF_ANY_MODULE}
    held = (v for k, v in vars(module).items() if k in _OF_ANY_MODULE and k not in ("_parameters", "training"))
    if type(type(module).forward) is not FunctionType or any(x for x in held if x is not True):
        return None
    if any(set(f.__code__.co_freevars) - {"__class__"} for f in methods):
        return None
    parts = [x for v in own.values() for x in (v if isinstance(v, tuple) else (v,))]
    return tuple(f.__code__ for f in methods) if all(isinstance(x, int | float | str) for x in parts) else None


def probe(module: nn.Module, shape: tuple[int, ...], gated: bool = False) -> NormSpec | None:
    """The norm that `module` is, on inputs of `shape` (batch first), or None if it is no norm this tool knows.

    Args:
        module: may be on the meta device; a float64 copy on the CPU with random parameters is what runs.
        gated: whether it takes a second input, of the same shape.
    """
    found = _examined(module, (shape,) * (3 if gated else 2))
    return found if isinstance(found, NormSpec) else None


def _examined(module: nn.Module, shapes: tuple[tuple[int, ...], ...]) -> NormSpec | bool:
    """The norm that `module` is, or whether it resembles one."""
    same = shapes[0] == shapes[-1]
    for shape in probe_shapes(module, shapes[0]) if same else [shapes[0]]:
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]), LiftFloat32():
                torch.manual_seed(0)
                for scale in _SCALES:
                    probing = _Probe(module, shape, len(shapes) == 3, scale)
                    found = (probing.spec(shapes[0]) if same else None) or probing.resembles()
                    if found or probing.invariant():
                        break
                return found
        except _FAILURES:
            continue  # it does not run alone on a plain tensor of this shape
    return False


class _Probe:
    def __init__(self, module: nn.Module, shape: tuple[int, ...], gated: bool, scale: float):
        self.shape, self.gated, self.scale = shape, gated, scale
        self.original = module
        self.module = randomised(module)
        self.parameters = dict(self.module.named_parameters())
        self.z = torch.full(shape, _OPENING, dtype=torch.float64)
        self.x = torch.randn(shape, dtype=torch.float64) * self.scale
        self.y = self.run(self.x)

    def run(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x, self.z) if self.gated else self.module(x)

    def invariant(self) -> bool:
        """Whether the output is finite, not the input, and blind to the input's scale."""
        finite = bool(torch.isfinite(self.y).all())
        return finite and not _close(self.y, self.x) and _close(self.run(3 * self.x), self.y)

    def resembles(self) -> bool:
        """Whether scales are taken out of the input by a statistic of several values."""
        low = self.run(self.x * (10 / self.scale))  # where a softmax, say, is no longer all or nothing
        if not self.invariant() or (low - self.y).abs().max() > 1e-2 * self.y.abs().max():
            return False
        x = self.x.clone()
        x[(0,) * x.ndim] *= -3  # a sign is invariant to scales too, but moves alone
        return int(((self.run(x) - self.y).abs() > TOLERANCE * self.y.abs().max()).sum()) > 1

    def spec(self, shape: tuple[int, ...]) -> NormSpec | None:
        """The norm, or None; `shape` is the one that the model runs it on."""
        if not torch.isfinite(self.y).all() or _close(self.y, self.x):
            return None
        if not self.invariant():
            return None if self.gated else Running(self.module, self.original, self.x / self.scale).spec()
        found = reach(self.run, self.x, self.y, self.parameters, 100 * self.scale)
        if found is None:
            return None
        shift_invariant = _close(self.run(self.x + 7 * self.scale), self.y)
        if found.positions and not shift_invariant:
            return None
        kind = "groupnorm" if found.positions else "layernorm" if shift_invariant else "rmsnorm"
        gain, weight, bias = self._affine()
        eps = self._eps(found)
        width, groups = found.on(self.shape, self.shape)
        spec = NormSpec(
            kind=kind, axes=found.axes, width=width, groups=groups, gain=gain, weight=weight, bias=bias, eps=eps
        )
        for gate in self._gates():
            gated = spec.model_copy(update={"gate": gate, "eps": self._eps_behind(gate, eps)})
            if self._reproduces(gated):
                width, groups = found.on(self.shape, shape)
                return gated.model_copy(update={"casting": self._casting(gated), "width": width, "groups": groups})
        return None

    def _affine(self):
        """Gain form, and the names of gain and bias, from what setting each parameter to 0 and 1 does."""
        gain = weight = bias = None
        for name, p in self.parameters.items():
            saved = {k: q.clone() for k, q in self.parameters.items()}
            for q in self.parameters.values():
                q.zero_()
            at_zero = self.run(self.x)
            p.fill_(1)
            at_one = self.run(self.x)
            for k, q in self.parameters.items():
                q.copy_(saved[k])
            if _close(at_one - at_zero, torch.ones_like(at_one)):
                bias = name
            elif not _close(at_one, at_zero):
                weight = name
                gain = "w" if not at_zero.any() else "1 + w"
        return gain, weight, bias

    def _eps(self, found: Reach) -> float:
        """On inputs with statistics of exactly `d^2` the output is `r = d / sqrt(d^2 + eps)` of that on large ones."""
        offset = self.run(torch.zeros_like(self.x)).nan_to_num()  # the bias, if any
        unit = found.standardised(self.x)
        full = (self.run(unit * self.scale) - offset).norm()
        d = 1.0
        while d > 1e-12:
            r = float((self.run(unit * d) - offset).norm() / full)
            if r < 0.9:
                return d * d * (1 / (r * r) - 1)
            d /= 3
        return 0.0

    def _gates(self) -> list[Gate | None]:
        places = [(place, name) for place in ("after", "before") for name in _ACTIVATIONS]
        return [Gate(place=place, activation=name) for place, name in places] if self.gated else [None]

    def _eps_behind(self, gate: Gate | None, measured: float) -> float:
        """The norm's own eps: a gate before it scales what the measurement put in."""
        if gate is not None and gate.place == "before":
            measured *= float(getattr(F, gate.activation)(torch.tensor(_OPENING, dtype=torch.float64))) ** 2
        return exact_eps(self.original, measured)

    def _reproduces(self, spec: NormSpec) -> bool:
        """Whether the formula gives the module's output, at sizes where eps matters and where it does not."""
        small = max(spec.eps, 1e-12) ** 0.5
        z = torch.randn_like(self.x)
        for x in (self.x, torch.randn_like(self.x) * small):
            out = self.module(x, z) if self.gated else self.module(x)
            if not _close(formula(x, spec, self.parameters, z), out):
                return False
        return True

    def _casting(self, spec: NormSpec):
        """In which precision bfloat16 is computed: the form that agrees with the module on the most elements."""
        half = copy.deepcopy(self.module).to(torch.bfloat16)
        x, z = torch.randn(self.shape).bfloat16(), torch.randn(self.shape).bfloat16()
        parameters = dict(half.named_parameters())
        forms = ("float32", "float32-before-gain", "input") if spec.gain else ("float32", "input")
        with torch._C.DisableTorchFunction():  # here float32 means float32
            try:
                y = half(x, z) if self.gated else half(x)
            except _FAILURES:
                return "float32"
            if y.dtype != torch.bfloat16:
                return "float32"
            agree = {
                c: float((formula(x, spec.model_copy(update={"casting": c}), parameters, z) == y).float().mean())
                for c in forms
            }
        return max(agree, key=agree.get)


def randomised(module: nn.Module) -> nn.Module:
    """A float64 copy on the CPU with random parameters and plausible statistics."""
    real = copy.deepcopy(module).to_empty(device="cpu").double().eval()
    for p in real.parameters():
        p.requires_grad_(False).copy_(1 + 0.3 * torch.randn_like(p))
    for b in real.buffers():
        if b.is_floating_point():
            b.copy_(0.5 + torch.rand_like(b))
    return real


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= TOLERANCE * b.abs().max())
