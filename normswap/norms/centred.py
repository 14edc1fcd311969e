"""Explicit centring of what a module gives or takes. This file is copied into the output, so it imports torch alone."""

import torch
from torch import nn


class CentredOutput(nn.Module):
    """Mixin: what the class beside it computes (of a tuple, the first), less its mean along `centred_output`."""

    def forward(self, *args, **kwargs):
        given = super().forward(*args, **kwargs)
        y, *rest = given if isinstance(given, tuple) else (given,)
        y = y - y.mean(self.centred_output, keepdim=True)
        return (y, *rest) if isinstance(given, tuple) else y


def centre_output(module, axis=-1):
    """Make `module` a `CentredOutput` form of its own class, in place: same parameters, same names, same hooks."""
    cls = type(module)
    own = {"__module__": cls.__module__, "centred_output": axis}
    module.__class__ = type(f"CentredOutput{cls.__name__}", (CentredOutput, cls), own)


class CentredInput(nn.Module):
    """Mixin: what the class beside it computes of its first tensor less its mean along the axis `centred_input`."""

    def forward(self, *args, **kwargs):
        given = [*enumerate(args), *kwargs.items()]
        first, x = next((key, value) for key, value in given if isinstance(value, torch.Tensor))
        x = x - x.mean(self.centred_input, keepdim=True)
        if isinstance(first, int):
            args = (*args[:first], x, *args[first + 1 :])
        else:
            kwargs[first] = x
        return super().forward(*args, **kwargs)


def centre_input(module, axis=-1):
    """Make `module` a `CentredInput` form of its own class, in place: same parameters, same names, same hooks."""
    cls = type(module)
    own = {"__module__": cls.__module__, "centred_input": axis}
    module.__class__ = type(f"CentredInput{cls.__name__}", (CentredInput, cls), own)


def plain_class(cls):
    """The class that a centred form was made of; any other class is itself."""
    while {"centred_output", "centred_input"} & vars(cls).keys():
        cls = cls.__bases__[1]
    return cls


def rebased(cls, new):
    """What `cls`, a centred form of some class or itself such a class, is with `new` in that class's place."""
    if cls is plain_class(cls):
        return new
    mixin, inner = cls.__bases__
    below = rebased(inner, new)
    axes = {name: value for name, value in vars(cls).items() if name in ("centred_output", "centred_input")}
    return type(f"{mixin.__name__}{below.__name__}", (mixin, below), {"__module__": new.__module__, **axes})
