"""The recorder: a mode in which every torch call is noted, with its arguments, results, module and source span."""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from normswap.observe.placeholders import (
    HITS,
    LIKE_FACTORIES,
    LIKENING,
    META,
    PLACEHOLDERS,
    Hits,
    check_counts,
    check_gathered,
    likeness,
    off_meta,
    on_meta,
    whole_parts,
)
from normswap.observe.trace import Frame, ModuleCall, Operation, Ref, Span, Trace, Value

# functions of these folders are plumbing: what counts are those outside them
_PLUMBING = (str(Path(torch.__file__).parent), str(Path(__file__)), str(Path(contextmanager.__code__.co_filename)))
_MODULE_CALL = nn.Module._call_impl.__code__


class Recorder(TorchFunctionMode):
    """Notes every torch call: function, arguments, results, module and source span."""

    def __init__(self, model: nn.Module, inputs: Mapping[str, torch.Tensor], hits: Hits):
        super().__init__()
        self.hits = hits
        self.trace = Trace()
        self.read_value = False
        self.varies_inside = False
        self.stack: list[str] = []
        self.modules = list(model.modules())
        self.ids: dict[int, int] = {}
        self.keep: list[torch.Tensor] = []  # an id stays unique only while its tensor lives
        self.storages: dict[int, set[int]] = {}
        # tensors whose memory was written through another: their value before, and what was written
        self.stale: dict[int, tuple[int, int]] = {}
        self.frames: dict[tuple, Frame] = {}
        self.paths = {id(m): path for path, m in model.named_modules()}
        for name, p in model.named_parameters():
            self._new_value(p, "parameter", name)
        for name, b in model.named_buffers():
            self._new_value(b, "buffer", name)
        for module in self.modules:  # tables kept as plain attributes
            for t in tensors_in(vars(module)):
                self._value(t)
        for t in tensors_in(inputs):
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
            self._record(untraceable, leaves, spec, parts, [tensor], False)
        elif id(tensor) not in self.ids:
            if tensor.is_meta and tensor.is_floating_point() and self.stack:
                self.trace.strays.append(self.stack[-1])
            index = self._new_value(tensor, "computed" if tensor.is_meta else "constant")
            self.trace.values[index].varies = self.varies_inside and not tensor.is_meta
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
        if getattr(function, "__name__", "") not in LIKE_FACTORIES:
            varies = any(self.trace.values[v].varies for v in inputs)
            for v in outputs:
                self.trace.values[v].varies = varies and self.trace.values[v].real is not None
        module = self.stack[-1] if self.stack else ""
        self.trace.operations.append(
            Operation(
                index, function, leaves, spec, tuple(dict.fromkeys(inputs)), outputs, mutated, module, self._frames()
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
            inputs = tuple(self._value(t) for t in tensors_in((args, kwargs)))
            path, start = self.paths[id(module)], len(self.trace.operations)
            parent = self.stack[-1] if self.stack else ""
            passed = ((key, x) for key, x in [*enumerate(args), *kwargs.items()] if isinstance(x, torch.Tensor))
            arguments = tuple((key, self._value(x)) for key, x in passed)
            frames = self._frames(called=path) if self.stack else ()
            call = ModuleCall(path, inputs, start=start, parent=parent, arguments=arguments, frames=frames)
            self.stack.append(path)
            open_calls.append(call)
            self.trace.calls.append(call)

        def closed(output):
            self.stack.pop()
            call = open_calls.pop()
            call.outputs = tuple(self._value(t) for t in tensors_in(output))
            call.end = len(self.trace.operations)
            first = output[0] if type(output) is tuple and output else output
            call.plain = isinstance(first, torch.Tensor)
            call.single = isinstance(output, torch.Tensor)

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
        if self.trace.notes:  # sizes may stem from values that were not there
            args, kwargs = whole_parts(getattr(function, "__name__", ""), args, kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [t for t in leaves if isinstance(t, torch.Tensor)]
        if any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tensors):
            return self._inside_transform(function, args, kwargs, tensors)
        inputs = [self._value(t) for t in tensors]
        self._surrender_target(function, leaves, tensors)
        versions = [t._version for t in tensors]
        returned, known = self._run(function, args, kwargs, tensors)

        made = [t for t in tensors_in(returned) if id(t) not in self.ids]
        changed = {id(t): t for t, version in zip(tensors, versions, strict=True) if t._version != version}.values()
        refs = iter(inputs)
        leaves = [Ref(next(refs)) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        if made or changed:
            mutated = tuple(self.ids[id(t)] for t in changed)
            if len({t.untyped_storage()._cdata for t in changed}) < len(mutated):
                function, known = untraceable, False  # arguments that share memory with what is written
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

    def _inside_transform(self, function, args, kwargs, tensors):
        """Calls inside a `vmap` (a mask made position by position) are run and not recorded.

        What comes out is known by its values where the model's inputs alone went in, and then varies with them; of
        anything else nothing is said, so what a parameter had a part in counts as read.
        """
        for t in tensors:
            if not torch._C._functorch.is_functorch_wrapped_tensor(t):
                value = self.trace.values[self._value(t)]
                self.varies_inside |= value.varies
                if value.kind != "constant":
                    self.trace.reads.append(value.index)
        args, kwargs = tree_map(off_meta, (args, kwargs))
        return function(*args, **kwargs)

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
            check_gathered(getattr(function, "__name__", ""), args)
            args, kwargs = tree_map(off_meta, (args, kwargs))
            believed = all(self.trace.values[self.ids[id(t)]].kind == "constant" for t in tensors)
            return function(*args, **kwargs), believed
        name = getattr(function, "__name__", "")
        if name in LIKE_FACTORIES:  # their values depend on no input's values
            return function(*args, **{**kwargs, "device": "cpu"}), True
        if name in LIKENING and not args[0].is_meta:
            args, kwargs = tree_map(likeness, (args, kwargs))
            return function(*args, **kwargs), self.trace.values[self.ids[id(args[0])]].kind == "constant"
        result = NotImplemented
        check_counts(name, args)
        if name in PLACEHOLDERS:
            result = PLACEHOLDERS[name](*args, **kwargs)
        elif name in HITS:
            result = HITS[name](self.hits, *args, **kwargs)
        if result is not NotImplemented:
            self.read_value = not isinstance(result, torch.Tensor)
            self._note_read(name)
            return result, False
        result, guessed = on_meta(function, args, kwargs, self.hits)
        if guessed:
            self._note_read(name)
        return result, False

    def _note_read(self, name: str) -> None:
        where = self.stack[-1] if self.stack else "model"
        self.trace.notes.append(f"{where or 'model'} reads the value of a result ({name.strip('_')})")

    def _frames(self, called: str | None = None) -> tuple[Frame, ...]:
        """The model's functions that stand open here, up to the `forward` of the innermost module that has any.

        Args:
            called: the module that is being called; what its class does before `forward` is no part of the caller.
        """
        found: list[Frame] = []
        last = 0
        frame = sys._getframe(2)
        while frame is not None and not (found and frame.f_code is _MODULE_CALL):
            if not frame.f_code.co_filename.startswith(_PLUMBING):
                noted = self._frame(frame)
                if called is None or noted.module != called:
                    found.append(noted)
                    if noted.module is not None and frame.f_code.co_name == "forward":
                        last = len(found)
            frame = frame.f_back
        # decorators of `forward` stand around it and are not in the method's source
        return tuple(found[: last or len(found)])

    def _frame(self, frame: FrameType) -> Frame:
        code = frame.f_code
        first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        path = self.paths.get(id(first)) if isinstance(first, nn.Module) else None
        key = (code, frame.f_lasti, path)
        if key not in self.frames:
            position = next(itertools.islice(code.co_positions(), frame.f_lasti // 2, None))
            span = Span(code.co_filename, code.co_qualname, *(number or 0 for number in position))
            self.frames[key] = Frame(span, path if _is_method(code, type(first)) else None)
        return self.frames[key]


def _is_method(code: CodeType, cls: type) -> bool:
    """Whether `code` is that of a method of `cls` or of a base; a helper may take a module first as well."""
    found = (vars(base).get(code.co_name) for base in cls.__mro__)
    return any(getattr(inspect.unwrap(f), "__code__", None) is code for f in found if f is not None)


def tensors_in(tree: object) -> list[torch.Tensor]:
    """All tensors in nested containers, dataclasses and model outputs included (caches hold none that matter here)."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, Mapping):
        return [t for value in tree.values() for t in tensors_in(value)]
    if isinstance(tree, list | tuple):
        return [t for value in tree for t in tensors_in(value)]
    return []


def untraceable(*_):
    """Stands for what happened to a tensor behind its back; nothing can be said of it."""
    raise RuntimeError("this cannot be run again")
