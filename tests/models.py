"""Small random models on which mistakes show: no gain is 1, no bias is 0, no stream has zero mean."""

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

WIDTH = 32  # of every stream; few other sizes are multiples of it: q, k, v side by side, MLPs of four widths
_COMMON = dict(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
_GROUPED = dict(**_COMMON, num_key_value_heads=2)
_MOE = {**_GROUPED, "intermediate_size": 40, "num_local_experts": 3, "experts_implementation": "eager"}
TINY = {
    "gpt2": dict(n_embd=WIDTH, n_layer=2, n_head=4, n_positions=64),
    "gpt_neox": _COMMON,
    "opt": dict(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, ffn_dim=40, max_position_embeddings=50),
    "olmo": _COMMON,
    "phi": _COMMON,
    "bloom": dict(hidden_size=WIDTH, n_layer=2, n_head=4),
    "falcon": dict(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, ffn_hidden_size=40),
    "mpt": dict(d_model=WIDTH, n_layers=2, n_heads=4, expansion_ratio=2, max_seq_len=64),
    "stablelm": _GROUPED,
    "starcoder2": _GROUPED,
    "gptj": dict(n_embd=WIDTH, n_layer=2, n_head=4, n_positions=50, rotary_dim=4, n_inner=40),
    "cohere": _GROUPED,
    "nemotron": dict(**_GROUPED, head_dim=8),
    "phimoe": _MOE,
    "llama": _GROUPED,
    "mistral": _GROUPED,
    "gemma2": dict(**_GROUPED, head_dim=6),
    "mixtral": _MOE,
    "olmo2": _GROUPED,
    "bert": dict(**_COMMON, max_position_embeddings=50),
    "t5": dict(d_model=WIDTH, num_layers=2, num_decoder_layers=2, num_heads=4, d_ff=40, d_kv=6),
    "bart": dict(
        d_model=WIDTH,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=40,
        decoder_ffn_dim=40,
        max_position_embeddings=50,
    ),
    "vit": dict(**_COMMON, image_size=12, patch_size=4, num_labels=7),
}
_CLASSES = {
    "bert": AutoModelForMaskedLM,
    "t5": AutoModelForSeq2SeqLM,
    "bart": AutoModelForSeq2SeqLM,
    "vit": AutoModelForImageClassification,
}
CAUSAL = [model_type for model_type in TINY if model_type not in _CLASSES]


def tiny_config(model_type: str, **overrides) -> PretrainedConfig:
    """Configuration of a two-layer model of width 32 with 99 tokens (images have no tokens)."""
    special = dict(vocab_size=99, bos_token_id=1, eos_token_id=2, pad_token_id=0 if model_type == "bert" else None)
    if model_type == "vit":
        special = {}
    elif model_type in ("t5", "bart"):
        special |= dict(pad_token_id=0, decoder_start_token_id=2)
    return CONFIG_MAPPING[model_type](**{**special, **TINY[model_type], **overrides})


def tiny(model_type: str, seed: int = 0, **overrides) -> nn.Module:
    """The model of `tiny_config`, randomised, in eval mode and eager attention; causal where its type can be."""
    torch.manual_seed(seed)
    make = _CLASSES.get(model_type, AutoModelForCausalLM).from_config
    model = make(tiny_config(model_type, **overrides), attn_implementation="eager")
    return randomise(model, seed).eval()


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0, mean: float = 0.1) -> nn.Module:
    """Give every parameter of `model` a value that a mistake would show in; in place, and returned.

    Gains (1-D weights) become 1 + 0.3 randn, or 0.3 randn where they start at 0 (the `1 + w` form); biases of norms
    0.2 randn, other biases 0.1 randn; weights of two and more axes 0.2 randn plus the constant `mean`, so that every
    value written into a stream has a mean along it; running means 0.5 randn, running variances within 0.5 .. 2.

    Call it on a freshly initialised model: the gain's form is told by its initial value.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(tensor):
        return torch.randn(tensor.shape, generator=generator).to(tensor.dtype)

    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        gain = own.get("weight")
        is_norm = (gain is not None and gain.ndim == 1) or "norm" in type(module).__name__.lower()
        for name, parameter in own.items():
            if parameter.ndim >= 2:
                parameter.copy_(mean + 0.2 * randn(parameter))
            elif "bias" in name:
                parameter.copy_((0.2 if is_norm else 0.1) * randn(parameter))
            else:
                one_plus = bool((parameter == 0).all())
                parameter.copy_((0 if one_plus else 1) + 0.3 * randn(parameter))
        for name, buffer in module.named_buffers(recurse=False):
            if name == "running_mean":
                buffer.copy_(0.5 * randn(buffer))
            elif name == "running_var":
                buffer.copy_(0.5 + 1.5 * torch.rand(buffer.shape, generator=generator).to(buffer.dtype))
    return model
