"""Which backend serves a call: what each one declares, what is measured of it, and how long it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from normswap.kernels.backend import Kernel
from normswap.kernels.backends import BACKENDS
from normswap.kernels.call import Call
from normswap.kernels.faithful import plainly, unfaithful
from normswap.kernels.timing import ROWS, Timings
from normswap.norms.spec import NormSpec

MODULE = "module"
"""The name under which the site's own module is timed."""


@dataclass
class Choice:
    """What was found for one call.

    Attributes:
        backend: that serves it; None: the module stays.
        why: in words.
        rejected: by name of each other backend that was asked, why it does not serve.
        times: microseconds of forward and backward, of those that were timed, the module among them.
    """

    call: Call
    backend: str | None = None
    why: str = ""
    rejected: dict[str, str] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)
    kernel: Kernel | None = None


class Chooser:
    """Chooses for calls, each once.

    Attributes:
        asked: names of backends, the first that serves is taken; None: whichever is the fastest, the module if that is.
        chosen: by call in words, what was chosen before.
    """

    def __init__(
        self,
        asked: Sequence[str] | None,
        tell: Callable[[str], None] = lambda what: None,
        chosen: Mapping[str, str | None] | None = None,
    ):
        self.asked, self.tell, self.chosen = asked, tell, chosen or {}
        self.known: dict[Call, Choice] = {}
        self._timings: Timings | None = None

    def choose(self, call: Call, modules: Sequence[nn.Module], specs: Sequence[NormSpec]) -> Choice:
        """The choice for a call.

        Args:
            modules: samples (`faithful.sample`) of its norms, on its device and in its dtypes.
            specs: of them.
        """
        if call not in self.known:
            self.known[call] = self._chosen(call, modules, specs)
        return self.known[call]

    def _chosen(self, call: Call, modules: Sequence[nn.Module], specs: Sequence[NormSpec]) -> Choice:
        choice = Choice(call)
        kernels: dict[str, Kernel] = {}
        asked, before = self.asked, call.words() in self.chosen
        if before:
            name = self.chosen[call.words()]
            asked = () if name is None else (name,)
        for name in BACKENDS if asked is None else asked:
            why = BACKENDS[name].rejects(call)
            if why is None:
                self.tell(f"measuring {name}: {call.words()}")
                kernel = BACKENDS[name].build(call)
                why = unfaithful(kernel, call, modules, specs)
            if why is not None:
                choice.rejected[name] = why
                continue
            kernels[name] = kernel
            if asked:
                break
        if not kernels:
            choice.why = "its module, as before" if before and not asked else "no backend serves it"
        elif asked:
            choice.backend, choice.why = next(iter(kernels)), "as before" if before else "as asked"
        else:
            self._fastest(choice, kernels, modules, specs)
        choice.kernel = kernels.get(choice.backend)
        return choice

    def _fastest(
        self, choice: Choice, kernels: Mapping[str, Kernel], modules: Sequence[nn.Module], specs: Sequence[NormSpec]
    ) -> None:
        call = choice.call
        tensors = [
            getattr(m, n) if n else None for m, s in zip(modules, specs, strict=True) for n in (s.weight, s.bias)
        ]
        # a sum and a norm together are held against the sum, and the norm by what serves it alone
        apart = [self._alone(call, i, m, s) for i, (m, s) in enumerate(zip(modules, specs, strict=True))]
        contenders = {MODULE: _step(call, plainly(call.form, apart), tensors)}
        for name, kernel in kernels.items():
            contenders[name] = _step(call, lambda *x, kernel=kernel: kernel(*x, *tensors), tensors)
        if self._timings is None:
            versions = {name: b.version() for name, b in BACKENDS.items() if b.missing() is None}
            self._timings = Timings(versions)
        choice.times = self._timings.of(call, contenders)
        best = min(choice.times, key=choice.times.get)
        own = choice.times[MODULE]
        ratio = own / choice.times[best]
        if best == MODULE or ratio < 1.03:
            subject = "the module itself is" if call.form == "norm" else "sum and norm apart are"
            choice.why = f"{subject} as fast as any ({own:.0f} us)"
        else:
            other = "the module" if call.form == "norm" else "sum and norm apart"
            choice.backend, choice.why = best, f"{ratio:.2f} times as fast as {other} ({own:.0f} us)"

    def _alone(self, call: Call, which: int, module: nn.Module, spec: NormSpec) -> Callable:
        alone = Call("norm", call.width, call.reads[which], call.device, call.norms[which])
        known = self.known.get(alone)
        if call.form == "norm" or known is None or known.kernel is None:
            return module
        tensors = [getattr(module, name) if name else None for name in (spec.weight, spec.bias)]
        return lambda x: known.kernel(x, *tensors)


def _step(call: Call, function: Callable, tensors: Sequence[torch.Tensor | None]) -> Callable[[], None]:
    """Forward and backward of a call, on rows of its device's usual number."""
    rows = ROWS.get(call.device, 512)
    x = [torch.randn(rows, call.width).to(call.device, dtype).requires_grad_() for dtype in call.dtypes]
    wanted = [*x, *(t for t in tensors if t is not None)]
    gradients: list[torch.Tensor] = []

    def run() -> None:
        y = function(*x)
        y = y if isinstance(y, tuple) else (y,)
        if not gradients:
            gradients.extend(torch.randn_like(t) for t in y)
        torch.autograd.grad(y, wanted, gradients)

    return run
