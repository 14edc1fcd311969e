"""What a norm asks of a kernel, as data.

Four forms, with N a norm:

    norm            y = N(x)
    add-norm        s = residual + x;     y = N(s);   gives (y, s)     pre-norm and post-norm blocks
    norm-add        s = residual + N(x);              gives s          reordered blocks
    norm-add-norm   s = residual + N(x);  y = N2(s);  gives (y, s)     sandwich blocks

Sums are rounded to their dtype before a norm reads them, as the modules do it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from normswap.norms.spec import Casting, GainForm, NormSpec

Form = Literal["norm", "add-norm", "norm-add", "norm-add-norm"]
FORMS: tuple[Form, ...] = ("norm", "add-norm", "norm-add", "norm-add-norm")


@dataclass(frozen=True)
class Norm:
    """One norm of a call; see `NormSpec` for kind, eps, gain and casting.

    Attributes:
        bias: whether it has one.
        weight_dtype: of gain and bias, None where it has neither.
        out_dtype: of its output, as its module gives it.
    """

    kind: Literal["rmsnorm", "layernorm"]
    eps: float
    gain: GainForm | None
    bias: bool
    casting: Casting
    weight_dtype: torch.dtype | None
    out_dtype: torch.dtype


@dataclass(frozen=True)
class Call:
    """A call of a kernel, everything but the number of rows.

    Attributes:
        width: of the last axis, which is normalised.
        dtype: of the input.
        device: its type, such as `cuda`.
        then: the second norm of `norm-add-norm`.
        residual: dtype of the residual, None in a form without one. Under autocast it is often float32 beside a branch
            in half precision; a sum has the dtype that torch promotes its addends to.
    """

    form: Form
    width: int
    dtype: torch.dtype
    device: str
    norm: Norm
    then: Norm | None = None
    residual: torch.dtype | None = None

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Of the inputs."""
        return (self.dtype,) if self.residual is None else (self.dtype, self.residual)

    @property
    def reads(self) -> tuple[torch.dtype, ...]:
        """Of what each norm reads."""
        if self.form == "add-norm":
            return (torch.promote_types(self.dtype, self.residual),)
        if self.then is None:
            return (self.dtype,)
        return self.dtype, torch.promote_types(self.norm.out_dtype, self.residual)

    @property
    def norms(self) -> tuple[Norm, ...]:
        return (self.norm,) if self.then is None else (self.norm, self.then)

    def words(self) -> str:
        """As a person reads it."""
        norms = " + ".join(_words(norm, dtype) for norm, dtype in zip(self.norms, self.reads, strict=True))
        form = "" if self.form == "norm" else f"{self.form}: "
        dtypes = " to ".join(dict.fromkeys(map(short, self.dtypes)))
        return f"{form}{norms}, width {self.width}, {dtypes} on {self.device}"


def unserved(spec: NormSpec) -> str | None:
    """Why no kernel is for such a norm, None where one may be."""
    if spec.kind not in ("rmsnorm", "layernorm"):
        return f"a {spec.kind}: kernels are for rmsnorm and layernorm"
    if spec.axes != (-1,):
        return f"normalises axis {', '.join(map(str, spec.axes))}: kernels take the last one"
    if spec.groups != 1:
        return f"normalises {spec.groups} groups with a gain over all of them: kernels take rows with one gain"
    if spec.gate is not None:
        return "has a gate as a second input: kernels take one"
    return None


def norm_of(spec: NormSpec, dtype: torch.dtype, weight_dtype: torch.dtype | None, out_dtype: torch.dtype) -> Norm:
    """What `spec` asks of a kernel on input of `dtype`, said in one way where several are the same."""
    casting: Casting = spec.casting
    if dtype == torch.float32 or (casting == "float32-before-gain" and spec.gain is None):
        casting = "float32"
    return Norm(spec.kind, spec.eps, spec.gain, spec.bias is not None, casting, weight_dtype, out_dtype)


def short(dtype: torch.dtype | None) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def _words(norm: Norm, dtype: torch.dtype) -> str:
    parts = [norm.kind, {None: "no gain", "w": "", "1 + w": "gain 1 + w"}[norm.gain], "bias" if norm.bias else ""]
    if dtype not in (torch.float32, torch.float64):
        parts.append(
            {"input": "computed in its input's dtype", "float32": "", "float32-before-gain": "rounded before the gain"}[
                norm.casting
            ]
        )
    if norm.weight_dtype not in (None, dtype):
        parts.append(f"{short(norm.weight_dtype)} weight")
    return ", ".join(part for part in parts if part)
