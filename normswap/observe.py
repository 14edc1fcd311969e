"""Observe: one forward pass under a recorder gives a Trace. No weights are read.

The model lives on the meta device. What depends on no parameter (positions, masks, routing bookkeeping) is computed
for real, so that control flow on it goes the way it goes in the running model; what depends on a parameter has a
shape but no values. Where the code asks for such a value all the same, it gets a placeholder.
"""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from normswap.errors import ObserveError
from normswap.trace import ModuleCall, Operation, Ref, Span, Trace, Value

META = torch.device("meta")
# frames of these folders are plumbing: the span of a call is that of the first frame outside them
_PLUMBING = (str(Path(torch.__file__).parent), str(Path(__file__)), str(Path(contextmanager.__code__.co_filename)))


def observe(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> Trace:
    """Run `model` once and record every torch call.

    Args:
        model: in eager attention. Parameters may be anywhere; a twin on the meta device is what runs.
        inputs: keyword arguments of `forward`.

    Raises:
        ObserveError: the forward pass failed; the message names the module and the error.
    """
    twin = meta_twin(model)
    trace = _record(twin, inputs, every_hit=False)
    if trace.notes and _idle_parameters(twin, trace):
        # what was not reached may hide behind a choice that depends on values: take every branch of it
        trace = _record(meta_twin(model), inputs, every_hit=True)
    return trace


def _idle_parameters(model: nn.Module, trace: Trace) -> bool:
    used = {trace.values[v].name for op in trace.operations for v in op.inputs}
    return any(name not in used for name, _ in model.named_parameters())


def _record(twin: nn.Module, inputs: Mapping[str, torch.Tensor], every_hit: bool) -> Trace:
    recorder = Recorder(twin, every_hit)
    try:
        with torch.no_grad(), recorder.module_hooks(), recorder:
            output = twin(**inputs)
    except Exception as error:
        where = recorder.stack[-1] if recorder.stack else ""
        raise ObserveError(
            f"the model could not be run once for observation: {type(error).__name__} in module "
            f"'{where}' ({type(twin).__name__}): {error}. Expected a forward pass on {_describe(inputs)}; "
            f"pass other `inputs` if the model wants them."
        ) from error
    trace = recorder.trace
    tensors = [t for t in _tensors(output) if id(t) in recorder.ids]
    trace.outputs = tuple(dict.fromkeys(recorder.ids[id(t)] for t in tensors))
    return trace


def meta_twin(model: nn.Module) -> nn.Module:
    """A copy of the model's structure whose parameters and buffers are on the meta device, in eval mode.

    Float buffers lose their values like parameters; integer ones keep theirs. Tied parameters stay tied. Parameters
    are float32, so that no cast to a shorter dtype hides in the trace.
    """
    memo: dict[int, object] = {}
    for p in model.parameters():
        dtype = torch.float32 if p.is_floating_point() else p.dtype
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device=META, dtype=dtype), requires_grad=False)
    for b in model.buffers():
        if b.is_floating_point():
            memo[id(b)] = torch.empty_like(b, device=META)
    twin = copy.deepcopy(model, memo).eval()
    for switch in ("set_attn_implementation", "set_experts_implementation"):
        if hasattr(twin, switch):
            getattr(twin, switch)("eager")
    return twin


def _describe(inputs: Mapping[str, torch.Tensor]) -> str:
    return ", ".join(f"{k} {tuple(v.shape)}" for k, v in inputs.items() if isinstance(v, torch.Tensor))


