"""Norms that a conversion has put into a model, told by their class.

Other norms are known by what they do to inputs. These cannot be: a frozen scale is a map like any other scale per
channel, and RepBN is an affine map as it runs. But a converted folder is opened by replaying its plan, which builds
modules of the very classes of `norms.kinds`, so that their class says what they are, with no guess.
"""

from __future__ import annotations

import torch
from torch import nn

from normswap.norms.kind import Fitted
from normswap.norms.kinds import KINDS, OFFERED
from normswap.norms.kinds.affine import Affine
from normswap.norms.probe import randomised
from normswap.norms.spec import NormSpec
from normswap.observe.trace import Trace


def _words() -> dict[type[nn.Module], str]:
    """By class the kind as it is asked for, of several forms one word; of what cannot be asked for, its own name."""
    found = {kind.module: kind.name for kind in KINDS.values() if issubclass(kind.module, Affine)}
    for kind in (kind for kind in OFFERED.values() if not kind.by_eps):
        found[kind.module] = kind.name
        for replaced, route in kind.routes.items():
            if isinstance(route, Fitted):
                found |= {KINDS[form].module: kind.name for form in kind.forms(replaced)}
    return found


_WORDS = _words()


def own_norms(model: nn.Module, trace: Trace) -> dict[str, NormSpec]:
    """What each norm is that a conversion put into `model` and that ran, by path."""
    modules = dict(model.named_modules())
    found: dict[str, NormSpec] = {}
    for call in trace.calls:
        module = modules[call.path]
        if type(module) not in _WORDS or call.path in found or (len(call.inputs), len(call.outputs)) != (1, 1):
            continue
        if trace.values[call.inputs[0]].shape == trace.values[call.outputs[0]].shape:
            found[call.path] = _spec(module, trace.values[call.inputs[0]].shape)
    return found


def _spec(module: Affine, shape: tuple[int, ...]) -> NormSpec:
    held = dict(module.named_parameters(recurse=False))
    return NormSpec(
        kind=_WORDS[type(module)],
        axes=(module.axis,),
        width=module.width,
        gain=module.gain,
        weight="weight" if "weight" in held else None,
        bias="bias" if "bias" in held else None,
        eps=module.eps if _sees_eps(module, shape) else 0.0,
        casting=module.casting,
    )


@torch.no_grad()
def _sees_eps(module: Affine, shape: tuple[int, ...]) -> bool:
    """Whether another eps gives another output: every such module has one, and not all use it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        real = randomised(module)
        x = torch.randn((2, *shape[1:]) if len(shape) > 1 else (2, *shape), dtype=torch.float64)
        before = real(x)
        real.eps = real.eps + 1
        return not torch.equal(real(x), before)
