"""Scaffolding of a taper: modules that go from the exact form of a site to its target form while a model trains.

Each has a buffer `ramp`, of shape `(1,)`, which is saved with the weights and counts in evaluation too: 1 is the exact
form, 0 the target. RepBN (`norms.kinds.repbn`) has such a buffer of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from normswap.errors import RecipeError


class Tapered(nn.Module):
    """`ramp old(x) + (1 - ramp) new(x)`: one norm becomes another one."""

    def __init__(self, old: nn.Module, new: nn.Module):
        super().__init__()
        self.old, self.new = old, new
        like = next((t for t in (*new.parameters(), *new.buffers()) if t.is_floating_point()), torch.zeros(()))
        self.register_buffer("ramp", torch.ones(1, device=like.device))

    def forward(self, x):
        y = self.new(x)
        return torch.lerp(y, self.old(x).to(y.dtype), self.ramp.to(y.dtype))

    def __getattr__(self, name):
        # code of the model may ask a norm for its weight's dtype, say
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("old"), name)


class TaperedLane(nn.Module):
    """The skip of a block, from `[n, s]`, a normalised stream with its scale (`norms.kinds.carried`).

    `n s^ramp c^(1 - ramp)`: at first each token has its own scale; in the end all have the constant c, and the block is
    post-norm. c is trained as its logarithm, `log_scale` of shape `(1,)`.
    """

    def __init__(self, scale: float, like: torch.Tensor):
        super().__init__()
        self.log_scale = nn.Parameter(torch.full((1,), scale, dtype=like.dtype, device=like.device).log())
        self.register_buffer("ramp", torch.ones(1, device=like.device))

    def forward(self, x):
        s = x[..., -1:].to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.exp(torch.lerp(self.log_scale.to(s.dtype), s.log(), self.ramp.to(s.dtype)))
        return x[..., :-1] * scale.to(x.dtype)

    @property
    def scale(self) -> float:
        """c."""
        return float(self.log_scale.detach().double().exp())


def ramped(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model that have a ramp, by path."""
    inner = {name for name, module in model.named_modules() if isinstance(module, Tapered)}
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module._buffers.get("ramp"), torch.Tensor)
        and not any(path.startswith(f"{outer}.") for outer in inner)
    }


@torch.no_grad()
def set_ramps(model: nn.Module, ramps: Mapping[str, float]) -> None:
    """Set the ramp of each of the modules at these paths."""
    for path, ramp in ramps.items():
        model.get_submodule(path).ramp.fill_(ramp)


def turns(sites: Sequence[str], order: str | Sequence[str]) -> list[int]:
    """Which turn each site takes, given the sites in the order in which they run (`recipe.Taper.order`).

    Raises:
        RecipeError: a pattern that fits no site, or a site that no pattern fits.
    """
    if order == "together":
        return [0] * len(sites)
    if order in ("forward", "backward"):
        numbers = list(range(len(sites)))
        return numbers if order == "forward" else numbers[::-1]
    found = [next((i for i, pattern in enumerate(order) if fnmatchcase(site, pattern)), None) for site in sites]
    if left := [site for site, turn in zip(sites, found, strict=True) if turn is None]:
        raise RecipeError(f"taper.order: no pattern fits {', '.join(left[:5])} ({len(left)} of {len(sites)} sites).")
    if idle := [pattern for i, pattern in enumerate(order) if i not in found]:
        taken = any(fnmatchcase(site, idle[0]) for site in sites)
        which = "that a pattern before it does not fit" if taken else f"of {', '.join(sites)}"
        raise RecipeError(f"taper.order: '{idle[0]}' fits no site {which}.")
    return [turn for turn in found if turn is not None]
