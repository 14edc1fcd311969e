"""Norms on runs of what a module gives: on each head of queries or keys. Copied into the output: torch alone."""

import torch
from torch import nn


class NormedOutput(nn.Module):
    """Mixin: of what the class beside it gives, runs of the last axis go through norms that it holds.

    `normed_output` has by name of each norm where its runs begin, and how long they are.
    """

    def forward(self, *args, **kwargs):
        y = super().forward(*args, **kwargs)
        for name, (starts, width) in self.normed_output.items():
            runs = torch.tensor([*starts], device=y.device)[:, None] + torch.arange(width, device=y.device)
            given = getattr(self, name)(y[..., runs])
            y = y.index_copy(-1, runs.flatten(), given.flatten(-2))
        return y


def norm_output(module, runs):
    """Make `module`, which holds the norms, a `NormedOutput` form of its own class, in place."""
    cls = type(module)
    own = {"__module__": cls.__module__, "normed_output": runs}
    module.__class__ = type(f"NormedOutput{cls.__name__}", (NormedOutput, cls), own)
