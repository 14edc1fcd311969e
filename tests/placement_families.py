"""The streams of stock models, taken apart by hand: first value, steps, last norm, and what is made of it.

Each family calls the model's own submodules, and leaves out the norms, which it hands over as data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Norm:
    """Over the last axis, of a module's own parameters."""

    centred: bool
    eps: float
    gain: Tensor | float = 1.0
    bias: Tensor | float = 0.0

    def scale(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        return (x.square().mean(-1, keepdim=True) + self.eps).sqrt()

    def plain(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        return x / self.scale(x)

    def affine(self, x: Tensor) -> Tensor:
        return self.gain * x + self.bias

    def __call__(self, x: Tensor) -> Tensor:
        return self.affine(self.plain(x))


def layer_norm(module: nn.LayerNorm) -> Norm:
    return Norm(True, module.eps, module.weight, module.bias)


def rms_norm(module: nn.Module, offset: float = 0.0) -> Norm:
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    return Norm(False, eps, offset + module.weight)


@dataclass(frozen=True)
class Branch:
    """`n_branch(function(n_in(x)))`; a norm that is None is not there."""

    function: Function
    n_in: Norm | None = None
    n_branch: Norm | None = None

    def apply(self, x: Tensor) -> Tensor:
        y = self.function(x)
        return y if self.n_branch is None else self.n_branch(y)


@dataclass(frozen=True)
class Step:
    """Branches that read the same value and are added to it, and the norm of the sum, if there is one."""

    branches: list[Branch]
    n_out: Norm | None = None


@dataclass(frozen=True)
class Stack:
    """One stream: its first value, the norm on that (post-norm models), the steps, the norm at its end."""

    first: Tensor
    steps: list[Step]
    entry: Norm | None = None
    final: Norm | None = None

    @property
    def is_post(self) -> bool:
        return self.steps[0].n_out is not None

    @property
    def begins_with_norm(self) -> bool:
        return self.steps[0].branches[0].n_in is not None

    def norm_at(self, i: int) -> Norm:
        """The norm whose kind and eps the `i`-th value of a raw stream is normalised by: that which reads it."""
        if i == len(self.steps):
            return self.final or self.norm_at(i - 1)
        branch = self.steps[i].branches[0]
        return branch.n_in or branch.n_branch


Run = Callable[[Stack], Tensor]  # takes a stream to its end, once for each stream


def _causal(x: Tensor) -> Tensor:
    n = x.shape[1]
    return torch.full((n, n), -torch.inf, dtype=x.dtype).triu(1)[None, None]


def _positions(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1])[None]


def gpt2(model, inputs, run: Run) -> Tensor:
    body = model.transformer
    ids = inputs["input_ids"]
    x = body.wte(ids) + body.wpe(_positions(ids))
    mask = _causal(x)
    steps = []
    for block in body.h:
        steps.append(Step([Branch(lambda h, m=block.attn: m(h, attention_mask=mask)[0], layer_norm(block.ln_1))]))
        steps.append(Step([Branch(block.mlp, layer_norm(block.ln_2))]))
    return model.lm_head(run(Stack(x, steps, final=layer_norm(body.ln_f))))


def _rotary(model, inputs) -> tuple[Tensor, Callable[[nn.Module], Function]]:
    """The embeddings, and the self-attention of a layer as a function."""
    x = model.model.embed_tokens(inputs["input_ids"])
    mask, angles = _causal(x), model.model.rotary_emb(x, position_ids=_positions(x))
    return x, lambda m: lambda h: m(hidden_states=h, attention_mask=mask, position_embeddings=angles)[0]


def llama(model, inputs, run: Run) -> Tensor:
    x, attention = _rotary(model, inputs)
    steps = []
    for layer in model.model.layers:
        steps.append(Step([Branch(attention(layer.self_attn), rms_norm(layer.input_layernorm))]))
        steps.append(Step([Branch(layer.mlp, rms_norm(layer.post_attention_layernorm))]))
    return model.lm_head(run(Stack(x, steps, final=rms_norm(model.model.norm))))


def gemma2(model, inputs, run: Run) -> Tensor:
    x, attention = _rotary(model, inputs)
    steps = []
    for layer in model.model.layers:
        first, second = rms_norm(layer.input_layernorm, 1.0), rms_norm(layer.pre_feedforward_layernorm, 1.0)
        after = rms_norm(layer.post_attention_layernorm, 1.0), rms_norm(layer.post_feedforward_layernorm, 1.0)
        steps += [
            Step([Branch(attention(layer.self_attn), first, after[0])]),
            Step([Branch(layer.mlp, second, after[1])]),
        ]
    logits = model.lm_head(run(Stack(x, steps, final=rms_norm(model.model.norm, 1.0))))
    cap = model.config.final_logit_softcapping
    return logits if cap is None else cap * torch.tanh(logits / cap)


def olmo2(model, inputs, run: Run) -> Tensor:
    x, attention = _rotary(model, inputs)
    steps = []
    for layer in model.model.layers:
        steps.append(Step([Branch(attention(layer.self_attn), n_branch=rms_norm(layer.post_attention_layernorm))]))
        steps.append(Step([Branch(layer.mlp, n_branch=rms_norm(layer.post_feedforward_layernorm))]))
    return model.lm_head(run(Stack(x, steps, final=rms_norm(model.model.norm))))


def gpt_neox(model, inputs, run: Run) -> Tensor:
    body = model.gpt_neox
    x = body.embed_in(inputs["input_ids"])
    mask, angles = _causal(x), body.rotary_emb(x, position_ids=_positions(x))
    steps = []
    for layer in body.layers:

        def attention(h, m=layer.attention):
            return m(h, attention_mask=mask, position_embeddings=angles)[0]

        branches = [
            Branch(attention, layer_norm(layer.input_layernorm)),
            Branch(layer.mlp, layer_norm(layer.post_attention_layernorm)),
        ]
        steps += [Step(branches)] if layer.use_parallel_residual else [Step([branch]) for branch in branches]
    head = model.lm_head if hasattr(model, "lm_head") else model.embed_out
    return head(run(Stack(x, steps, final=layer_norm(body.final_layer_norm))))


def opt(model, inputs, run: Run) -> Tensor:
    """Pre-norm, or (`do_layer_norm_before` False) post-norm, then without norms at either end."""
    body = model.model.decoder
    ids = inputs["input_ids"]
    x = body.embed_tokens(ids) + body.embed_positions(torch.ones_like(ids), 0, position_ids=_positions(ids))
    mask = _causal(x)
    steps = []
    for layer in body.layers:
        first, second = layer_norm(layer.self_attn_layer_norm), layer_norm(layer.final_layer_norm)

        def attention(h, m=layer.self_attn):
            return m(hidden_states=h, attention_mask=mask)[0]

        def mlp(h, m=layer):
            return m.fc2(m.activation_fn(m.fc1(h)))

        if layer.do_layer_norm_before:
            steps += [Step([Branch(attention, first)]), Step([Branch(mlp, second)])]
        else:
            steps += [Step([Branch(attention)], first), Step([Branch(mlp)], second)]
    final = None if body.final_layer_norm is None else layer_norm(body.final_layer_norm)
    return model.lm_head(run(Stack(x, steps, final=final)))


def bert(model, inputs, run: Run) -> Tensor:
    body, ids = model.bert, inputs["input_ids"]
    e = body.embeddings
    x = e.word_embeddings(ids) + e.position_embeddings(_positions(ids)) + e.token_type_embeddings(torch.zeros_like(ids))
    steps = []
    for layer in body.encoder.layer:

        def attention(h, m=layer.attention):
            return m.output.dense(m.self(h)[0])

        def mlp(h, m=layer):
            return m.output.dense(m.intermediate(h))

        steps.append(Step([Branch(attention)], layer_norm(layer.attention.output.LayerNorm)))
        steps.append(Step([Branch(mlp)], layer_norm(layer.output.LayerNorm)))
    return model.cls(run(Stack(x, steps, entry=layer_norm(e.LayerNorm))))


def _layer(layer: nn.Module, mask: Tensor | None, memory: Tensor | None, after: bool) -> list[Step]:
    """One encoder or decoder layer of the Bart kind, with its norms before the branches or after the sums."""

    def attention(h):
        return layer.self_attn(h, attention_mask=mask)[0]

    def cross(h):
        return layer.encoder_attn(h, key_value_states=memory, attention_mask=None)[0]

    def mlp(h):
        return layer.fc2(layer.activation_fn(layer.fc1(h)))

    pairs = [(attention, layer.self_attn_layer_norm)]
    pairs += [] if memory is None else [(cross, layer.encoder_attn_layer_norm)]
    pairs += [(mlp, layer.final_layer_norm)]
    if after:
        return [Step([Branch(function)], layer_norm(norm)) for function, norm in pairs]
    return [Step([Branch(function, layer_norm(norm))]) for function, norm in pairs]


def bart(model, inputs, run: Run) -> Tensor:
    def embedded(part, ids):
        return part.embed_tokens(ids) + part.embed_positions(ids, 0, position_ids=_positions(ids)[0])

    encoder, decoder = model.model.encoder, model.model.decoder
    x = embedded(encoder, inputs["input_ids"])
    steps = [step for layer in encoder.layers for step in _layer(layer, None, None, after=True)]
    memory = run(Stack(x, steps, entry=layer_norm(encoder.layernorm_embedding)))
    x = embedded(decoder, inputs["decoder_input_ids"])
    steps = [step for layer in decoder.layers for step in _layer(layer, _causal(x), memory, after=True)]
    y = run(Stack(x, steps, entry=layer_norm(decoder.layernorm_embedding)))
    return model.lm_head(y) + model.final_logits_bias


def whisper(model, inputs, run: Run) -> Tensor:
    encoder, decoder = model.model.encoder, model.model.decoder
    sound = nn.functional.gelu(encoder.conv1(inputs["input_features"]))
    x = nn.functional.gelu(encoder.conv2(sound)).transpose(1, 2) + encoder.embed_positions.weight
    steps = [step for layer in encoder.layers for step in _layer(layer, None, None, after=False)]
    memory = run(Stack(x, steps, final=layer_norm(encoder.layer_norm)))
    ids = inputs["decoder_input_ids"]
    x = decoder.embed_tokens(ids) + decoder.embed_positions.weight[: ids.shape[1]]
    steps = [step for layer in decoder.layers for step in _layer(layer, _causal(x), memory, after=False)]
    return model.proj_out(run(Stack(x, steps, final=layer_norm(decoder.layer_norm))))


def vit(model, inputs, run: Run) -> Tensor:
    body = model.vit
    steps = []
    for layer in body.layers:
        attention = Branch(lambda h, m=layer.attention: m(h)[0], layer_norm(layer.layernorm_before))
        steps += [Step([attention]), Step([Branch(layer.mlp, layer_norm(layer.layernorm_after))])]
    y = run(Stack(body.embeddings(inputs["pixel_values"]), steps, final=layer_norm(body.layernorm)))
    return model.classifier(y[:, 0])


def dinov2(model, inputs, run: Run) -> Tensor:
    body = model.dinov2
    steps = []
    for layer in body.encoder.layer:
        scales = layer.layer_scale1.lambda1, layer.layer_scale2.lambda1

        def attention(h, m=layer.attention, scale=scales[0]):
            return scale * m(h)[0]

        def mlp(h, m=layer.mlp, scale=scales[1]):
            return scale * m(h)

        steps += [Step([Branch(attention, layer_norm(layer.norm1))]), Step([Branch(mlp, layer_norm(layer.norm2))])]
    y = run(Stack(body.embeddings(inputs["pixel_values"]), steps, final=layer_norm(body.layernorm)))
    return model.classifier(torch.cat([y[:, 0], y[:, 1:].mean(1)], 1))


FAMILIES = {
    "gpt2": gpt2,
    "llama": llama,
    "mixtral": llama,
    "gpt_neox": gpt_neox,
    "gemma2": gemma2,
    "olmo2": olmo2,
    "opt": opt,
    "bert": bert,
    "bart": bart,
    "whisper": whisper,
    "vit": vit,
    "dinov2": dinov2,
}