def _tensors(tree: object) -> list[torch.Tensor]:
    """All tensors in nested containers, dataclasses and model outputs included (caches hold none that matter here)."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, Mapping):
        return [t for value in tree.values() for t in _tensors(value)]
    if isinstance(tree, list | tuple):
        return [t for value in tree for t in _tensors(value)]
    return []


class Recorder(TorchFunctionMode):
    """Notes every torch call: function, arguments, results, module and source span."""

    def __init__(self, model: nn.Module, every_hit: bool):
        super().__init__()
        self.every_hit = every_hit
        self.trace = Trace()
        self.stack: list[str] = []
        self.modules = list(model.modules())
        self.ids: dict[int, int] = {}
        self.keep: list[torch.Tensor] = []  # an id stays unique only while its tensor lives
        self.storages: dict[int, set[int]] = {}
        self.spans: dict[tuple, Span] = {}
        self.paths = {id(m): path for path, m in model.named_modules()}
        for name, p in model.named_parameters():
            self._new_value(p, "parameter", name)
        for name, b in model.named_buffers():
            self._new_value(b, "buffer", name)

    # -- values ------------------------------------------------------------------------------------------------

    def _new_value(self, tensor: torch.Tensor, kind: str, name: str | None = None, producer: int | None = None) -> int:
        index = len(self.trace.values)
        with torch._C.DisableTorchFunction():  # our own calls are no part of the model
            real = tensor.detach().clone() if kind == "constant" else None
            self.storages.setdefault(tensor.untyped_storage()._cdata, set()).add(id(tensor))
        self.trace.values.append(Value(index, tuple(tensor.shape), tensor.dtype, kind, name, real, producer))
        self.ids[id(tensor)] = index
        self.keep.append(tensor)
        return index

    def _value(self, tensor: torch.Tensor) -> int:
        if id(tensor) not in self.ids:
            self._new_value(tensor, "computed" if tensor.is_meta else "constant")
        return self.ids[id(tensor)]

    def _forget_aliases(self, tensor: torch.Tensor) -> None:
        """After a write, other tensors on the same memory hold what nobody traced: they become unknown values."""
        for other in self.storages.get(tensor.untyped_storage()._cdata, set()) - {id(tensor)}:
            self.ids.pop(other, None)

    # -- modules -----------------------------------------------------------------------------------------------

    @contextmanager
    def module_hooks(self):
        """Note each module call of the model while active."""
        open_calls: list[ModuleCall] = []

        def enter(module, args, kwargs):
            inputs = tuple(self._value(t) for t in _tensors((args, kwargs)))
            path, start = self.paths[id(module)], len(self.trace.operations)
            parent = self.stack[-1] if self.stack else ""
            call = ModuleCall(path, inputs, start=start, parent=parent, span=self._span())
            self.stack.append(path)
            open_calls.append(call)
            self.trace.calls.append(call)

        def leave(module, args, kwargs, output):
            self.stack.pop()
            call = open_calls.pop()
            call.outputs = tuple(self._value(t) for t in _tensors(output))
            call.end = len(self.trace.operations)

        handles = []
        try:
            for module in self.modules:
                handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
                handles.append(module.register_forward_hook(leave, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    # -- calls -------------------------------------------------------------------------------------------------

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [t for t in leaves if isinstance(t, torch.Tensor)]
        inputs = [self._value(t) for t in tensors]
        self._surrender_target(function, leaves, tensors)
        versions = [t._version for t in tensors]
        returned, known = self._run(function, args, kwargs, tensors)

        made = [t for t in _tensors(returned) if id(t) not in self.ids]
        changed = [t for t, version in zip(tensors, versions, strict=True) if t._version != version]
        if not made and not changed:
            return returned  # nothing new: a number was read, or an input itself came back
        index = len(self.trace.operations)
        mutated = tuple(dict.fromkeys(self.ids[id(t)] for t in changed))
        written = {id(t): t for t in changed}.values()
        for t in written:
            self._forget_aliases(t)
        outputs = tuple(
            self._new_value(t, "constant" if known and not t.is_meta else "computed", producer=index)
            for t in [*made, *written]
        )
        refs = iter(inputs)
        self.trace.operations.append(
            Operation(
                index=index,
                function=function,
                leaves=[Ref(next(refs)) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves],
                spec=spec,
                inputs=tuple(dict.fromkeys(inputs)),
                outputs=outputs,
                mutated=mutated,
                module=self.stack[-1] if self.stack else "",
                span=self._span(),
            )
        )
        return returned

    def _surrender_target(self, function, leaves, tensors) -> None:
        """A real tensor about to be written with unknown values becomes a meta tensor, keeping its identity."""
        first = leaves[0] if leaves else None
        if not isinstance(first, torch.Tensor) or first.is_meta or not any(t.is_meta for t in tensors):
            return
        name = getattr(function, "__name__", "")
        if name == "__setitem__" or (name.startswith("__i") and name.endswith("__")) or name[-1:] == "_" != name[:1]:
            torch.utils.swap_tensors(first, first.to(META))

    def _run(self, function, args, kwargs, tensors) -> tuple[object, bool]:
        """Call `function`, bringing real and meta tensors together. Also tells whether real results can be believed."""
        if not any(t.is_meta for t in tensors):
            args, kwargs = tree_map(_off_meta, (args, kwargs))
            believed = all(self.trace.values[self.ids[id(t)]].kind == "constant" for t in tensors)
            return function(*args, **kwargs), believed
        name = getattr(function, "__name__", "")
        if name in _LIKE_FACTORIES:  # their values depend on no input's values
            return function(*args, **{**kwargs, "device": "cpu"}), True
        result = NotImplemented
        if name in _PLACEHOLDERS:
            result = _PLACEHOLDERS[name](*args, **kwargs)
        elif name in _HITS:
            result = _HITS[name](self.every_hit, *args, **kwargs)
        if result is not NotImplemented:
            self.trace.notes.append(f"{self.stack[-1] if self.stack else 'model'} reads the value of a result ({name})")
            return result, False
        if name in _INDEXING:
            args = (args[0], tree_map(_known_index, args[1]), *args[2:])
        args, kwargs = tree_map(_to_meta, (args, kwargs))
        return function(*args, **kwargs), False

    def _span(self) -> Span | None:
        frame = sys._getframe(2)
        while frame is not None and frame.f_code.co_filename.startswith(_PLUMBING):
            frame = frame.f_back
        if frame is None:
            return None
        key = (frame.f_code, frame.f_lasti)
        if key not in self.spans:
            code = frame.f_code
            position = next(itertools.islice(code.co_positions(), frame.f_lasti // 2, None))
            self.spans[key] = Span(code.co_filename, code.co_qualname, *(number or 0 for number in position))
        return self.spans[key]


# -- where real values meet unknown ones -------------------------------------------------------------------------

_LIKE_FACTORIES = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"}
_INDEXING = {"__getitem__", "__setitem__"}


def _off_meta(leaf):
    on_meta = isinstance(leaf, torch.device | str) and str(leaf) == "meta"
    return torch.device("cpu") if on_meta else leaf


def _to_meta(leaf):
    if isinstance(leaf, torch.device):
        return META
    return leaf.to(META) if isinstance(leaf, torch.Tensor) and not leaf.is_meta else leaf


def _known_index(leaf):
    """An index that meta tensors can be indexed by."""
    if isinstance(leaf, torch.Tensor) and leaf.is_meta and leaf.dtype == torch.bool and leaf.ndim == 1:
        return torch.tensor(sorted({0, len(leaf) - 1}))  # the two ends, as with `nonzero`
    if isinstance(leaf, torch.Tensor) and not leaf.is_meta and leaf.ndim == 0 and not leaf.is_floating_point():
        return leaf.item()
    return leaf


def _hits(every: bool, mask: torch.Tensor, as_tuple: bool = False) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """`nonzero` of an unknown mask: its two ends, so that code for hits runs, first and last of a kind; or all of it.

    The ends are enough for experts that share a tensor; experts with parameters of their own must run one by one.
    """
    ends = sorted({0, mask.numel() - 1})
    flat = torch.arange(mask.numel()) if every and mask.ndim == 1 else torch.tensor(ends)
    columns = torch.unravel_index(flat, mask.shape) if mask.ndim else (flat,)
    return columns if as_tuple else torch.stack(columns, 1)


def _where(every: bool, condition, *rest, **kwargs):
    return NotImplemented if rest or kwargs else _hits(every, condition, as_tuple=True)


def _zero(tensor, *_, **__):
    return torch.zeros((), dtype=tensor.dtype).item()


_PLACEHOLDERS = {
    "item": _zero,
    "__bool__": lambda tensor: False,
    "is_nonzero": lambda tensor: False,
    "__int__": lambda tensor: 0,
    "__index__": lambda tensor: 0,
    "__float__": lambda tensor: 0.0,
    "equal": lambda a, b: False,
    "allclose": lambda a, b, **_: False,
    "cpu": lambda tensor, **_: tensor,
    "tolist": lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype).tolist(),
}
_HITS = {"nonzero": _hits, "where": _where}
