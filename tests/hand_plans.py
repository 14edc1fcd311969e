"""Plans written by hand, and the small models they are for, to test what applies a plan without what makes one."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from normswap.edits import Centre, CentreOutput, SwapNorm, Untie
from normswap.plan import Plan, Request


def plan_of(model: nn.Module, edits, converted=()) -> Plan:
    return Plan(
        architecture=type(model).__name__,
        model_type=model.config.model_type,
        request=Request(norm="rmsnorm"),
        claim="exact",
        reasons=("every writer of the stream is centred, so each norm finds zero mean",),
        converted=tuple(converted),
        edits=tuple(edits),
    )


def rms_plan(model: nn.Module, writers, embeddings, norms, tied=None) -> Plan:
    """LayerNorm -> RMSNorm on one stream.

    Args:
        writers: endings of the paths of layers whose output is added to the stream.
        embeddings: paths of tables that are added to the stream.
        norms: endings of the paths of norms on the stream.
        tied: None, or how the (tied) first embedding is dealt with: "untie" or "centre output".
    """
    edits = []
    if tied == "untie":
        edits.append(Untie(tensor="lm_head.weight", source=f"{embeddings[0]}.weight"))
    for path in embeddings:
        if tied == "centre output" and path == embeddings[0]:
            edits.append(CentreOutput(module=path))
        else:
            edits.append(Centre(tensor=f"{path}.weight", axis=1))
    converted = []
    for path, module in model.named_modules():
        if path.endswith(tuple(writers)):
            if isinstance(module, (nn.Linear, Conv1D)):
                edits.append(Centre(tensor=f"{path}.weight", axis=int(isinstance(module, Conv1D))))
                if module.bias is not None:
                    edits.append(Centre(tensor=f"{path}.bias", axis=0))
            else:
                # merged experts, (expert, out, in): no layer of their own
                edits.append(Centre(tensor=f"{path}.down_proj", axis=1))
        if path.endswith(tuple(norms)):
            own = dict(module.named_parameters())
            width = model.config.hidden_size
            edits.append(
                SwapNorm(
                    module=path,
                    kind="rmsnorm",
                    width=width,
                    eps=getattr(module, "eps", 1e-5),
                    gain="w" if "weight" in own else None,
                    bias="bias" in own,
                    casting="float32",
                )
            )
            converted.append(path)
    return plan_of(model, edits, converted)


PARTS = {
    "gpt2": dict(
        writers=("attn.c_proj", "mlp.c_proj"),
        embeddings=("transformer.wte", "transformer.wpe"),
        norms=("ln_1", "ln_2", "ln_f"),
    ),
    "gpt_neox": dict(
        writers=("attention.dense", "mlp.dense_4h_to_h"),
        embeddings=("gpt_neox.embed_in",),
        norms=("layernorm", "layer_norm"),
    ),
    "olmo": dict(
        writers=("o_proj", "down_proj"), embeddings=("model.embed_tokens",), norms=("layernorm", "model.norm")
    ),
    "phi": dict(writers=("dense", "fc2"), embeddings=("model.embed_tokens",), norms=("layernorm",)),
    "phimoe": dict(writers=("o_proj", "mlp.experts"), embeddings=("model.embed_tokens",), norms=("layernorm", "model.norm")),
}


def rms_plan_for(model: nn.Module, tied=None) -> Plan:
    return rms_plan(model, **PARTS[model.config.model_type], tied=tied)


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits
