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

from sweep.zoo import randomise

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
