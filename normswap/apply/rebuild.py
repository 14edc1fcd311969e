"""The functions that change a stock model's modules when it is built. Copied into the output, one by one as needed."""

import re

import torch
from torch import nn

from normswap.norms.centred import centre_input, centre_output
from normswap.norms.rms_norm import RMSNorm


def find(model, pattern):
    """Paths of the modules of `model` that `pattern` names; `*` stands for a layer's number."""
    regex = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
    paths = [path for path, _ in model.named_modules() if regex.fullmatch(path)]
    if not paths:
        raise ValueError(f"{type(model).__name__} has no module {pattern}: this file is for another version of it")
    return paths


def swap_norms(model, norms):
    """Put an RMSNorm in the place of each norm that `norms` names."""
    for pattern, arguments in norms.items():
        for path in find(model, pattern):
            model.set_submodule(path, RMSNorm(**arguments))


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


def grow_biases(model, sizes):
    """Give each module that `sizes` names a bias of that size; the stock class builds it without."""
    for pattern, size in sizes.items():
        for path in find(model, pattern):
            model.get_submodule(path).bias = nn.Parameter(torch.zeros(size))
