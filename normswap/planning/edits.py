"""The vocabulary of edits: every change a conversion makes, as data with its mathematics beside it.

A tensor edit is a pure function of the tensor's value so far and of *original* values of the few tensors that belong
with it, so that the live model and the stream of shards give the same weights in any order of tensors. A module edit
changes the structure only and moves no values. Tensors and modules are named as the model names them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from torch import nn

from normswap.norms.formula import running_affine
from normswap.norms.kind import Direct, Fitted
from normswap.norms.kinds import KINDS, MODULES
from normswap.norms.spec import Casting, GainForm, NormSpec
from normswap.planning.orthogonal import Rotation

Read = Callable[[str], torch.Tensor]
#: before a tensor's name: the one that calibration fitted, and not the model's
FITTED = "fitted:"


class Edit(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorEdit(Edit):
    """A change of one tensor. `apply` gets and returns float64."""

    #: whether it makes a tensor that there was not, of nothing but what it reads
    creates: ClassVar[bool] = False
    tensor: str

    def reads(self) -> tuple[str, ...]:
        """Names of the other tensors whose original values `apply` needs."""
        return ()

    def fitted(self) -> tuple[str, ...]:
        """Names of the tensors that calibration fitted and `apply` needs."""
        return ()

    def keeps_rows_apart(self) -> bool:
        """Whether each index of the first axis is changed by itself, so that some rows can be computed alone."""
        return False

    def apply(self, value: torch.Tensor | None, read: Read) -> torch.Tensor | None:
        """The new value, from the value so far (None: the tensor does not exist yet; returning None removes it)."""
        raise NotImplementedError


def _along(vector: torch.Tensor, runs: int, axis: int, ndim: int) -> torch.Tensor:
    """`vector` of n values, `runs` times over, as `(1, .., runs n, .., 1)`, to act along `axis` of a tensor."""
    return vector.flatten().repeat(runs).reshape([-1 if i == axis else 1 for i in range(ndim)])


class Frozen(BaseModel):
    """A batch norm as it runs, by the names of its tensors: `a x + c`, a = g / sqrt(variance + eps), c = b - a mean."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: str
    variance: str
    eps: float
    gain: str | None = None
    form: GainForm = "w"
    bias: str | None = None

    @property
    def module(self) -> str:
        """Path of the norm."""
        return self.mean.rpartition(".")[0]

    def reads(self) -> tuple[str, ...]:
        return tuple(name for name in (self.mean, self.variance, self.gain, self.bias) if name is not None)

    def scale(self, read: Read) -> torch.Tensor:
        return self._affine(read)[0]

    def shift(self, read: Read) -> torch.Tensor:
        return self._affine(read)[1]

    def _affine(self, read: Read) -> tuple[torch.Tensor, torch.Tensor]:
        named = {"mean": self.mean, "variance": self.variance, "gain": self.gain, "bias": self.bias}
        tensors = {does: read(name).flatten() for does, name in named.items() if name is not None}
        if self.form == "1 + w" and "gain" in tensors:
            tensors["gain"] = 1 + tensors["gain"]
        return running_affine(tensors, self.eps)


class Centre(TensorEdit):
    """`T <- T - mean(T)` along `axis`, taken in `groups` equal runs (heads side by side in one axis)."""

    edit: Literal["centre"] = "centre"
    axis: int
    groups: int = 1

    def keeps_rows_apart(self):
        return self.axis > 0

    def apply(self, value, read):
        split = value.unflatten(self.axis, (self.groups, -1))
        return (split - split.mean(self.axis + 1, keepdim=True)).flatten(self.axis, self.axis + 1)


class Untie(TensorEdit):
    """`tensor`, until now an alias of `source`, becomes a parameter of its own with the same values."""

    creates: ClassVar[bool] = True
    edit: Literal["untie"] = "untie"
    source: str

    def reads(self):
        return (self.source,)

    def apply(self, value, read):
        return read(self.source).clone()


