"""Models in other placements, written by hand in plain torch over the model's own submodules.

`placement_families.py` says what the streams of a model are. The placements are written on these from the table, and
nothing here knows of traces, plans or edits.

With `n` a norm without gain and bias, `g` and `b` its gain and bias, and one scale `s_i` for each step:

    raw source to deepnorm     u_0 = n(x_0), u_{i+1} = n(s_i u_i + F(g u_i + b)); at the end g u + b
    raw source to post         the same with the scale in the norm before: u_i is s_i times what it is above
    raw source to mixed        deepnorm in some layers, pre-norm in the others
    raw source to keel         u_{i+1} = n(s_i u_i + F(N_in(u_i)))
    raw source to sandwich     x_{i+1} = x_i + N_b(F(N_in(x_i)))
    raw source to reordered    x_{i+1} = x_i + N_b(F(g x_i / s_i + b))
    post source to pre         z carries the sum y before each norm as y / D, see `pre`
    post source, normed skip   u_{i+1} = N(u_i) + F(N(u_i))
    post source to deepnorm    x_{i+1} = N(s_i x_i + F(x_i))
    raw source, damped norms   x_{i+1} = x_i + F(s_i N_in(x_i))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from placement_families import FAMILIES, Function, Norm, Stack

Scale = float | Tensor
Placed = Callable[[Stack, Sequence[Scale], Sequence[Function]], Tensor]


def _end(norm: Norm | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


def unmoved(stack: Stack, scales=(), norms=()) -> Tensor:
    x = _end(stack.entry, stack.first)
    for step in stack.steps:
        x = _end(step.n_out, x + sum(b.apply(x if b.n_in is None else b.n_in(x)) for b in step.branches))
    return _end(stack.final, x)


def deepnorm(stack: Stack, scales: Sequence[Scale], norms=()) -> Tensor:
    if stack.is_post:
        x = _end(stack.entry, stack.first)
        for s, step in zip(scales, stack.steps, strict=True):
            x = step.n_out(s * x + sum(b.apply(x) for b in step.branches))
        return x
    u, scales = stack.first, [*scales]
    if stack.begins_with_norm:
        u = stack.norm_at(0).plain(u)
    else:
        scales[0] = 1.0  # nothing has to be put in the place of a scale that is still there
    for i, (s, step) in enumerate(zip(scales, stack.steps, strict=True)):
        branches = sum(b.apply(s * u if b.n_in is None else b.n_in.affine(u)) for b in step.branches)
        u = stack.norm_at(i + 1).plain(s * u + branches)
    return u if stack.final is None else stack.final.affine(u)


def mixed(stack: Stack, scales: Sequence[Scale], norms=(), moved: Sequence[bool] = ()) -> Tensor:
    """Deepnorm where `moved` says so, pre-norm elsewhere: where a pre-norm step follows, the stream is `s u` again."""
    x, is_normal = stack.first, False
    for i, (s, step) in enumerate(zip(scales, stack.steps, strict=True)):
        if moved[i]:
            u = x if is_normal else stack.norm_at(i).plain(x)
            x = stack.norm_at(i + 1).plain(s * u + sum(b.apply(b.n_in.affine(u)) for b in step.branches))
        else:
            x = s * x if is_normal else x
            x = x + sum(b.apply(b.n_in(x)) for b in step.branches)
        is_normal = moved[i]
    return stack.final.affine(x) if is_normal else stack.final(x)


def post(stack: Stack, scales: Sequence[Scale], norms=()) -> Tensor:
    u = scales[0] * stack.norm_at(0).plain(stack.first) if stack.begins_with_norm else stack.first
    for i, step in enumerate(stack.steps):
        branches = sum(b.apply(u if b.n_in is None else b.n_in.affine(u / scales[i])) for b in step.branches)
        after = scales[i + 1] if i + 1 < len(stack.steps) else 1.0
        u = after * stack.norm_at(i + 1).plain(u + branches)
    return u if stack.final is None else stack.final.affine(u)


def keel(stack: Stack, scales: Sequence[Scale], norms=()) -> Tensor:
    u = stack.norm_at(0).plain(stack.first)
    for i, (s, step) in enumerate(zip(scales, stack.steps, strict=True)):
        u = stack.norm_at(i + 1).plain(s * u + sum(b.apply(b.n_in(u)) for b in step.branches))
    return u if stack.final is None else stack.final.affine(u)


def sandwich(stack: Stack, scales: Sequence[Scale], norms: Sequence[Function]) -> Tensor:
    x = stack.first
    for step, norm in zip(stack.steps, norms, strict=True):
        x = x + sum(norm(b.apply(b.n_in(x))) for b in step.branches)
    return _end(stack.final, x)


def reordered(stack: Stack, scales: Sequence[Scale], norms: Sequence[Function]) -> Tensor:
    x = stack.first
    for s, step, norm in zip(scales, stack.steps, norms, strict=True):
        x = x + sum(norm(b.apply(b.n_in.affine(x / s))) for b in step.branches)
    return _end(stack.final, x)


def damped(stack: Stack, scales: Sequence[Scale], norms=()) -> Tensor:
    x = stack.first
    for s, step in zip(scales, stack.steps, strict=True):
        x = x + sum(b.apply(s * b.n_in(x)) for b in step.branches)
    return _end(stack.final, x)


def pre(stack: Stack, scales: Sequence[Scale], norms=(), means: Sequence[Scale] | None = None) -> Tensor:
    """A post-norm stream as a pre-norm one.

    Let `y_i` be what the i-th norm reads (`y_0` the embeddings' sum), `x_i = g_i n(y_i) + b_i`. Then
    `y_{i+1} = x_i + F(x_i)` and, with `m_i` the mean and `s_i` the scale of `y_i`, `x_i = g_i (y_i - m_i) / s_i + b_i`.
    With `D_0 = 1`, `D_{i+1} = g_i D_i / s_i` and `y_i = D_i z_i`:

        z_{i+1} = z_i + (F(x_i) + b_i - g_i m_i / s_i) / D_{i+1}

    A pre-norm block cannot take the mean away: `means` are 0, but for who wants to see that nothing else is lost.
    """
    z, d, norm = stack.first, 1.0, stack.entry
    for i, step in enumerate(stack.steps):
        x, shift = z, 0.0
        if norm is not None:  # else nothing stands before the first block
            x = norm(d * z)
            shift = norm.bias - norm.gain * (0.0 if means is None else means[i]) / scales[i]
            d = norm.gain * d / scales[i]
        z = z + (sum(b.apply(x) for b in step.branches) + shift) / d
        norm = step.n_out
    return norm(d * z)


def pre_normalized_skip(stack: Stack, scales=(), norms=()) -> Tensor:
    u, norm = stack.first, stack.entry
    for step in stack.steps:
        x = _end(norm, u)
        u = x + sum(b.apply(x) for b in step.branches)
        norm = step.n_out
    return norm(u)


TARGETS: dict[str, Placed] = {
    "unmoved": unmoved,
    "post": post,
    "deepnorm": deepnorm,
    "mixed": mixed,
    "keel": keel,
    "sandwich": sandwich,
    "reordered": reordered,
    "layernorm-scaling": damped,
    "pre": pre,
    "pre-normalized-skip": pre_normalized_skip,
}


@dataclass
class _Targeted:
    """Takes each stream to its end in the target placement, with that stream's scales and norms."""

    target: Placed
    scales: Sequence[Sequence[Scale]]
    norms: Sequence[Sequence[Function]]
    extra: Mapping[str, Sequence[Sequence[Scale]]]
    count: int = 0

    def __call__(self, stack: Stack) -> Tensor:
        ones, i = [1.0] * len(stack.steps), self.count
        self.count += 1
        extra = {name: values[i] for name, values in self.extra.items()}
        return self.target(stack, self.scales[i] if self.scales else ones, self.norms[i] if self.norms else (), **extra)


def reference(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    target: str,
    scales: Sequence[Sequence[Scale]] = (),
    norms: Sequence[Sequence[Function]] = (),
    **extra: Sequence[Sequence[Scale]],
) -> Tensor:
    """What `model` (a stock model, in eval mode and eager attention) gives with its norms in another placement.

    Args:
        inputs: without padding; attention masks are not looked at.
        scales: one for each step of each stream (encoder first): numbers, or one for each token; by default 1.
        norms: for `sandwich` and `reordered`, the new norm of each step of each stream.
    """
    return FAMILIES[model.config.model_type](model, inputs, _Targeted(TARGETS[target], scales, norms, extra))


@dataclass
class _Statistics:
    """Takes each stream to its end as it is, and notes each token's scale and mean before each norm."""

    scales: list[list[Tensor]] = field(default_factory=list)
    means: list[list[Tensor]] = field(default_factory=list)

    def __call__(self, stack: Stack) -> Tensor:
        scales: list[Tensor] = []
        means: list[Tensor] = []
        x, norm = stack.first, stack.entry
        for i, step in enumerate(stack.steps):
            read_by = norm if stack.is_post else stack.norm_at(i)
            scales.append(torch.ones_like(x[..., :1]) if read_by is None else read_by.scale(x))
            means.append(x.mean(-1, keepdim=True))
            x = x if norm is None else norm(x)
            x = x + sum(b.apply(x if b.n_in is None else b.n_in(x)) for b in step.branches)
            norm = step.n_out
        self.scales.append(scales)
        self.means.append(means)
        return _end(stack.final, _end(norm, x))


def true_scales(model: nn.Module, inputs: Mapping[str, Tensor]) -> _Statistics:
    """Each token's own scale and mean before each norm: with these as scales, `post` is the model as it was."""
    found = _Statistics()
    FAMILIES[model.config.model_type](model, inputs, found)
    return found
