"""One model type with its norms moved: what was planned, held against what the placement table says.

The moved model is looked at twice, and never asked what was done to it. It is traced again: streams must have the sums
they had, and each sum a norm behind it, unless the plan says that it refused some. And it is compared with the
original, whose blocks are evaluated by interception (`slots.py`) as the table has them: outputs, and gradients of the
parameters that the plan left as they were.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

import normswap
from normswap.apply.live import apply_plan
from normswap.errors import NormswapError, ObserveError, RefusedError
from normswap.observe.run import make_eager
from normswap.understand.normmap import NormMap
from normswap.understand.placement import Block, Stream
from normswap.verification.outputs import Outputs, check_alike, outputs_of, row_errors
from normswap.verification.precision import LiftFloat32
from sweep import targets
from sweep.examine import batches_of, build, pattern, quieten, rounded, short
from sweep.slots import Placement, placed

Inputs = Mapping[str, Any]
#: what a moved model must compute with every scale at 1, by the request's word
EXPECTED: dict[str, Callable[..., Placement]] = {
    "post": targets.normalised,
    "deepnorm": targets.normalised,
    "keel": partial(targets.normalised, keep_n_in=True),
    "layernorm-scaling": targets.unmoved,
}
#: what a record's `result` may be
RESULTS = ("confirmed", "refused", "WRONG", "unstable", "crashed", "nothing")
# relative, of a row of an output or of a whole gradient: by the dtype that the model's own code can run in
_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-3}
# how far the result of roundings may be from what the model itself makes of roundings
_UNSTABLE = 30


class Wrong(Exception):
    """The moved model is not what the table says; the message says where."""


def place(model_type: str, placement: str) -> dict[str, Any]:
    """A record of the type's small model with the norms of all its raw streams moved; never raises.

    Its `status` is as `examine` has it, and where it is `inspected`, its `result` is

    - `confirmed`: by the second trace and by interception; `moved` of the `asked` sums have moved, `error` and
      `gradient_error` are the worst, `checked` the number of gradients;
    - `refused`: nothing was moved, `refused` says why;
    - `unstable`: the random model turns roundings of its weights into errors as large;
    - `WRONG`, `crashed`: `why`;
    - `nothing`: the model has no raw stream.

    `refused` holds each refused block or stream with its reason, and the reason without what is the model's own.
    """
    quieten()
    record, model, inputs = build(model_type)
    if model is None:
        return record
    try:
        normmap = NormMap.of(model, inputs)
    except NormswapError as error:
        return record | {"status": "refused", "why": str(error)}
    except Exception as error:
        return record | {"status": "crashed", "why": short(error)}
    record |= {"status": "inspected", "placement": placement}
    streams = list(targets.raw_streams(normmap))
    if not streams:
        return record | {"result": "nothing"}
    record |= {"streams": len(streams), "asked": len(_asked(streams, placement))}
    if not record["asked"]:
        return record | {"result": "nothing"}
    names = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    try:
        plan = normswap.plan(model, placement=placement, partial=True, inputs=inputs)
    except RefusedError as error:
        reasons = dict(error.refusals) or {"": str(error)}
        return record | {"result": "refused", "refused": _reasons(reasons, names)}
    except Exception as error:
        return record | {"result": "crashed", "why": f"planning: {short(error)}"}
    record["refused"] = _reasons({refusal.site: refusal.reason for refusal in plan.refused}, names)
    try:
        original, dtype = _wide(model, inputs)
        moved = apply_plan(copy.deepcopy(original), plan)
        sums = _MOVED.get(placement, moved_sums)(normmap, NormMap.of(moved, inputs))
        if not sums:
            raise Wrong("something was planned, and no sum is found that moved")
        record["moved"] = len(sums)
        if len(sums) < record["asked"] and not plan.refused:
            raise Wrong(f"{record['asked'] - len(sums)} sums have not moved, and none was refused")
        expected = EXPECTED[placement](original, normmap, streams, only=sums)
        found = compare(original, moved, normmap, expected, batches_of(model, inputs))
    except Wrong as error:
        return record | {"result": "WRONG", "why": str(error)}
    except Exception as error:
        return record | {"result": "crashed", "why": short(error)}
    record |= found
    tolerance = _TOLERANCES[dtype]
    if max(found["error"], found["gradient_error"]) <= tolerance:
        return record | {"result": "confirmed"}
    noise = _noise(original, normmap, partial(EXPECTED[placement], streams=streams, only=sums), inputs)
    why = f"{found['worst']} is off by {max(found['error'], found['gradient_error']):.0e}; with its weights rounded "
    why += f"otherwise the placement parts from itself by {noise:.0e}"
    unstable = found["error"] < _UNSTABLE * noise and found["gradient_error"] < _UNSTABLE * max(noise, tolerance)
    return record | {"result": "unstable" if unstable else "WRONG", "why": why}


def _asked(streams: Sequence[Stream], placement: str) -> set[int]:
    """The sums that are to move (`Block.add`): in the first layer a damped norm is any norm."""
    blocks = [block for stream in streams for block in stream.blocks]
    return {block.add for block in blocks if placement != "layernorm-scaling" or (block.layer and block.n_in)}


def _pairs(before: NormMap, after: NormMap) -> Iterator[tuple[Stream, dict[int, Block]]]:
    """The raw streams of `before`, with what their sums are in `after`.

    Raises:
        Wrong: a stream has other sums than before.
    """
    modules = [[block.module for block in info.blocks] for info in after.streams]
    for stream in targets.raw_streams(before):
        own = [block.module for block in stream.blocks]
        if own not in modules:
            raise Wrong(f"the second trace has no stream with the {len(own)} sums from {own[0]} to {own[-1]}")
        at = modules.index(own)
        modules[at] = []  # a tower that runs twice has two such streams
        yield stream, dict(zip((block.add for block in stream.blocks), after.streams[at].blocks, strict=True))


def damped_sums(before: NormMap, after: NormMap) -> set[int]:
    """The sums of raw streams of `before` (`Block.add`) whose norms are damped in `after`. Raises Wrong."""
    return {add for _, now in _pairs(before, after) for add, block in now.items() if block.is_damped}


def moved_sums(before: NormMap, after: NormMap) -> set[int]:
    """The sums of raw streams of `before` (`Block.add`) whose step ends in a norm in `after`.

    Raises:
        Wrong: a stream has other sums than before.
    """
    found = set()
    for stream, now in _pairs(before, after):
        steps = [step for step in targets.steps(before, stream) if now[step[-1].add].n_out]
        if all(step[-1].n_out for step in steps):
            continue  # those that had a norm there before, and nothing has moved
        for step in steps:
            found.update(block.add for block in step)
    return found


#: what finds the sums that moved, where that is no norm behind them
_MOVED = {"layernorm-scaling": damped_sums}


def compare(
    original: nn.Module, moved: nn.Module, normmap: NormMap, placement: Placement, batches: Sequence[Inputs]
) -> dict[str, Any]:
    """The worst error of an output's row over the batches, and of a gradient on the first, relative."""
    error, worst = 0.0, ""
    for batch in batches:
        with LiftFloat32(), placed(original, normmap, placement):
            a = outputs_of(original, batch, True, "A")
        b = outputs_of(moved, batch, True, "B")
        check_alike(a, b)
        error, worst = max((error, worst), _worst(a, b))
    gradient_error, name, checked = _gradients(original, moved, normmap, placement, batches[0])
    worst = name if gradient_error > error else worst
    return {"error": error, "gradient_error": gradient_error, "checked": checked, "worst": worst}


