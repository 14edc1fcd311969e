"""What a model gives out: every floating tensor of its output by name, and how far two models' are apart."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from normswap.errors import ObserveError, VerificationError
from normswap.observe.outputs import named_tensors
from normswap.verification.metrics import Record, all_finite, ratio
from normswap.verification.precision import LiftFloat32

Inputs = Mapping[str, object]
Outputs = dict[str, torch.Tensor]

_SEED = 0


class OutputMetrics(Record):
    """One further output of model B against model A.

    Attributes:
        name: where it stands in the output: keys and places in tuples, joined by dots.
        rows: rows compared (along the last axis).
        error_max: largest `||b - a||` of a row, relative to `||a||` of the row or to its root mean square over the
            output, whichever is larger.
        mismatched: rows of which some value is finite in one model only; they count in nothing else.
    """

    name: str
    rows: int
    error_max: float
    mismatched: int = 0


@torch.no_grad()
def outputs_of(model: nn.Module, inputs: Inputs, lifted: bool, name: str) -> Outputs:
    """Every floating output of `model`, in order, by name; what is kept for generation (caches) is left out.

    Noise that the model draws is the same in each call: the generators are seeded before, and restored after.

    Args:
        inputs: keyword arguments of `forward`; tensors are moved to the model's device, floating ones to its dtype.
        lifted: run under `LiftFloat32`.
        name: of the model, for errors.

    Raises:
        ObserveError: the model fails, or gives no floating tensor.
    """
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    moved = {key: to_model(value, parameter) for key, value in inputs.items()}
    try:
        devices = [parameter.device] if parameter.is_cuda else []
        with torch.random.fork_rng(devices), LiftFloat32() if lifted else nullcontext():
            torch.manual_seed(_SEED)
            output = model(**moved)
    except Exception as error:
        shapes = ", ".join(f"{key} {tuple(v.shape)}" for key, v in inputs.items() if isinstance(v, torch.Tensor))
        raise ObserveError(
            f"model {name} ({type(model).__name__}) fails in {parameter.dtype} on {shapes}: "
            f"{type(error).__name__}: {error}. Try another dtype, fewer tokens, or another device."
        ) from error
    found = {key: t for key, t in named_tensors(output) if t.is_floating_point() and t.numel()}
    if not found:
        raise ObserveError(f"model {name} ({type(model).__name__}) returns no floating tensor: nothing to compare.")
    return found


def main_output(outputs: Outputs) -> str:
    """The name of the output that people look at: the logits, or else the first that has rows, or else the first."""
    rows = (name for name, t in outputs.items() if t.ndim >= 2)
    return "logits" if "logits" in outputs else next(rows, next(iter(outputs)))


def check_alike(a: Outputs, b: Outputs) -> None:
    """Raise VerificationError where two models' outputs have not the same names and shapes."""
    shapes_a, shapes_b = ({name: tuple(t.shape) for name, t in found.items()} for found in (a, b))
    for name in dict.fromkeys([*a, *b]):
        if shapes_a.get(name) != shapes_b.get(name):
            raise VerificationError(
                f"expected outputs of one shape, found {shapes_a.get(name, 'none')} from A and "
                f"{shapes_b.get(name, 'none')} from B ({name}). Compare checkpoints of the same task and size."
            )


def to_model(value: object, parameter: torch.Tensor) -> object:
    if isinstance(value, list | tuple):
        return type(value)(to_model(part, parameter) for part in value)
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)


@dataclass
class _Totals:
    rows: int = 0
    error_max: float = 0.0
    mismatched: int = 0


class OutputComparison:
    """Gathers the measurements of all outputs but the main one over batches; keeps three numbers for each."""

    def __init__(self):
        self._totals: dict[str, _Totals] = {}

    def add(self, a: Outputs, b: Outputs, without: Collection[str]) -> None:
        """Take in one batch of outputs that `check_alike` has passed."""
        for name in a:
            if name not in without:
                _accumulate(self._totals.setdefault(name, _Totals()), a[name], b[name].to(a[name].device))

    def metrics(self) -> tuple[OutputMetrics, ...]:
        return tuple(OutputMetrics(name=name, **vars(totals)) for name, totals in self._totals.items())


def _accumulate(totals: _Totals, a: torch.Tensor, b: torch.Tensor) -> None:
    mismatched, error = row_errors(a.detach().double(), b.detach().double())
    totals.mismatched += int(mismatched.sum())
    totals.rows += len(error)
    totals.error_max = max(totals.error_max, error.max().item() if len(error) else 0.0)


def row_errors(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows of two tensors `(.., width)` are not finite alike, and how far the others are apart.

    An error is relative to the row in `a`, or to a row's root mean square where that is larger: in a row that is
    nothing but rounding there is nothing to compare. Values that are not finite in either count as equal.
    """
    a, b = (t.reshape(-1, t.shape[-1] if t.ndim else 1) for t in (a, b))
    if all_finite(a) and all_finite(b):
        mismatched, whole, part = torch.zeros(len(a), dtype=torch.bool, device=a.device), a, b - a
    else:
        finite = a.isfinite() & b.isfinite()
        mismatched = ~(finite | (a == b) | (a.isnan() & b.isnan())).all(-1)
        whole = torch.where(finite, a, 0.0)[~mismatched]
        part = torch.where(finite, b - a, 0.0)[~mismatched]
    size = whole.norm(dim=-1)
    typical = size.square().mean().sqrt() if len(size) else size.new_zeros(())
    return mismatched, ratio(part.norm(dim=-1), size.clamp(min=typical))
