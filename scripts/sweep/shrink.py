"""A default configuration made small: by what its keys are called and how their values relate, for any model type.

Values that are equal stay equal, doublings stay doublings where they can, heads divide widths, every kind of layer
that the default mixes is kept once, special tokens move into the smaller vocabulary.
"""

from __future__ import annotations

import math
import re
from typing import Any

VOCABULARY = 99
POSITIONS = 96
EXPERTS = 6
PATCH = 4
#: names of integers along the residual stream or a projection of it
WIDTH = re.compile(
    r"^(d_model|n_embd|dim|width|n_embed_dim|emb_dim|embed_dims?|embedding_dim|input_dim|output_dim|out_dim|query_dim"
    r"|codebook_dim|head_hidden_size|latent_dim|mask_dim|embedding_size|projector_dim|dims?|conv_dim|tdnn_dim"
    r"|d_embed|d_latents|projection_size|coordinate_size|shape_size|num_filters|backbone_channel_list)$"
    r"|hidden_size(s|_global)?$|hidden_dim(s|ension)?$|embed_dims?$|embed_dim_per_stage$|embedding_dim$|project(ion|or)?_dims?$"
    r"|(out|output|in|input|mid|stem|initial|base|upsample_initial|auxiliary|latent|conv)_channels?$|_output_dim$"
    r"|out_hidden_size$|embd_size$|embeds?_dim$|pos_feats$|_filters$|proj(_codevector)?_dim$|proj_size$"
    r"|codevector_dim$|^(mask_)?feature_sizes?$|pooler_output_size$|bottleneck_features$|emb_size$|_channels$|adapter_(in|out)_dim$|adapter_input_size$|condition_dim$|^feature_size$|spkr_embed_dim$|hidden_channels$"
)
INNER = re.compile(
    r"(^|_)(intermediate|ffn|inner|mlp|ff|feed_forward|feedforward)_(hidden_)?(size|dim|units)$|d_ff$|n_inner$|^linear_units$|_ffn_dim$|intermediate_sizes?$|mlp_dim$|conv_dim_inner$|_latent_size$|intermediate_size_mlp$"
)
HEADS = re.compile(
    r"(attention_heads|num_heads|n_heads?|key_value_heads|kv_heads|key_heads|value_heads|_heads)(_per_(stage|layer))?$|^nhead$"
)
HEAD_SIZE = re.compile(
    r"head_dim$|d_kv$|kv_channels$|attention_head_size$|dim_head$|d_head$|dim_per_head$|head_size$|^rotary_dim$"
)
RANK = re.compile(r"(lora_rank|_rank|low_rank_dim)$")
LAYERS = re.compile(
    r"(^|_)(num_)?(hidden_)?layers$|^n_layers?$|(^|_)depth$|num_blocks$|num_layers_|^num_.*_layers$|num_attn_blocks$"
)
STAGES = re.compile(
    r"^(depths?|layers|num_block_repeats|encoder_layers|num_layers|num_blocks)$|blocks_per_stage$|num_blocks$|numb_of_layers$|_depths$|_layers$"
)
POSITION = re.compile(
    r"positions?(_embeddings)?$|^(max_seq_len|max_length|context_length|model_max_length|n_ctx|seq_length|block_size|n_positions|max_sequence_length|text_seq_length)$|max_2d_position_embeddings$"
)
TOKEN = re.compile(r"_tok(en)?_(id|ids|index)$|_id$|_index$|_token$|_patch_id$")
NOT_A_TOKEN = re.compile(r"ignore_index$|layer_id$|loss_index$|layer_index$|merge_index$|per_token$")
LABELS = {"id2label", "label2id", "task_specific_params"}


def shrink(config: dict[str, Any], *, equal_widths: bool = False) -> dict[str, Any]:
    """Keyword arguments for the class of `config` (its `to_dict()`), with every size made small.

    Args:
        config: nested configurations are shrunk with it, so that sizes which agree across them still do.
        equal_widths: give all widths one size, for models whose parts agree in ways that the keys do not tell.
    """
    return _Shrinker(config, equal_widths).node(config)


