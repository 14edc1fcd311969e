"""Observe: one forward pass under a recorder gives a Trace. No weights are read.

The model lives on the meta device. What depends on no parameter (positions, masks, routing bookkeeping) is computed
for real, so that control flow on it goes the way it goes in the running model; what depends on a parameter has a
shape but no values. Where the code asks for such a value all the same, it gets a placeholder.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import contextmanager, suppress

import torch
from torch import nn
from torch.distributions import Distribution
from torch.utils._pytree import tree_map

from normswap.errors import ObserveError
from normswap.observe.outputs import named_tensors
from normswap.observe.placeholders import META, Hits
from normswap.observe.recorder import Recorder, tensors_in
from normswap.observe.trace import Trace


def observe(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> Trace:
    """Run `model` once and record every torch call.

    Args:
        model: in eager attention. Parameters may be anywhere; a twin on the meta device is what runs.
        inputs: keyword arguments of `forward`; floating ones of any dtype, the twin computes in float32.

    Raises:
        ObserveError: the forward pass failed; the message names the module and the error.
    """
    inputs = tree_map(lambda x: x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x, dict(inputs))
    try:
        trace = _record(meta_twin(model), inputs, "ends")
    except ObserveError:
        # the last of a kind may be one that never comes up (an index kept for "none of the experts")
        trace = _record(meta_twin(model), inputs, "first")
    if trace.notes and _idle_parameters(model, trace):
        # what was not reached may hide behind a choice that depends on values: take every branch of it
        with suppress(ObserveError):
            trace = _record(meta_twin(model), inputs, "every")
    return trace


def _idle_parameters(model: nn.Module, trace: Trace) -> bool:
    used = {trace.values[v].name for op in trace.operations for v in op.inputs}
    return any(name not in used for name, _ in model.named_parameters())


def _record(twin: nn.Module, inputs: Mapping[str, torch.Tensor], hits: Hits) -> Trace:
    recorder = Recorder(twin, inputs, hits)
    try:
        with torch.no_grad(), _distributions_unchecked(), recorder.module_hooks(), recorder:
            output = twin(**inputs)
    except Exception as error:
        where = recorder.stack[-1] if recorder.stack else ""
        raise ObserveError(
            f"the model could not be run once for observation: {type(error).__name__} in module "
            f"'{where}' ({type(twin).__name__}): {error}. Expected a forward pass on {_describe(inputs)}; "
            f"pass other `inputs` if the model wants them."
        ) from error
    trace = recorder.trace
    tensors = [t for t in tensors_in(output) if id(t) in recorder.ids]
    trace.outputs = tuple(dict.fromkeys(recorder.ids[id(t)] for t in tensors))
    trace.names = {recorder.ids[id(t)]: name for name, t in named_tensors(output) if id(t) in recorder.ids}
    return trace


@contextmanager
def _distributions_unchecked():
    """Torch's distributions check the values they are given; here there are none to check."""
    checked = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(checked)


def meta_twin(model: nn.Module) -> nn.Module:
    """A copy of the model's structure whose parameters and buffers are on the meta device, in eval mode.

    Float buffers lose their values like parameters; integer ones keep theirs. Tied parameters stay tied. All floats
    are float32, so that no cast to a shorter dtype hides in the trace.
    """
    memo: dict[int, object] = {}
    for p in model.parameters():
        dtype = torch.float32 if p.is_floating_point() else p.dtype
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device=META, dtype=dtype), requires_grad=False)
    for b in model.buffers():
        if b.is_floating_point():
            memo[id(b)] = torch.empty_like(b, device=META, dtype=torch.float32)
    for module in model.modules():  # results of an earlier pass that modules keep
        memo |= {id(t): t.detach() for t in tensors_in(vars(module)) if not t.is_leaf}
    twin = copy.deepcopy(model, memo).eval()
    make_eager(twin)
    return twin


def make_eager(model: nn.Module) -> None:
    """Attention and experts in plain torch calls, in place: kernels can be neither watched nor run in float64."""
    for switch in ("set_attn_implementation", "set_experts_implementation"):
        if hasattr(model, switch):
            getattr(model, switch)("eager")


def _describe(inputs: Mapping[str, torch.Tensor]) -> str:
    return ", ".join(f"{k} {tuple(v.shape)}" for k, v in inputs.items() if isinstance(v, torch.Tensor))
