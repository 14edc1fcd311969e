"""Plans written by hand that move norms, and the moved models written out once more as independent references."""

import ast
import json
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from hand_plans import plan_of
from normswap.apply.modelling import write_modelling
from normswap.apply.stream import write_tensors
from normswap.checkpoint.files import Checkpoint
from normswap.checkpoint.keymap import KeyMap
from normswap.planning.edits import AddNorm, Change, Copy, Drop, Rewrite, Scale, SetScale, SwapNorm
from normswap.planning.plans import Plan
from normswap.source.methods import Method, place

WIDTH, EPS = 32, 1e-5
SKIP = 1.75


def rewrite(module: nn.Module, path: str, name: str, *changes: tuple[str, str | None, str, int]) -> Rewrite:
    """Changes `(kind, attribute, text, n)`: of the `n`-th expression of the method that reads `text`."""
    method = Method.of(type(module), name)
    nodes = [node for node in ast.walk(method.tree) if isinstance(node, ast.expr | ast.AugAssign)]
    made = []
    for kind, attribute, text, n in changes:
        if kind == "enter":
            made.append(Change(kind=kind, argument=text, name=attribute))
        else:
            spans = sorted(place(node) for node in nodes if method.source(node) == text)
            made.append(Change(kind=kind, span=spans[n], name=attribute))
    return Rewrite(module=path, method=name, changes=tuple(made), digest=method.digest)


def norm(path: str, kind: str, edit: type = AddNorm, gain: str | None = "w", bias: bool = False, eps: float = EPS):
    return edit(module=path, kind=kind, width=WIDTH, eps=eps, gain=gain, bias=bias, casting="float32")


def none(path: str, *parameters: str):
    return [norm(path, "identity", SwapNorm, None), *(Drop(tensor=f"{path}.{name}") for name in parameters)]


# -- Llama: a norm at the entry, norms after sums with a scaled skip, an affine at the end -----------------------------


def llama_post(model: nn.Module) -> Plan:
    edits = []
    for i, layer in enumerate(model.model.layers):
        path = f"model.layers.{i}"
        first = i == 0
        edits += [
            rewrite(
                layer,
                path,
                "forward",
                *([("enter", "entry_norm", "hidden_states", 0)] if first else []),
                ("unwrap", None, "self.input_layernorm(hidden_states)", 0),
                ("unwrap", None, "self.post_attention_layernorm(hidden_states)", 0),
                ("scale", "skip", "residual", 1),
                ("scale", "skip_mlp", "residual", 3),
                ("wrap", "input_layernorm", "residual + hidden_states", 0),
                ("wrap", "post_attention_layernorm", "residual + hidden_states", 1),
            ),
            SetScale(module=path, name="skip", value=SKIP),
            SetScale(module=path, name="skip_mlp", value=1.0 + i / 3),
            Scale(tensor=f"{path}.input_layernorm.weight", factor=0.7),
        ]
    entry, first = "model.layers.0.entry_norm", "model.layers.0.input_layernorm.weight"
    edits += [norm(entry, "rmsnorm"), Copy(tensor=f"{entry}.weight", source=first, factor=0.5)]
    return plan_of(model, [*edits, norm("model.norm", "affine", SwapNorm)])


