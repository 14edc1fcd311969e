"""What a norm is, as data: its kind, axis, gain form, bias, eps, casting mode and gate, recovered from behaviour."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

GainForm = Literal["w", "1 + w"]
Casting = Literal["input", "float32", "float32-before-gain"]


class Gate(BaseModel):
    """A second input `z` of the input's shape that a norm multiplies by.

    Attributes:
        place: `before`, the norm reads `x * activation(z)`; `after`, its output is multiplied by `activation(z)`.
        activation: name of the function in `torch.nn.functional`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    place: Literal["before", "after"]
    activation: str


class NormSpec(BaseModel):
    """One norm's behaviour.

    With `x` split into groups of `width` neighbouring values along `axes`, and per group
    `y = gain(w) * (x - m) / sqrt(s + eps) + b`, the kind fixes `m` and `s`:

    - `layernorm`: `m = mean(x)`, `s = mean((x - m)^2)`;
    - `rmsnorm`: `m = 0`, `s = mean(x^2)`;
    - `batchnorm`: `m`, `s` are running statistics of each channel;
    - `groupnorm`: as layernorm, over `width` channels and all positions (instance norms: over one channel).

    Attributes:
        kind: the name of the formula above.
        axes: the normalised axes of the input, counted from the end (`(-1,)` for a token's channels).
        width: how many values share one statistic; for groupnorm, how many channels.
        groups: how many runs of `width` are normalised side by side. Gain and bias lie along all of them.
        gain: `w` multiplies by the parameter, `1 + w` by one plus it, None: no gain.
        weight, bias: names of the parameters (of frozen norms: buffers) inside the module, None where there is none.
        mean, variance: of a batchnorm, the names of its running statistics inside the module.
        eps: the value added under the root, as measured.
        casting: in which precision the module computes on half-precision input:
            `input` throughout in the input's dtype; `float32` with one rounding at the end;
            `float32-before-gain` rounded to the input's dtype before the gain is applied (Llama).
        gate: what a gated norm does with its second input, None for all others.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    axes: tuple[int, ...]
    width: int
    groups: int = 1
    gain: GainForm | None = None
    weight: str | None = None
    bias: str | None = None
    mean: str | None = None
    variance: str | None = None
    eps: float = 0.0
    casting: Casting = "input"
    gate: Gate | None = None

    @property
    def tensors(self) -> dict[str, str]:
        """The names of its tensors inside the module, by what they do."""
        named = {"gain": self.weight, "bias": self.bias, "mean": self.mean, "variance": self.variance}
        return {does: name for does, name in named.items() if name is not None}

    @property
    def channels(self) -> int:
        """How many values gain and bias have: all that are normalised side by side."""
        return self.width * self.groups