class _Shrinker:
    def __init__(self, root: dict[str, Any], equal_widths: bool) -> None:
        widths, inner, heads_sizes = set(), set(), set()
        for key, value in _integers(root):
            if HEAD_SIZE.search(key):
                heads_sizes.add(value)
            elif INNER.search(key):
                inner.add(value)
            elif WIDTH.search(key) and value >= 32:
                widths.add(value)
        step = 64 if "section" in str(root) else 32  # sections of rotary positions want heads that they can share
        self.widths = dict.fromkeys(widths, step) if equal_widths else _ladder(widths, step)
        self.inner = {value: 40 + 16 * i for i, value in enumerate(sorted(inner - {0}))}
        self.head_sizes = {value: step // 4 * (i + 1) for i, value in enumerate(sorted(heads_sizes - {0}))}
        self.tokens: dict[int, int] = {}

    def node(self, config: dict[str, Any]) -> dict[str, Any]:
        heads = [v for k, v in config.items() if HEADS.search(k) and type(v) is int]
        self.most_heads = max(heads, default=1)
        kept, patch = _kept_layers(config), config.get("patch_size")
        stages, small = _stages(config), {}
        for key, value in config.items():
            if key in LABELS or value is None or isinstance(value, bool | str):
                small[key] = value
            elif isinstance(value, dict) and "model_type" in value:
                continue
            elif kept and value == list(range(kept[0])):
                small[key] = list(range(len(kept[1])))
            elif kept and isinstance(value, list) and len(value) == kept[0]:
                small[key] = [self.value(key, value[i], config) for i in kept[1]]
            elif type(value) is int and value == stages and LAYERS.search(key):
                small[key] = value
            elif kept and key == kept[2]:
                small[key] = len(kept[1])
            elif kept and _is_layer_index(key, value, kept[0]):
                small[key] = _moved(value, kept[0], len(kept[1]))
            elif key == "per_layer_config":
                small[key] = None
            elif key in ("out_features", "stage_names") and config.get("out_indices") is not None:
                continue  # follow from the indices
            elif (
                key == "window_size"
                and type(patch) is int
                and type(value) is int
                and value >= 4 * patch
                and not value % patch
            ):
                small[key] = 4 * PATCH  # in pixels
            elif stages and re.search(r"window_size$", key) and type(value) is int:
                small[key] = min(value, 2)  # the last stage holds whole windows
            elif stages and key == "image_size":
                small[key] = 64 if type(value) is int else [64 for _ in value]
            elif key == "backbone_feature_sizes":
                least = min(side for pair in value for side in pair)
                small[key] = [[side * 8 // least for side in pair] for pair in value]
            elif key.endswith("pinpoints"):
                least = min(side for pair in value for side in pair)
                small[key] = [[side * 32 // least for side in pair] for pair in value]
            elif re.search(r"vision_feature_layers?$|vision_select_layer$", key):
                small[key] = [_near(v) for v in value] if isinstance(value, list) else _near(value)
            elif key in ("width_coefficient", "depth_coefficient"):
                small[key] = 0.25
            else:
                small[key] = self.value(key, value, config)
        self._agree(config, small)
        for key, value in config.items():
            if isinstance(value, dict) and "model_type" in value and key not in LABELS:
                small[key] = self.node(value)
        text = small.get("text_config")
        for part in small.values():
            if isinstance(part, dict) and isinstance(text, dict) and type(part.get("out_hidden_size")) is int:
                part["out_hidden_size"] = text.get("hidden_size", part["out_hidden_size"])
        return small

    def value(self, key: str, value: Any, config: dict[str, Any]) -> Any:
        if isinstance(value, bool | float | str) or value is None:
            return value
        if isinstance(value, dict):
            return self._rope(value, config) if "rope" in key else value
        if isinstance(value, list | tuple):
            if STAGES.search(key) and all(type(v) is int for v in value):
                return [min(v, 2) for v in value]
            return type(value)(self.value(key, v, config) for v in value)
        return self.integer(key, value)

    def integer(self, key: str, v: int) -> int:
        if v <= 1:
            return v
        if "vocab" in key:
            return VOCABULARY if v > VOCABULARY else v
        if TOKEN.search(key) and not NOT_A_TOKEN.search(key):
            return v if v < 12 else self.tokens.setdefault(v, VOCABULARY - 1 - len(self.tokens))
        if HEAD_SIZE.search(key):
            return self.head_sizes[v]
        if HEADS.search(key):
            return 4 if v == self.most_heads and v >= 4 else 2 if v < self.most_heads or v < 4 else 4
        if RANK.search(key):
            return min(v, 12)
        if INNER.search(key):
            return self.inner.get(v, v)
        if re.search(r"mel_bins$|^mel_dim$|^feature_size$|^n_mels$|^input_feat_per_channel$", key) and v <= 160:
            return 16 if v > 16 else v
        if key == "num_filters":  # of the first stage of a codec, doubled by each further one
            return min(v, 8)
        if WIDTH.search(key):
            return self.widths.get(v, v)
        if re.search(r"experts_per_tok(en)?$|moe_?(k|topk)$|top_?k(_experts|_group)?$|num_selected", key):
            return 1 if "group" in key else min(v, 4 if "index" in key else 2)
        if key.endswith(("kpool", "tokens_per_image")):
            return min(v, 2 if key.endswith("kpool") else 4)
        if re.search(r"(num|n|routed|local)_(.*_)?experts$|num_experts|n_routed_experts", key):
            return EXPERTS if v > EXPERTS else v
        if re.search(r"(^|_)n(um)?_(expert_)?groups?$", key):
            return min(v, 2)
        if key.endswith("shared_layers"):
            return 0
        if LAYERS.search(key) and "feat_extract" not in key:
            return min(v, 2)
        if re.search(r"position_embeddings$|^num_positions$", key) and math.isqrt(v) ** 2 == v and "max" not in key:
            return min(v, 64)
        if re.search(r"max_source_positions$", key):
            return min(v, 20)
        if POSITION.search(key):
            return POSITIONS if v > POSITIONS else v
        if re.search(r"(patch|tubelet)_size$|^patch_(height|width|stride)$|encoder_stride$", key):
            return PATCH if v > PATCH else v
        if re.search(r"(image|img|input|crop|pretrain_image)_(size|resolution|height|width)$|^resolution$", key):
            return self.image(v)
        if re.search(r"window_size$", key):
            return min(v, 4)
        if re.search(r"^num_quer(ies|y_tokens)$|num_(latents|queries|object_queries)$|num_feature_maps", key):
            return min(v, 10)
        if re.search(r"codebook_size$|num_embeddings$|num_embeds$|codevectors_per_group$", key):
            return min(v, 32)
        if re.search(r"groups$", key):
            return min(v, 4)
        if re.search(r"(interval|frequency|_period|every_n_layers|sparse_step|_pattern)$", key):
            return 2
        if re.search(r"_offset$|first_k_dense_replace$", key):
            return 1
        if (
            re.search(r"sliding_window|attention_window|local_attention|chunk_size$|^context_size$", key)
            and "tokenizer" not in key
        ):
            return min(v, 8)
        return v

    def image(self, v: int) -> int:
        return v if v <= 32 else 32

    def _rope(self, rope: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
        small = {}
        for key, value in rope.items():
            if isinstance(value, dict):
                small[key] = self._rope(value, config)
            elif key == "original_max_position_embeddings":
                small[key] = POSITIONS // 2
            else:
                small[key] = value
        return small

    def _agree(self, config: dict[str, Any], small: dict[str, Any]) -> None:
        """Bring back what held between keys: heads times head size is a width, an image is whole patches, ..."""
        widths = {k: v for k, v in config.items() if type(v) is int and WIDTH.search(k) and v >= 32}
        main = next((k for k in ("hidden_size", "d_model", "n_embd", "dim", "embed_dim") if k in widths), None)
        head_keys = [
            k
            for k, v in config.items()
            if type(v) is int and HEADS.search(k) and "value" not in k.replace("linear_num_value", "")
        ]
        for key, value in config.items():
            if type(value) is not int or not HEAD_SIZE.search(key) or not main:
                continue
            for heads in sorted(head_keys, key=lambda k: -_common_prefix(k, key)):
                for expand in (1, config.get("expand"), config.get("mamba_expand")):
                    if expand and value * config[heads] == config[main] * expand:
                        small[key] = int(small[main] * expand) // small[heads]
                        break
                else:
                    continue
                break
        if {"qk_nope_head_dim", "qk_rope_head_dim", "qk_head_dim"} <= config.keys() and type(
            config["qk_head_dim"]
        ) is int:
            small["qk_head_dim"] = small["qk_nope_head_dim"] + small["qk_rope_head_dim"]
        if "expand" in config and main:
            for key, value in config.items():
                if type(value) is int and INNER.search(key) and value == config["expand"] * config[main]:
                    small[key] = int(small[main] * config["expand"])
        head_dim = small.get("head_dim") or (
            small[main] // small[head_keys[0]]
            if main and head_keys and type(small.get(main)) is int and small.get(head_keys[0])
            else None
        )
        old_dim = config.get("head_dim") or (
            config[main] // config[head_keys[0]] if main and head_keys and config[head_keys[0]] else None
        )
        for key in ("rope_parameters", "rope_scaling"):
            if isinstance(small.get(key), dict) and type(head_dim) is int and type(old_dim) is int:
                _scale_sections(small[key], head_dim, old_dim)


def _scale_sections(rope: dict[str, Any], head_dim: int, old_dim: int) -> None:
    for key, value in rope.items():
        if isinstance(value, dict):
            _scale_sections(value, head_dim, old_dim)
        elif key.endswith("section") and isinstance(value, list):
            total = max(len(value), sum(value) * head_dim // old_dim)
            parts = [max(1, total * v // sum(value)) for v in value]
            parts[0] += total - sum(parts)
            rope[key] = parts
        elif key in ("long_factor", "short_factor") and isinstance(value, list):
            rope[key] = value[: head_dim // 2]


def _common_prefix(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _ladder(values: set[int], step: int) -> dict[int, int]:
    """Each value's small width: multiples of `step` in the same order, doublings kept."""
    small: dict[int, int] = {}
    for value in sorted(values):
        half = next((small[value // k] * k for k in (2, 4, 8) if value % k == 0 and value // k in small), None)
        free = step * (1 + max(small.values(), default=0) // step)
        small[value] = half if half and half <= 8 * step and half not in small.values() else free
    return small


def _integers(config: Any, key: str = "") -> list[tuple[str, int]]:
    if isinstance(config, dict):
        return [pair for k, v in config.items() if k not in LABELS for pair in _integers(v, str(k))]
    if isinstance(config, list | tuple):
        return [pair for v in config for pair in _integers(v, key)]
    return [(key, config)] if type(config) is int else []


def _kept_layers(config: dict[str, Any]) -> tuple[int, list[int], str] | None:
    """Number of layers, indices of those kept, and the number's key; lists with one entry per layer tell the kinds."""
    key = next(
        (
            k
            for k in ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "encoder_layers")
            if type(config.get(k)) is int
        ),
        None,
    )
    if key is None or config[key] < 2 or _stages(config):
        return None
    count = config[key]
    lists = [
        v
        for k, v in config.items()
        if isinstance(v, list)
        and len(v) == count
        and all(isinstance(x, str | bool) or (isinstance(x, int) and x in (0, 1)) for x in v)
    ]
    kinds: dict[tuple, int] = {}
    for i, kind in enumerate(zip(*lists, strict=True)):
        kinds.setdefault(kind, i)
    kept = list(kinds.values()) or [0, 1]
    least = 2
    for name, value in config.items():
        if _is_layer_index(name, value, count):
            least = max(least, len(value)) if isinstance(value, list) else least
    more = (i for i in range(count) if i not in kept)
    while len(kept) < least:
        kept.append(next(more))
    return count, sorted(kept)[: max(4, least)], key


def _is_layer_index(key: str, value: Any, count: int) -> bool:
    if not re.search(r"out_indices$|index(es|s)$|_layers?$|_indices$|blocks?_idx|layer_ids?$|_blocks$|fullatt", key):
        return False
    if isinstance(value, list):
        return 0 < len(value) < count and all(type(v) is int and -count <= v <= count for v in value)
    return (
        type(value) is int
        and key.endswith(("feature_layer", "select_layer", "layer_id", "layer_idx"))
        and -count <= value <= count
    )


def _stages(config: dict[str, Any]) -> int:
    """How many stages a hierarchical model has; 0 for others."""
    names = ("depths", "num_block_repeats", "blocks_per_stage", "stage_num_blocks", "hidden_sizes")
    return next((len(config[name]) for name in names if isinstance(config.get(name), list | tuple)), 0)


def _near(layer: int) -> int:
    """A layer of two that stands for `layer`, from the end where that one is."""
    return max(layer, -2) if layer < 0 else min(layer, 1)


def _moved(value: Any, count: int, small: int) -> Any:
    """A layer's index, or several, among fewer layers: several stay several, spread to the last."""
    if isinstance(value, list):
        offset = 1 if count in value else 0
        if all(v >= 0 for v in value):
            last = len(value) - 1
            return [max(0, small - 1 - last + i) + offset for i in range(len(value))]
        return [_moved(v, count, small) for v in value]
    return max(value, -small) if value < 0 else min(value, small - 1)
