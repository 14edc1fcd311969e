"""Token ids and what goes with them; placeholders for what other parts of the model make."""

from __future__ import annotations

from typing import Any

import torch

from normswap.observe.inputs.needs import Needs

Inputs = dict[str, Any]
#: what a kind of input is called in `mm_token_type_ids`
_TYPES = {"image": 1, "video": 2, "audio": 3}


def text_parts(needs: Needs) -> list[list[Inputs]]:
    """Ways to make the ids, and those of the decoder."""
    parts: list[list[Inputs]] = []
    main = needs.model.main_input_name
    ids = "input_ids" if "input_ids" in needs.taken else main if main == "inputs" and main in needs.taken else None
    if ids:
        choices = [_with_companions(needs, ids, choice) for choice in _ids(needs, needs.length)]
        if {"image_attention_mask", "pixel_values"} <= needs.taken:  # which text sees which picture
            seen = torch.ones(needs.batch, needs.length, 1, dtype=torch.long)
            choices += [{**choices[0], "image_attention_mask": seen}]
        parts.append(choices)
    if "decoder_input_ids" in needs.taken:
        parts.append([{"decoder_input_ids": choice} for choice in _ids(needs, needs.target)])
    for name in sorted(needs.taken):
        role = name.removesuffix("_input_ids")
        if role != name and role not in ("decoder", "audio", "context"):  # a second text: a question, a protein
            mask = f"{role}_attention_mask"
            second = {name: needs.ids(needs.batch, needs.target)}
            if mask in needs.taken:
                second[mask] = torch.ones(needs.batch, needs.target, dtype=torch.long)
            parts.append([second])
    return parts


def _ids(needs: Needs, length: int) -> list[torch.Tensor]:
    """One id per place; of models of several codebooks, one per codebook, as the last axis or as rows of the batch."""
    choices = [needs.ids(needs.batch, length)]
    books = needs.stated("num_codebooks", "n_codebooks", "num_quantizers", "num_channels")
    if isinstance(books, int) and books > 3 or needs.stated("num_codebooks", "n_codebooks"):
        choices += [
            needs.ids(needs.batch, length, books),
            needs.ids(needs.batch * books, length),
            needs.ids(needs.batch, books, length),
            needs.ids(needs.batch, length, books + 1),
        ]
    return choices


def _with_companions(needs: Needs, name: str, ids: torch.Tensor) -> Inputs:
    inputs: Inputs = {name: ids}
    if "attention_mask" in needs.taken:
        inputs["attention_mask"] = torch.ones(ids.shape[:2], dtype=torch.long)
    if "bbox" in needs.taken:
        corner = torch.arange(needs.length).expand(needs.batch, needs.length) % 5
        inputs["bbox"] = torch.stack([corner, corner, corner + 3, corner + 2], -1)
    if "mm_token_type_ids" in needs.taken:
        inputs["mm_token_type_ids"] = torch.zeros_like(ids)
    return inputs


def with_placeholders(needs: Needs, text: Inputs, tokens: dict[str, int]) -> Inputs:
    """`text` with, in each row, as many of each kind's token as there are features of it.

    Kinds for which the configuration names no token enter the model by another way: by a mask of their places, or not
    through the text at all.
    """
    ids = text["input_ids"]
    if ids.ndim != 2:
        return text
    pieces, types = [ids[:, :2]], [torch.zeros_like(ids[:, :2])]
    for kind, count in tokens.items():
        token = _token(needs, kind)
        if token is None and _places(kind) in needs.taken:
            token = int(ids[0, 0])  # the mask says where, any id will do
        if token is None or count % len(ids):
            continue
        block = [token] * (count // len(ids))
        start, end = (_marker(needs, kind, which) for which in ("start", "end"))
        row = torch.tensor([*start, *block, *end])
        kinds = torch.tensor([0] * len(start) + [_TYPES[kind]] * len(block) + [0] * len(end))
        pieces.append(row.expand(len(ids), -1))
        types.append(kinds.expand(len(ids), -1))
    pieces.append(ids[:, 2:])
    types.append(torch.zeros_like(ids[:, 2:]))
    filled = torch.cat(pieces, 1)
    made = {"input_ids": filled, "attention_mask": torch.ones_like(filled), "mm_token_type_ids": torch.cat(types, 1)}
    filled_in = text | {name: value for name, value in made.items() if name in text}
    if _places("image") in needs.taken:
        filled_in[_places("image")] = (made["mm_token_type_ids"] == _TYPES["image"]).long()
    return filled_in


def has_places(needs: Needs, kind: str) -> bool:
    """Whether features of this kind take the place of some of the text."""
    return "input_ids" in needs.taken and (_token(needs, kind) is not None or _places(kind) in needs.taken)


def _places(kind: str) -> str:
    """The argument that masks the places of features where no token does."""
    return f"{kind}_embeds_position_mask"


def _token(needs: Needs, kind: str) -> int | None:
    token = needs.stated(*(f"{kind}_token_{end}" for end in ("id", "index")), f"{kind}_token")
    return token if type(token) is int else None


def _marker(needs: Needs, kind: str, which: str) -> list[int]:
    names = [f"{kind}_{which}_token_id"] + ([f"vision_{which}_token_id"] if kind != "audio" else [])
    token = needs.stated(*names)
    return [token] if type(token) is int else []
