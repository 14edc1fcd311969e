"""The functions that change a stock model's modules when it is built. Copied into the output, one by one as needed."""

import re

import torch
from torch import nn

from normswap.norms.centred import centre_input, centre_output
from normswap.norms.kinds import MODULES
from normswap.norms.normed import norm_output


def find(model, pattern):
    """Paths of the modules of `model` that `pattern` names; `*` stands for a layer's number."""
    regex = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
    paths = [path for path, _ in model.named_modules() if regex.fullmatch(path)]
    if not paths:
        raise ValueError(f"{type(model).__name__} has no module {pattern}: this file is for another version of it")
    return paths


def new_norm(kind, **arguments):
    """A norm with neutral parameters."""
    return MODULES[kind](**arguments)


def swap_norms(model, norms):
    """Put another norm in the place of each that `norms` names."""
    for pattern, arguments in norms.items():
        for path in find(model, pattern):
            put_norm(model, path, new_norm(**arguments))


def put_norm(model, path, norm):
    """Put `norm` in the place of the module at `path`; some want to see what the model is called with."""
    model.set_submodule(path, norm)
    if hasattr(norm, "watch"):
        norm.watch(model)


def add_norms(model, norms):
    """Put norms where there were none; `norms` names their new paths."""
    for pattern, arguments in norms.items():
        parents, _, name = pattern.rpartition(".")
        for path in find(model, parents):
            model.get_submodule(path).add_module(name, new_norm(**arguments))


def rewrite_modules(model, classes):
    """Give each module that `classes` names that form of its class."""
    for pattern, cls in classes.items():
        for path in find(model, pattern):
            module = model.get_submodule(path)
            if not isinstance(module, cls):
                module.__class__ = cls


def set_scales(model, scales):
    """Set the numbers that rewritten modules multiply by."""
    for pattern, numbers in scales.items():
        for path in find(model, pattern):
            vars(model.get_submodule(path)).update(numbers)


def centre_outputs(model, axes):
    """Centre the output of each module that `axes` names along the axis it gives."""
    for pattern, axis in axes.items():
        for path in find(model, pattern):
            centre_output(model.get_submodule(path), axis)


def centre_inputs(model, axes):
    """Centre the first input of each module that `axes` names along the axis it gives."""
    for pattern, axis in axes.items():
        for path in find(model, pattern):
            centre_input(model.get_submodule(path), axis)


def norm_outputs(model, runs):
    """Put norms on runs of what each module that `runs` names gives."""
    for pattern, its in runs.items():
        for path in find(model, pattern):
            norm_output(model.get_submodule(path), its)


def grow_biases(model, sizes):
    """Give each module that `sizes` names a bias of that size; the stock class builds it without."""
    for pattern, size in sizes.items():
        for path in find(model, pattern):
            model.get_submodule(path).bias = nn.Parameter(torch.zeros(size))


def keep_whole(model):
    """Modules that are to stay on one device are known by class name: new classes count as those they are made of."""
    for module in model.modules():
        listed = set(getattr(module, "_no_split_modules", None) or ())
        for part in module.modules() if listed else ():
            if listed & {base.__name__ for base in type(part).__mro__}:
                module._no_split_modules = {*module._no_split_modules, type(part).__name__}
