"""How the papers and repositories of DyT, Derf, frozen scales and RepBN begin, for comparison: nothing is fitted.

Where a paper leaves a choice open, or its choice does badly on a trained model, all are made and the best one counts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

import normswap
from normswap.apply.live import apply_plan
from normswap.calibration.costs import cost
from normswap.calibration.taps import Tap, rows, watch

SLOPES = (0.2, 0.5, 0.8)  # DyT's own 0.5, and what its authors take for Llamas of several widths


@torch.no_grad()
def starts(model: nn.Module, kind: str, batches: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, nn.Module]]:
    """Forms of `model` with norms of `kind` as they begin, in words; statistics are measured on `batches`."""
    plan = normswap.plan(model, norm=kind)
    paths = plan.converted
    seen = [watch(model, [Tap(path, "input") for path in paths], inputs) for inputs in batches]
    x = {
        path: torch.cat([rows(s[Tap(path, "input")], i) for s, i in zip(seen, batches, strict=True)]) for path in paths
    }

    def made(change, words: str) -> tuple[str, nn.Module]:
        twin = apply_plan(copy.deepcopy(model), plan)
        for path in paths:
            change(twin.get_submodule(path), x[path].double())
        return words, twin

    def slope(value: float, copied: bool):
        def change(norm, _):
            norm.alpha.fill_(value)
            if not copied:
                norm.weight.fill_(1.0)
                norm.bias.zero_()

        return change

    def frozen(norm, x):
        around = x - x.mean(-1, keepdim=True) if "Centred" in type(norm).__name__ else x
        norm.scale.fill_(around.square().mean(-1).sqrt().mean())

    def batch_norm(eta: float):
        def change(norm, x):
            norm.eta.fill_(eta)
            norm.bn_mean.copy_(x.mean(0))
            norm.bn_var.copy_(x.var(0))

        return change

    if kind in ("dyt", "derf"):
        for value in SLOPES:
            for copied in (True, False):
                yield made(slope(value, copied), f"a = {value}, {'gains copied' if copied else 'gains 1'}")
    elif kind == "none":
        yield made(frozen, "s = mean scale, gains copied")
    else:
        for eta in (1.0, 0.0):
            yield made(batch_norm(eta), f"eta = {eta:g}, gains copied")


def best_start(
    model: nn.Module, kind: str, batches: Sequence[Mapping[str, Any]], measured: Sequence[Mapping[str, Any]]
) -> tuple[float, str]:
    """KL to the model of the best of `starts` on `measured`, in nats per token, and which one it is."""
    return min((cost(model, twin, measured), words) for words, twin in starts(model, kind, batches))
