"""Plans written by hand, the small models they are for, and folders made of the two.

They test what applies and publishes a plan, without what makes one.
"""

import copy
import json
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from models import TINY, randomise
from normswap.apply.live import apply_plan
from normswap.apply.modelling import write_modelling
from normswap.planning.edits import Centre, CentreOutput, Drop, FoldBias, FoldGain, GrowBias, SwapNorm, Untie
from normswap.planning.plans import Plan
from normswap.planning.request import Request

LLAMA_LIKE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
SIZES = {
    "gpt2": TINY["gpt2"],
    "gpt_neox": TINY["gpt_neox"],
    "olmo": TINY["olmo"],
    "phi": LLAMA_LIKE,
    "phimoe": dict(**LLAMA_LIKE, num_key_value_heads=2, num_local_experts=4, experts_implementation="eager"),
}

# endings of the paths of the layers that write into the stream and of the norms on it; paths of the embeddings
PARTS = {
    "gpt2": (("attn.c_proj", "mlp.c_proj"), ("ln_1", "ln_2", "ln_f"), ("transformer.wte", "transformer.wpe")),
    "gpt_neox": (
        ("attention.dense", "mlp.dense_4h_to_h"),
        ("layernorm", "final_layer_norm"),
        ("gpt_neox.embed_in",),
    ),
    "olmo": (("o_proj", "down_proj"), ("layernorm", "model.norm"), ("model.embed_tokens",)),
    "phi": (("dense", "fc2"), ("layernorm",), ("model.embed_tokens",)),
    "phimoe": (("o_proj", "mlp.experts"), ("layernorm", "model.norm"), ("model.embed_tokens",)),
}


def small(model_type: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A two-layer causal model of width 32 whose stream, gains and biases show every mistake."""
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[model_type](
        **{"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, **SIZES[model_type]}
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return randomise(model, seed).eval().to(dtype)


def plan_of(model: nn.Module, edits, **changes) -> Plan:
    fields = dict(
        architecture=type(model).__name__,
        model_type=model.config.model_type,
        request=Request.of(norm="rmsnorm"),
        claim="exact",
        reasons=("every writer of the stream is centred, so each norm meets a stream of zero mean",),
        converted=tuple(edit.module for edit in edits if isinstance(edit, SwapNorm)),
        edits=tuple(edits),
    )
    return Plan(**{**fields, **changes})


def swap(path: str, norm: nn.Module, width: int, **changes) -> SwapNorm:
    own = dict(norm.named_parameters())
    fields = dict(
        module=path,
        kind="rmsnorm",
        width=width,
        eps=getattr(norm, "eps", 1e-5),
        gain="w" if "weight" in own else None,
        bias="bias" in own,
        casting="float32",
    )
    return SwapNorm(**{**fields, **changes})


def rms_edits(model: nn.Module, tied: str | None = None) -> list:
    """LayerNorm -> RMSNorm on the stream. `tied`: what happens to a tied embedding, "untie" or "centre output"."""
    writers, norms, embeddings = PARTS[model.config.model_type]
    edits = [Untie(tensor="lm_head.weight", source=f"{embeddings[0]}.weight")] if tied == "untie" else []
    for path in embeddings:
        if tied == "centre output" and path == embeddings[0]:
            edits.append(CentreOutput(module=path))
        else:
            edits.append(Centre(tensor=f"{path}.weight", axis=1))
    for path, module in model.named_modules():
        if path.endswith(writers):
            if isinstance(module, nn.Linear | Conv1D):
                edits.append(Centre(tensor=f"{path}.weight", axis=int(isinstance(module, Conv1D))))
                if module.bias is not None:
                    edits.append(Centre(tensor=f"{path}.bias", axis=0))
            else:
                # merged experts, (expert, out, in)
                edits.append(Centre(tensor=f"{path}.down_proj", axis=1))
        elif path.endswith(norms):
            edits.append(swap(path, module, model.config.hidden_size))
    return edits


def rms_plan(model: nn.Module, tied: str | None = None) -> Plan:
    return plan_of(model, rms_edits(model, tied))


def folded_gpt2_plan(model: nn.Module) -> Plan:
    """GPT-2 untied, on weightless RMSNorms: gains and biases folded into the readers, the head given a bias."""
    readers = {"ln_1": "attn.c_attn", "ln_2": "mlp.c_fc"}
    edits = [edit for edit in rms_edits(model, "untie") if not isinstance(edit, SwapNorm)]
    for path, norm in model.named_modules():
        if not isinstance(norm, nn.LayerNorm):
            continue
        head = path == "transformer.ln_f"
        reader = "lm_head" if head else f"{path.rpartition('.')[0]}.{readers[path.rpartition('.')[2]]}"
        axis = 1 if head else 0
        weight, bias = f"{path}.weight", f"{path}.bias"
        edits += [
            swap(path, norm, model.config.hidden_size, gain=None, bias=False),
            *([GrowBias(module=reader, size=model.config.vocab_size)] if head else []),
            FoldGain(tensor=f"{reader}.weight", axis=axis, weight=weight, form="w"),
            FoldBias(tensor=f"{reader}.bias", reader=f"{reader}.weight", axis=axis, bias=bias),
            Drop(tensor=weight),
            Drop(tensor=bias),
        ]
    return plan_of(model, edits)


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits


def token_ids(seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(seed))


def publish(model: nn.Module, plan: Plan, folder: Path, base_output_unchanged: bool = True) -> nn.Module:
    """Write the converted `model` (changed in place and returned) as a folder that transformers loads."""
    with torch.device("meta"):
        stock = type(model)(copy.deepcopy(model.config))
    folder.mkdir(parents=True)
    model.config.save_pretrained(folder)
    source_config = json.loads((folder / "config.json").read_text())
    apply_plan(model, plan)
    model.save_pretrained(folder)
    keys = write_modelling(folder, type(model), stock.config, plan, stock, base_output_unchanged)
    (folder / "config.json").write_text(json.dumps({**source_config, **keys}))
    record = {"plan": plan.model_dump(mode="json"), "source_config": source_config}
    (folder / "normswap.json").write_text(json.dumps(record))
    return model