def rms(x, weight, eps=1e-6):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def llama_reference(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """What `llama_post` makes of `model`, which is not changed."""
    base = model.model
    x = base.embed_tokens(ids)
    turn = base.rotary_emb(x, position_ids=torch.arange(ids.shape[1])[None])
    x = rms(x, 0.5 * base.layers[0].input_layernorm.weight, EPS)
    for i, layer in enumerate(base.layers):
        y = layer.self_attn(hidden_states=x, attention_mask=causal(ids, x), position_embeddings=turn)[0]
        x = rms(SKIP * x + y, 0.7 * layer.input_layernorm.weight)
        x = rms((1.0 + i / 3) * x + layer.mlp(x), layer.post_attention_layernorm.weight)
    return model.lm_head(x * base.norm.weight)


def causal(ids: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return like.new_full((1, 1, ids.shape[1], ids.shape[1]), float("-inf")).triu(1)


# -- GPT-2: norms on the branches' ends as well, none at the end -------------------------------------------------------


def gpt2_sandwich(model: nn.Module) -> Plan:
    edits = []
    for i, block in enumerate(model.transformer.h):
        path = f"transformer.h.{i}"
        ends = (("ln_1_out", "attn_output", "ln_1"), ("ln_2_out", "feed_forward_hidden_states", "ln_2"))
        edits.append(rewrite(block, path, "forward", *(("wrap", name, text, 1) for name, text, _ in ends)))
        for name, _, like in ends:
            edits.append(norm(f"{path}.{name}", "layernorm", bias=True))
            edits.append(Copy(tensor=f"{path}.{name}.weight", source=f"{path}.{like}.weight", factor=2.0))
            # of the bias no edit says anything: it begins neutral
    summed = "inputs_embeds + position_embeds.to(inputs_embeds.device)"
    edits.append(rewrite(model.transformer, "transformer", "forward", ("wrap", "entry_norm", summed, 0)))
    edits.append(norm("transformer.entry_norm", "rmsnorm", gain="1 + w"))
    edits.append(Scale(tensor="transformer.entry_norm.weight", factor=3.0, form="1 + w"))
    return plan_of(model, [*edits, *none("transformer.ln_f", "weight", "bias")])


def gpt2_reference(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    base = model.transformer
    x = rms(base.wte(ids) + base.wpe(torch.arange(ids.shape[1])), 3.0, EPS)
    for block in base.h:
        y = block.attn(block.ln_1(x), attention_mask=causal(ids, x))[0]
        x = x + F.layer_norm(y, (WIDTH,), 2 * block.ln_1.weight, eps=EPS)
        x = x + F.layer_norm(block.mlp(block.ln_2(x)), (WIDTH,), 2 * block.ln_2.weight, eps=EPS)
    return model.lm_head(x)


# -- BERT: the norms in its output modules go to where the branches begin ----------------------------------------------


def bert_pre(model: nn.Module) -> Plan:
    edits = []
    for i, layer in enumerate(model.bert.encoder.layer):
        path = f"bert.encoder.layer.{i}"
        moves = (
            (f"{path}.attention.output", layer.attention.output, f"{path}.attention.norm_in"),
            (f"{path}.output", layer.output, f"{path}.norm_in"),
        )
        for output, module, new in moves:
            old = f"{output}.LayerNorm"
            call = "self.LayerNorm(hidden_states + input_tensor)"
            edits += [
                rewrite(module, output, "forward", ("unwrap", None, call, 0)),
                norm(new, "layernorm", bias=True, eps=module.LayerNorm.eps),
            ]
            edits += [Copy(tensor=f"{new}.{name}", source=f"{old}.{name}") for name in ("weight", "bias")]
            edits += none(old, "weight", "bias")
        edits += [
            rewrite(layer.attention, f"{path}.attention", "forward", ("wrap", "norm_in", "hidden_states", 0)),
            rewrite(layer, path, "feed_forward_chunk", ("wrap", "norm_in", "attention_output", 0)),
        ]
    return plan_of(model, edits)


def bert_reference(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    x = model.bert.embeddings(input_ids=ids)

    def layer_norm(x, module):
        return F.layer_norm(x, (WIDTH,), module.weight, module.bias, module.eps)

    for layer in model.bert.encoder.layer:
        y = layer.attention.self(layer_norm(x, layer.attention.output.LayerNorm))[0]
        x = x + layer.attention.output.dense(y)
        x = x + layer.output.dense(layer.intermediate(layer_norm(x, layer.output.LayerNorm)))
    return model.cls(x)


# -- folders -----------------------------------------------------------------------------------------------------------


def convert(source: Path, cls: type, plan: Plan, out: Path) -> None:
    """The folder `source` converted shard by shard into the new folder `out`, which transformers loads."""
    out.mkdir(parents=True)
    config = cls.config_class.from_pretrained(source)
    with torch.device("meta"):
        stock = cls(config)
    with Checkpoint.open(source) as checkpoint:
        write_tensors(checkpoint, KeyMap.build(stock, checkpoint), plan, out)
    keys = write_modelling(out, cls, config, plan, stock, base_output_unchanged=False)
    raw = json.loads((source / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**raw, **keys}))