def _worst(a: Outputs, b: Outputs) -> tuple[float, str]:
    found = []
    for name in a:
        mismatched, errors = row_errors(a[name].double(), b[name].double())
        if mismatched.any():
            raise Wrong(f"output {name} is finite in one of the two only")
        found.append((float(errors.max()) if len(errors) else 0.0, f"output {name}"))
    return max(found)


def _gradients(original, moved, normmap, placement, inputs) -> tuple[float, str, int]:
    """The largest error of a gradient, relative to the gradient, of parameters that are the same in both."""
    theirs = dict(moved.named_parameters())
    same = [
        name
        for name, p in original.named_parameters()
        if name in theirs and p.requires_grad and p.shape == theirs[name].shape and torch.equal(p, theirs[name])
    ]
    with LiftFloat32(), placed(original, normmap, placement):
        a = _gradient(original, same, inputs)
    with LiftFloat32():
        b = _gradient(moved, same, inputs)
    if a is None or b is None:
        return 0.0, "", 0
    largest = max((float(g.abs().max()) for g in a.values() if g.numel()), default=0.0)
    worst, checked = (0.0, ""), 0
    for name in same:
        if not a[name].numel():
            continue
        size = float(a[name].abs().max())
        if not a[name].isfinite().all() or max(size, float(b[name].abs().max())) <= 1e-9 * largest:
            continue  # rounding, as of the biases of keys
        checked += 1
        worst = max(worst, (float((a[name] - b[name]).abs().max()) / max(size, 1e-9 * largest), f"gradient of {name}"))
    return *worst, checked


def _gradient(model: nn.Module, names: list[str], inputs: Inputs) -> dict[str, torch.Tensor] | None:
    """Of all floating outputs, each entry with a weight of its own; None where the model does not let one through."""
    with torch.enable_grad():
        try:
            # the function itself runs without gradients
            outputs = outputs_of.__wrapped__(model, inputs, True, "model")
        except ObserveError:
            return None
        generator = torch.Generator().manual_seed(0)
        total = 0.0
        for output in outputs.values():
            weights = torch.randn(output.shape, generator=generator, dtype=output.dtype)
            total = total + (weights * output.nan_to_num(0.0, 0.0, 0.0)).sum()
        if not isinstance(total, torch.Tensor) or not total.requires_grad:
            return None
        parameters = dict(model.named_parameters())
        try:
            found = torch.autograd.grad(total, [parameters[name] for name in names], allow_unused=True)
        except RuntimeError:  # it writes over what its own gradient needs
            return None
    return {name: parameters[name].new_zeros(()) if g is None else g for name, g in zip(names, found, strict=True)}


def _noise(original: nn.Module, normmap: NormMap, expected: Callable[..., Placement], inputs: Inputs) -> float:
    """How far the placement, evaluated, is from itself when each weight is another by one part in 2^52."""
    results = []
    for model in (original, rounded(original)):
        with LiftFloat32(), placed(model, normmap, expected(model, normmap)):
            results.append(outputs_of(model, inputs, True, "A"))
    return _worst(*results)[0]


def _wide(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, torch.dtype]:
    """A copy in float64, or in float32 where the model's code does not run so."""
    wide = copy.deepcopy(model).double().eval()
    make_eager(wide)
    try:
        outputs_of(wide, inputs, True, "A")
    except ObserveError:
        return wide.float(), torch.float32
    return wide, torch.float64


def _reasons(refused: Mapping[str, str], names: set[str]) -> dict[str, list[str]]:
    return {site: [why, pattern(why, names)] for site, why in refused.items()}
