"""Small random models on which mistakes show: no gain is 1, no bias is 0, no stream has zero mean."""

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

TINY = {
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gpt_neox": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48),
    "llama": dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48
    ),
    "olmo": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48),
    "cohere": dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48
    ),
    "mpt": dict(d_model=32, n_layers=2, n_heads=4, expansion_ratio=2, max_seq_len=64),
    "bloom": dict(hidden_size=32, n_layer=2, n_head=4),
    "falcon": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, new_decoder_architecture=False),
    "gemma2": dict(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
    ),
}


def tiny(model_type: str, seed: int = 0, **overrides) -> nn.Module:
    """A two-layer causal model of width 32 with 99 tokens, randomised, in eval mode and eager attention."""
    torch.manual_seed(seed)
    special = dict(bos_token_id=1, eos_token_id=2, pad_token_id=None)
    config = CONFIG_MAPPING[model_type](**{"vocab_size": 99, **special, **TINY[model_type], **overrides})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
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
