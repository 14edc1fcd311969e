"""An independent check of what `inspect` says of norms, on a running model: the spec's formula against each module.

The package tells a norm by what it does and reads no names. This audit does the opposite: it looks at classes, names
and attributes, and evaluates the formula of each spec in its own words on the inputs the model gives the module.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from normswap.norms.spec import NormSpec
from normswap.understand.normmap import NormMap
from normswap.verification.precision import LiftFloat32

#: torch's own norms, and the kind of each
KINDS = {
    nn.LayerNorm: "layernorm",
    nn.RMSNorm: "rmsnorm",
    nn.GroupNorm: "groupnorm",
    nn.modules.batchnorm._BatchNorm: "batchnorm",
    nn.modules.instancenorm._InstanceNorm: "groupnorm",
}
EPS = ("eps", "epsilon", "variance_epsilon", "norm_eps", "layer_norm_eps")
#: measured: about 1e-15 with internal float32 casts lifted; a model in float32 agrees to 1e-6
EXACT, ROUNDED = 1e-9, 2e-5


def audit(model: nn.Module, inputs: Mapping[str, Any], normmap: NormMap) -> list[str]:
    """Where `normmap` is wrong about a norm of `model`, in words; empty if it is right.

    Args:
        model: the model that was inspected, best in float64 and with random gains, biases and statistics.
        inputs: keyword arguments of one forward pass, in the model's dtype.
        normmap: what `inspect` says of it.

    Checked, for the norms that run on `inputs`:

    - the spec's formula on the module's real inputs gives its real output;
    - torch's own norms are sites of their kind, with torch's eps, gain, bias and axes;
    - eps is the module's own where it has one;
    - every module without children whose class is called a norm is a site, or a note names it, or it is an affine
      map, gives out another shape than it takes, or acts on parameters alone.
    """
    found: list[str] = []
    lift = LiftFloat32() if all(p.dtype != torch.float32 for p in model.parameters()) else nullcontext()
    with _watched(model, normmap.sites) as calls, torch.no_grad(), lift:
        model.eval()(**inputs)
    modules = dict(model.named_modules())
    for path, site in normmap.sites.items():
        found += [f"{path}: {what}" for what in _attributes(modules[path], site.spec)]
        if path not in calls:
            found.append(f"{path}: a site that does not run")
        for tensors, output in calls.get(path, []):
            found += [f"{path}: {what}" for what in _formula(modules[path], site.spec, tensors, output)]
    for path in calls.keys() - normmap.sites.keys():
        if not _explained(modules[path], path, calls[path], normmap):
            found.append(f"{path}: a {type(modules[path]).__name__} ran and is no site")
    return list(dict.fromkeys(found))


@contextmanager
def _watched(model: nn.Module, sites: Collection[str]):
    """While active, gather the inputs and the output of the first calls of every site and of what is called a norm."""
    calls: dict[str, list[tuple[list[torch.Tensor], Any]]] = {}
    parameters = {id(p) for p in model.parameters()}

    def watch(path: str):
        def hook(module, args, kwargs, output):
            tensors = [t.clone() for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
            acts = any(id(t) not in parameters for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor))
            if acts and len(calls.setdefault(path, [])) < 3:
                calls[path].append((tensors, output.clone() if isinstance(output, torch.Tensor) else output))

        return hook

    handles = [
        module.register_forward_hook(watch(path), with_kwargs=True)
        for path, module in model.named_modules()
        if path in sites
        or (
            next(module.children(), None) is None
            and ("norm" in type(module).__name__.lower() or isinstance(module, tuple(KINDS)))
        )
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _attributes(module: nn.Module, spec: NormSpec) -> list[str]:
    """What the module holds, against what the spec says."""
    wrong = []
    kind = next((kind for own, kind in KINDS.items() if isinstance(module, own)), spec.kind)
    if kind != spec.kind and type(module).forward in (own.forward for own in KINDS):
        wrong.append(f"is a {type(module).__name__} and was taken for a {spec.kind}")
    held = [value for name in EPS if isinstance(value := getattr(module, name, None), float)]
    if isinstance(module, nn.RMSNorm) and module.eps is None:
        held = [torch.finfo(torch.float64).eps, torch.finfo(torch.float32).eps]
    if held and not any(abs(spec.eps - value) <= 1e-6 * value for value in held):
        wrong.append(f"eps is {held[0]:g}, not {spec.eps:g}")
    if isinstance(module, tuple(KINDS)):
        affine = getattr(module, "weight", None) is not None, getattr(module, "bias", None) is not None
        if affine != (spec.weight is not None, spec.bias is not None):
            wrong.append(f"has weight and bias {affine}, not {spec.weight} and {spec.bias}")
        if affine[0] and spec.gain != "w" and type(module) in KINDS:
            wrong.append(f"has gain w, not {spec.gain}")
    if type(module) is nn.LayerNorm and spec.axes != tuple(range(-len(module.normalized_shape), 0)):
        wrong.append(f"normalises the last {len(module.normalized_shape)} axes, not {spec.axes}")
    if isinstance(module, nn.GroupNorm) and (spec.groups, spec.width * spec.groups) != (
        module.num_groups,
        module.num_channels,
    ):
        wrong.append(f"has {module.num_groups} groups of all channels, not {spec.groups} of {spec.width}")
    return wrong


def _formula(module: nn.Module, spec: NormSpec, tensors: list[torch.Tensor], output: Any) -> list[str]:
    if not isinstance(output, torch.Tensor) or not tensors or tensors[0].shape != output.shape:
        return ["its output is not one tensor of its input's shape"]
    try:
        expected = normalised(module, spec, tensors)
    except RuntimeError as error:
        return [f"the formula of {spec.kind} over {spec.axes} does not fit: {error}"]
    both = expected.isfinite() & output.isfinite()
    if (expected.isfinite() != output.isfinite()).any():
        return ["the formula and the module are finite at different places"]
    if not both.any():
        return []
    error = float((expected - output)[both].abs().max() / output[both].abs().max().clamp(min=1e-30))
    allowed = EXACT if output.dtype == torch.float64 else ROUNDED
    return [] if error <= allowed else [f"the formula of {spec.kind} is off by {error:.1e}"]


def normalised(module: nn.Module, spec: NormSpec, tensors: list[torch.Tensor]) -> torch.Tensor:
    """The formula of `spec` on a module's inputs `(x, gate)`, in float64 and in other words than the package's."""
    x = tensors[0].double()
    gate = spec.gate
    opened = None if gate is None else getattr(torch.nn.functional, gate.activation)(tensors[1].double())
    if gate is not None and gate.place == "before":
        x = x * opened
    if spec.kind == "batchnorm":
        y, along = _by_running_statistics(module, spec, x), (spec.axes[0] % x.ndim,)
    elif spec.kind == "groupnorm":
        n, c = x.shape[:2]
        rows = x.reshape(n, c // spec.width, -1)
        y, along = _standardised(rows, spec.eps, True).reshape(x.shape), (1,)
    else:
        along = tuple(axis % x.ndim for axis in spec.axes)
        moved = x.movedim(along, tuple(range(-len(along), 0)))
        rows = _standardised(moved.reshape(-1, spec.width), spec.eps, spec.kind == "layernorm")
        y = rows.reshape(moved.shape).movedim(tuple(range(-len(along), 0)), along)

    def placed(name: str) -> torch.Tensor:
        p = getattr(module, name).detach().double()
        shape = [1] * x.ndim
        if p.ndim == 1 and p.numel() > 1:
            shape[along[0]] = p.numel()
            return p.reshape(shape)
        return p

    if spec.weight is not None:
        y = y * (placed(spec.weight) + (1 if spec.gain == "1 + w" else 0))
    if spec.bias is not None:
        y = y + placed(spec.bias)
    return y * opened if gate is not None and gate.place == "after" else y


def _standardised(rows: torch.Tensor, eps: float, centred: bool) -> torch.Tensor:
    rows = rows - rows.mean(-1, keepdim=True) if centred else rows
    return rows / (rows.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def _by_running_statistics(module: nn.Module, spec: NormSpec, x: torch.Tensor) -> torch.Tensor:
    shape = [-1 if axis == spec.axes[0] % x.ndim else 1 for axis in range(x.ndim)]
    mean, var = (
        next(b for name, b in module.named_buffers() if part in name).double().reshape(shape)
        for part in ("mean", "var")
    )
    return (x - mean) / (var + spec.eps).sqrt()


def _explained(module: nn.Module, path: str, calls: list, normmap: NormMap) -> bool:
    """No norm in spite of its name (an affine map, a divisor alone), or one that the map's notes tell of."""
    if any(note.startswith(f"{path} ") for note in normmap.notes) or path in normmap.loose:
        return True
    if isinstance(module, tuple(KINDS)):
        return False
    if not calls:  # it acts on parameters alone
        return True
    x, *others = (t.double() if t.is_floating_point() else t for t in calls[0][0])
    module = copy.deepcopy(module).double()
    with torch.no_grad(), LiftFloat32():
        try:
            at = [module(factor * x, *others) for factor in (0, 1, 2)]
        except (RuntimeError, TypeError, AttributeError):
            return False
    if torch.is_tensor(at[0]) and at[0].shape != x.shape:
        return True
    return torch.is_tensor(at[0]) and torch.allclose(at[2] - at[1], at[1] - at[0], rtol=1e-9, atol=1e-12)
