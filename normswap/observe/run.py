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
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from normswap.errors import ObserveError
from normswap.observe.trace import ModuleCall, Operation, Ref, Span, Trace, Value

META = torch.device("meta")
#: which entries of an unknown mask count as set
Hits = Literal["ends", "first", "every"]
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

    def __init__(self, model: nn.Module, inputs: Mapping[str, torch.Tensor], hits: Hits):
        super().__init__()
        self.hits = hits
        self.trace = Trace()
        self.read_value = False
        self.stack: list[str] = []
        self.modules = list(model.modules())
        self.ids: dict[int, int] = {}
        self.keep: list[torch.Tensor] = []  # an id stays unique only while its tensor lives
        self.storages: dict[int, set[int]] = {}
        # tensors whose memory was written through another: their value before, and what was written
        self.stale: dict[int, tuple[int, int]] = {}
        self.spans: dict[tuple, Span] = {}
        self.paths = {id(m): path for path, m in model.named_modules()}
        for name, p in model.named_parameters():
            self._new_value(p, "parameter", name)
        for name, b in model.named_buffers():
            self._new_value(b, "buffer", name)
        for module in self.modules:  # tables kept as plain attributes
            for t in _tensors(vars(module)):
                self._value(t)
        for t in _tensors(inputs):
            self.trace.values[self._value(t)].varies = True

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
        if id(tensor) in self.stale:
            parts = self.stale.pop(id(tensor))
            leaves, spec = tree_flatten(([Ref(v) for v in parts], {}))
            self._record(_untraceable, leaves, spec, parts, [tensor], False)
        elif id(tensor) not in self.ids:
            if tensor.is_meta and tensor.is_floating_point() and self.stack:
                self.trace.strays.append(self.stack[-1])
            self._new_value(tensor, "computed" if tensor.is_meta else "constant")
        return self.ids[id(tensor)]

    def _outdate_aliases(self, tensor: torch.Tensor) -> None:
        """After a write to `tensor`, others on its memory hold a mixture of what they held and what was written."""
        for other in self.storages.get(tensor.untyped_storage()._cdata, set()) - {id(tensor)}:
            held = self.ids.get(other)
            if held is not None and held < self.ids[id(tensor)]:
                del self.ids[other]
                self.stale[other] = held, self.ids[id(tensor)]

    def _record(self, function, leaves, spec, inputs, tensors, known: bool, mutated: tuple[int, ...] = ()) -> None:
        """Note an operation that gives `tensors` their values."""
        index = len(self.trace.operations)
        outputs = tuple(
            self._new_value(t, "constant" if known and not t.is_meta else "computed", producer=index) for t in tensors
        )
        if getattr(function, "__name__", "") not in _LIKE_FACTORIES:
            varies = any(self.trace.values[v].varies for v in inputs)
            for v in outputs:
                self.trace.values[v].varies = varies and self.trace.values[v].real is not None
        module = self.stack[-1] if self.stack else ""
        self.trace.operations.append(
            Operation(
                index, function, leaves, spec, tuple(dict.fromkeys(inputs)), outputs, mutated, module, self._span()
            )
        )

    # -- modules -----------------------------------------------------------------------------------------------

    @contextmanager
    def module_hooks(self):
        """Note each module call of the model while active."""
        open_calls: list[ModuleCall] = []

        def enter(module, args, kwargs):
            with torch._C.DisableTorchFunction():  # hooks run inside the mode: what they ask of tensors is no call
                opened(module, args, kwargs)

        def leave(module, args, kwargs, output):
            with torch._C.DisableTorchFunction():
                closed(output)

        def opened(module, args, kwargs):
            inputs = tuple(self._value(t) for t in _tensors((args, kwargs)))
            path, start = self.paths[id(module)], len(self.trace.operations)
            parent = self.stack[-1] if self.stack else ""
            call = ModuleCall(path, inputs, start=start, parent=parent, span=self._span())
            self.stack.append(path)
            open_calls.append(call)
            self.trace.calls.append(call)

        def closed(output):
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
        changed = {id(t): t for t, version in zip(tensors, versions, strict=True) if t._version != version}.values()
        refs = iter(inputs)
        leaves = [Ref(next(refs)) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        if made or changed:
            mutated = tuple(self.ids[id(t)] for t in changed)
            if len({t.untyped_storage()._cdata for t in changed}) < len(mutated):
                function, known = _untraceable, False  # arguments that share memory with what is written
            self._record(function, leaves, spec, inputs, [*made, *changed], known, mutated)
            for t in changed:
                if id(t) in self.ids:
                    self._outdate_aliases(t)
        elif self.read_value:
            # a number left the graph: whatever it is used for depends on these inputs
            sink = torch.empty(0, device=META)
            self._record(function, leaves, spec, inputs, [sink], False)
            self.trace.reads.append(self.ids[id(sink)])
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
        self.read_value = False
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
            result = _HITS[name](self.hits, *args, **kwargs)
        if result is not NotImplemented:
            self.read_value = not isinstance(result, torch.Tensor)
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


def _untraceable(*_):
    """Stands for what happened to a tensor behind its back; nothing can be said of it."""
    raise RuntimeError("this cannot be run again")


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


def _hits(which: Hits, mask: torch.Tensor, as_tuple: bool = False) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """`nonzero` of an unknown mask: its two ends, so that code for hits runs, on the first and last of a kind.

    The ends are enough for experts that share a tensor; experts with parameters of their own must run one by one.
    """
    ends = [0] if which == "first" else sorted({0, mask.numel() - 1})
    flat = torch.arange(mask.numel()) if which == "every" and mask.ndim == 1 else torch.tensor(ends)
    columns = torch.unravel_index(flat, mask.shape) if mask.ndim else (flat,)
    return columns if as_tuple else torch.stack(columns, 1)


def _where(which: Hits, condition, *rest, **kwargs):
    return NotImplemented if rest or kwargs else _hits(which, condition, as_tuple=True)


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