class FoldGain(TensorEdit):
    """A scale per channel moved into its neighbour: `W <- W diag(g)` along the `axis` that meets it.

    The gain of a norm moves into what reads it, the scale of a branch into what writes it. Of a batch norm, which is an
    affine map as it runs, g is the whole scale.

    The axis may meet several vectors side by side (patches that are merged): then it holds `runs` runs of channels.
    """

    edit: Literal["fold_gain"] = "fold_gain"
    axis: int
    weight: str | Frozen
    form: GainForm
    runs: int = 1

    def reads(self):
        return self.weight.reads() if isinstance(self.weight, Frozen) else (self.weight,)

    def keeps_rows_apart(self):
        return self.axis > 0

    def gain(self, read: Read) -> torch.Tensor:
        """The scale, one value per channel."""
        if isinstance(self.weight, Frozen):
            return self.weight.scale(read)
        weight = read(self.weight)
        return 1 + weight if self.form == "1 + w" else weight

    def apply(self, value, read):
        return value * _along(self.gain(read), self.runs, self.axis, value.ndim)


class FoldBias(TensorEdit):
    """A norm's bias moved into a reader's: `c <- c + W b`, with `W` as it was before any gain was folded.

    `W b` is W times b along `axis`, summed over the axes `sums`: by default that one, for a convolution its kernel too.
    `runs` as for the gain. Of a batch norm b is all that it adds.
    """

    edit: Literal["fold_bias"] = "fold_bias"
    reader: str
    axis: int
    bias: str | Frozen
    sums: tuple[int, ...] | None = None
    runs: int = 1

    def reads(self):
        return (self.reader, *(self.bias.reads() if isinstance(self.bias, Frozen) else (self.bias,)))

    def carried(self, read: Read) -> torch.Tensor:
        """`W b`."""
        reader, sums = read(self.reader), self.sums or (self.axis,)
        if kernel := [axis for axis in sums if axis != self.axis]:
            reader = reader.sum(kernel, keepdim=True)
        bias = self.bias.shift(read) if isinstance(self.bias, Frozen) else read(self.bias)
        carried = torch.tensordot(reader, bias.flatten().repeat(self.runs), dims=([self.axis], [0]))
        return carried.reshape([n for axis, n in enumerate(reader.shape) if axis not in sums])

    def apply(self, value, read):
        carried = self.carried(read)
        return carried if value is None else value + carried


class AddShift(TensorEdit):
    """A bias takes over what a batch norm behind it added: `b <- b + c`. Its scale is a gain, folded before."""

    edit: Literal["add_shift"] = "add_shift"
    norm: Frozen

    def reads(self):
        return self.norm.reads()

    def apply(self, value, read):
        return value + self.norm.shift(read).reshape(value.shape)


