"""The kernels hub (package `kernels`): layers by name, downloaded or from a repository object of one's own.

transformers gives all classes of one name one layer, whatever they compute. Here a name is one semantics:

    RMSNorm                     one rounding at the end              RMSNorm-1+w        gain 1 + w
    RMSNorm-rounded-before-gain rounded before the gain (Llama)      LayerNorm          ...

so that `kernels.register_kernel_mapping({"RMSNorm-rounded-before-gain": {"cuda": repository}})` says which layer serves
it. Without such, `_DEFAULT` is asked. As of any kernel, what a layer computes is measured before it is used.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import nn

from normswap.kernels.backend import Abilities, Backend, Kernel
from normswap.kernels.call import Call, Norm


class Hub(Backend):
    name = "hub"
    about = "layers of the kernels hub, by semantics"
    package = module = "kernels"
    abilities = Abilities(
        devices=("cpu", "cuda", "rocm", "xpu", "mps", "npu"),
        forms=("norm",),
        compile="as the layer says",
        distributed="as the layer does",
    )

    def rejects(self, call: Call) -> str | None:
        found = super().rejects(call)
        if found is not None:
            return found
        try:
            layer = _layer(layer_name(call.norm), call.device)
        except Exception as error:  # a download that failed, a build for another platform: the library's many errors
            return f"{layer_name(call.norm)} could not be loaded: {' '.join(str(error).split())}"
        return f"no layer is registered as {layer_name(call.norm)} for {call.device}" if layer is None else None

    def build(self, call: Call) -> Kernel:
        layer = _layer(layer_name(call.norm), call.device)
        eps = call.norm.eps

        def run(x, weight, bias):
            host = _Host(weight, bias, eps)
            return layer(host, x)

        return run


class _Host:
    """What a layer's forward reads of its module: layers of the hub have no state of their own."""

    def __init__(self, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float):
        self.weight, self.bias = weight, bias
        self.eps = self.variance_epsilon = eps


def layer_name(norm: Norm) -> str:
    """The name by which a layer for such norms is registered."""
    name = {"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}[norm.kind]
    name += {"float32": "", "float32-before-gain": "-rounded-before-gain", "input": "-in-input-dtype"}[norm.casting]
    return name + {None: "-no-gain", "w": "", "1 + w": "-1+w"}[norm.gain] + ("-bias" if norm.bias else "")


def _default() -> dict:
    """What is asked where nothing is registered: the layer that transformers gives to Llama's norm."""
    from kernels import LayerRepository

    liger = LayerRepository(repo_id="kernels-community/liger-kernels", layer_name="LigerRMSNorm", version=3)
    return {"RMSNorm-rounded-before-gain": {device: liger for device in ("cuda", "rocm", "npu")}}


@cache
def _layer(name: str, device: str):
    """The forward of the layer registered as `name`, a plain function of (module, x); None: there is none."""
    from kernels import KernelizeFallback, Mode, kernelize, replace_kernel_forward_from_hub, use_kernel_mapping

    def found() -> object | None:
        asks = type("Asks", (nn.Module,), {"forward": lambda self, x: x})
        plain = asks.forward
        replace_kernel_forward_from_hub(asks, name)
        log = logging.getLogger("kernels.layer.layer")
        level = log.level
        log.setLevel(logging.ERROR)  # that nothing is registered is no news: it is what is asked
        try:
            module = kernelize(asks(), mode=Mode.TRAINING, device=device, use_fallback=KernelizeFallback.DEFAULT)
        finally:
            log.setLevel(level)
        forward = module.forward.__func__
        return None if forward is plain else forward

    registered = found()
    if registered is not None:
        return registered
    default = _default()
    if name not in default:
        return None
    with use_kernel_mapping(default):
        return found()


BACKEND = Hub()