class CarryAffine(TensorEdit):
    """A convolution does what a batch norm beside it did to the same input x, which is still added: the rest of it,

        r (a x + c) - r x:        W <- W + r diag(a - 1), in its middle;        b <- b + r c.

    Channel k of the `axis` reads channel k, or the k-th in its group of channels, along the axis `into`; None for b.

    Attributes:
        factor: r.
        behind: path of the norm that stood behind the convolution, and gave what it alone made.
    """

    edit: Literal["carry_affine"] = "carry_affine"
    axis: int
    into: int | None
    factor: float
    norm: Frozen
    behind: str

    def reads(self):
        return self.norm.reads()

    def added(self, value: torch.Tensor, read: Read) -> torch.Tensor:
        """What is added to `value`."""
        if self.into is None:
            return self.factor * self.norm.shift(read).reshape(value.shape)
        channels = torch.arange(value.shape[self.axis], device=value.device)
        index = [torch.full_like(channels, n // 2) for n in value.shape]
        index[self.axis], index[self.into] = channels, channels % value.shape[self.into]
        return torch.zeros_like(value).index_put(tuple(index), self.factor * (self.norm.scale(read) - 1))

    def apply(self, value, read):
        return value + self.added(value, read)


class Rotate(TensorEdit):
    """`T <- R T` along `axis`, or along each run of channels in it.

    So for what writes to a stream that is carried as `R x`, and for what reads it, `W <- W R^T`. `back`: R^T in the
    place of R.
    """

    edit: Literal["rotate"] = "rotate"
    axis: int
    rotation: Rotation
    back: bool = False

    def fitted(self):
        return (self.rotation.fitted,) if self.rotation.fitted else ()

    def keeps_rows_apart(self):
        return self.axis > 0

    def apply(self, value, read):
        return self.rotation.turn(value, self.axis, lambda name: read(FITTED + name), self.back)


class Compensate(TensorEdit):
    """What a reader loses with a direction v of its input, put back as far as the rest tells it: `W <- W + (W v) c^T`.

    Where the norm in front takes out `v (v^T n)`, and `v^T n` is about `c^T n + m`. Along `axis`, in runs of channels.

    Attributes:
        lost, told_by: names of the fitted v and c.
    """

    edit: Literal["compensate"] = "compensate"
    axis: int
    lost: str
    told_by: str

    def fitted(self):
        return self.lost, self.told_by

    def keeps_rows_apart(self):
        return self.axis > 0

    def apply(self, value, read):
        if value.is_meta:
            return value
        v, c = read(FITTED + self.lost), read(FITTED + self.told_by)
        split = value.unflatten(self.axis, (-1, len(v))).movedim(self.axis + 1, -1)
        return (split + (split @ v).unsqueeze(-1) * c).movedim(-1, self.axis + 1).flatten(self.axis, self.axis + 1)


class Drop(TensorEdit):
    """The tensor is removed: what it did is folded elsewhere."""

    edit: Literal["drop"] = "drop"

    def apply(self, value, read):
        return None


class Fill(TensorEdit):
    """Every entry of the tensor becomes `value`: the neutral gain or bias of a folded norm.

    A tensor that the model does not have yet (of an added norm) is made, of shape `shape`.
    """

    edit: Literal["fill"] = "fill"
    value: float
    shape: tuple[int, ...] | None = None

    def apply(self, value, read):
        if value is None:
            return torch.full(self.shape, self.value, dtype=torch.float64)
        return torch.full_like(value, self.value)


class Scale(TensorEdit):
    """`T <- factor T`; of a gain in the form `1 + w`, the gain is what is scaled: `w <- factor (1 + w) - 1`."""

    edit: Literal["scale"] = "scale"
    factor: float
    form: GainForm = "w"

    def keeps_rows_apart(self):
        return True

    def apply(self, value, read):
        return self.factor * (1 + value) - 1 if self.form == "1 + w" else self.factor * value


class Copy(TensorEdit):
    """The tensor takes the original values of `source`, times `factor`: a gain that moves to another norm."""

    edit: Literal["copy"] = "copy"
    source: str
    factor: float = 1.0

    def reads(self):
        return (self.source,)

    def apply(self, value, read):
        return self.factor * read(self.source)


class ModuleEdit(Edit):
    """A change of a module."""

    module: str

    def makes(self) -> tuple[Fill, ...]:
        """The tensors that the module has afterwards, as they are where it did not have them before."""
        return ()


class Gain(BaseModel):
    """A gain as a norm applies it: the tensor itself, or one plus it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight: str
    form: GainForm

    def of(self, read: Read) -> torch.Tensor:
        return 1 + read(self.weight) if self.form == "1 + w" else read(self.weight)


class Running(TensorEdit):
    """D, the running product of gains along a stream whose skips had them: `T <- factor g_1 g_2 ...` per channel."""

    edit: Literal["running"] = "running"
    gains: tuple[Gain, ...]
    factor: float

    def reads(self):
        return tuple(gain.weight for gain in self.gains)

    def product(self, read: Read) -> torch.Tensor:
        product = self.gains[0].of(read) * self.factor
        for gain in self.gains[1:]:
            product = product * gain.of(read)
        return product

    def apply(self, value, read):
        return self.product(read)


class Unscale(Running):
    """What writes to a stream that is carried divided by D: `T <- (T + b) / D` along `axis`, b a norm's bias or 0."""

    edit: Literal["unscale"] = "unscale"
    axis: int
    bias: str | None = None

    def reads(self):
        return super().reads() + ((self.bias,) if self.bias else ())

    def apply(self, value, read):
        if self.bias is not None:
            value = read(self.bias) if value is None else value + read(self.bias)
        return value / _along(self.product(read), 1, self.axis, value.ndim)


class Refit(TensorEdit):
    """The tensor becomes one that calibration fitted, which is stored beside the plan under the same name."""

    edit: Literal["refit"] = "refit"

    def fitted(self):
        return (self.tensor,)

    def apply(self, value, read):
        return read(FITTED + self.tensor)


class Restore(TensorEdit):
    """An earlier edit taken back (`planning.undo`) with k, which was kept beside the weights for that.

    `add`: `T + k`, one value per run of `axis`; `divide`: `T / k`, one value per channel of `axis`; `subtract`:
    `T - k`; `replace`: k itself.
    """

    creates: ClassVar[bool] = True
    edit: Literal["restore"] = "restore"
    how: Literal["add", "divide", "subtract", "replace"]
    kept: str
    axis: int = 0
    runs: int = 1

    def fitted(self):
        return (self.kept,)

    def apply(self, value, read):
        k = read(FITTED + self.kept)
        if self.how == "replace":
            return k
        if self.how == "subtract":
            return value - k
        if self.how == "divide":
            return value / _along(k, self.runs, self.axis, value.ndim)
        split = value.unflatten(self.axis, (self.runs, -1))
        return (split + k.unsqueeze(self.axis + 1)).flatten(self.axis, self.axis + 1)


def _known(kind: str) -> str:
    if kind not in KINDS:
        raise ValueError(f"expected a kind of norm among {', '.join(KINDS)}, found '{kind}'")
    return kind


NormKind = Annotated[str, AfterValidator(_known)]


class SwapNorm(ModuleEdit):
    """The norm at `module` becomes one of another kind; parameters that stay keep their names.

    Attributes:
        kind: of `norms.kinds`; `affine` is a gain and a bias without normalising, `identity` hands its input on.
        width: size of the normalised axis.
        axis: the normalised axis, counted from the end.
        shape: of gain and bias; None: `(width,)`.
    """

    edit: Literal["swap_norm"] = "swap_norm"
    kind: NormKind
    width: int
    eps: float
    gain: GainForm | None
    bias: bool
    casting: Casting
    axis: int = -1
    shape: tuple[int, ...] | None = None

    def build(self) -> nn.Module:
        """The norm with neutral parameters and buffers, each of which is one number throughout."""
        arguments = self.model_dump(include={"width", "eps", "gain", "bias", "casting", "axis", "shape"})
        return MODULES[self.kind](**arguments)

    def makes(self):
        return tuple(
            Fill(tensor=f"{self.module}.{name}", value=float(t.flatten()[0]), shape=tuple(t.shape))
            for name, t in self.build().state_dict().items()
        )


class Initialise(TensorEdit):
    """The tensor of a norm becomes what its kind takes from the norm that it replaces (`norms.kind`).

    Attributes:
        module: path of both norms.
        kind: the kind that was asked for.
        replaced: what stood there.
    """

    edit: Literal["initialise"] = "initialise"
    module: str
    kind: NormKind
    replaced: NormSpec

    @property
    def route(self) -> Direct | Fitted:
        return KINDS[self.kind].routes[self.replaced.kind]

    def reads(self):
        return tuple(f"{self.module}.{name}" for name in self.replaced.tensors.values())

    def own(self, read: Read) -> dict[str, torch.Tensor]:
        """The replaced norm's tensors by what they do."""
        tensors = {does: read(f"{self.module}.{name}") for does, name in self.replaced.tensors.items()}
        if self.replaced.gain == "1 + w":
            tensors["gain"] = 1 + tensors["gain"]
        return tensors

    def apply(self, value, read):
        route = self.route
        make = route.values if isinstance(route, Direct) else route.start
        return make(self.replaced, self.own(read))[self.tensor.rpartition(".")[2]]


class AddNorm(SwapNorm):
    """A norm where there was none: `module` is the path that it gets. Its parameters begin neutral."""

    edit: Literal["add_norm"] = "add_norm"


class SetScale(ModuleEdit):
    """The module gets the attribute `name`, a number that its rewritten code multiplies by."""

    edit: Literal["set_scale"] = "set_scale"
    name: str
    value: float


class Change(BaseModel):
    """One change of a method's source. All are insertions and deletions at the ends of one expression.

    - `unwrap`: the call of a norm becomes its first argument;
    - `wrap`: `x` becomes `self.name(x)`; where the expression is a statement `x += y`, that becomes
      `x = self.name(x + y)`;
    - `scale`: `x` becomes `self.name * x`, in parentheses where the source needs them;
    - `enter`: `argument = self.name(argument)` becomes the first statement of the method.

    Attributes:
        span: line, column, end line, end column of the expression. Lines count from the first line of the method
            (its first decorator, if it has any), columns in UTF-8 bytes, both from 0; as Python's syntax tree has them.
        name: attribute of the module: a norm or a number.
        argument: of `enter`, the parameter's name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["unwrap", "wrap", "scale", "enter"]
    span: tuple[int, int, int, int] | None = None
    name: str | None = Field(default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    argument: str | None = Field(default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")


class Rewrite(ModuleEdit):
    """A method of the module is its class's own with `changes` in its source.

    Attributes:
        method: name of the method.
        digest: of the source the changes were made for; another version of the class is refused.
    """

    edit: Literal["rewrite"] = "rewrite"
    method: str
    changes: tuple[Change, ...]
    digest: str


class CentreOutput(ModuleEdit):
    """The module's output is centred along `axis`, counted from the end, in the module itself (`norms.centred`)."""

    edit: Literal["centre_output"] = "centre_output"
    axis: int = -1


class CentreInput(ModuleEdit):
    """The module's first input is centred along `axis`, counted from the end, in the module itself."""

    edit: Literal["centre_input"] = "centre_input"
    axis: int = -1


class NormOutput(ModuleEdit):
    """Runs of the module's output go through norms that it holds (`norms.normed`): heads of queries and keys.

    Attributes:
        runs: per norm its name, where on the last axis its runs begin, and how long they are.
    """

    edit: Literal["norm_output"] = "norm_output"
    runs: tuple[tuple[str, tuple[int, ...], int], ...]


class GrowBias(ModuleEdit):
    """A module built without a bias gets one, of shape `(size,)`."""

    edit: Literal["grow_bias"] = "grow_bias"
    size: int

    def makes(self):
        return (Fill(tensor=f"{self.module}.bias", value=0.0, shape=(self.size,)),)


class SetConfig(Edit):
    """One key of the configuration gets another value."""

    edit: Literal["set_config"] = "set_config"
    key: str
    value: Any


class SetEps(SetConfig):
    """One key of the configuration that is the eps of norms gets another value, and so do the norms of a live model.

    Attributes:
        modules: path of each norm, and the attribute that holds its eps.
    """

    edit: Literal["set_eps"] = "set_eps"
    value: float
    modules: tuple[tuple[str, str], ...]


AnyEdit = Annotated[
    Centre
    | Untie
    | FoldGain
    | FoldBias
    | AddShift
    | CarryAffine
    | Rotate
    | Compensate
    | Drop
    | Fill
    | Scale
    | Copy
    | Running
    | Unscale
    | Refit
    | Initialise
    | Restore
    | SwapNorm
    | AddNorm
    | SetScale
    | Rewrite
    | CentreOutput
    | CentreInput
    | NormOutput
    | GrowBias
    | SetConfig
    | SetEps,
    Field(discriminator="edit"),
]
