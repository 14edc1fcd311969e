"""What a recipe trains on and is measured on: text through `datasets`, tokenised, packed, a part held out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, load_dataset
from datasets.utils.logging import disable_progress_bar
from transformers import DataCollatorForLanguageModeling, DataCollatorWithPadding, default_data_collator

from normswap.errors import RecipeError
from normswap.tune.recipe import Data, MaskedLanguageModelling, Recipe
from normswap.verification.text import special_tokens

#: by the end of a file's name, what `datasets` calls it
BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
#: of a row of a training: `(seed, i)`, by which what is drawn for it is drawn
PLACE = "place"
Collate = Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]
_SEED = 0
#: rows of a batch to calibrate on, at most
_TOGETHER = 8


@dataclass(frozen=True)
class Corpus:
    """Rows of token ids.

    Attributes:
        train, held_out: columns `input_ids`, `attention_mask`, and what the objective reads beside them.
        collate: makes a batch of rows as they are trained on, and `plain` of them as they are.
        name: of the source, without folders.
        described: what it is, in words.
    """

    train: Dataset
    held_out: Dataset
    collate: Collate
    plain: Collate
    name: str
    described: str

    @property
    def train_tokens(self) -> int:
        """Tokens in one pass over the training part."""
        return sum(len(ids) for ids in self.train.with_format(None)["input_ids"])

    def calibration(self, tokens: int) -> list[dict[str, torch.Tensor]]:
        """About so many tokens of the training part, from all over it, two batches at least; short rows are padded."""
        count = min(len(self.train), max(2, round(tokens * len(self.train) / self.train_tokens)))
        rows = [self.train[i * len(self.train) // count] for i in range(count)]
        rows = [{name: value for name, value in row.items() if name != "labels"} for row in rows]
        size = min(_TOGETHER, (count + 1) // 2)
        rows.sort(key=lambda row: len(row["input_ids"]))  # rows of about one length together
        return [dict(self.plain(rows[i : i + size])) for i in range(0, count, size)]


def corpus(recipe: Recipe, tokenizer, takes: set[str], longest: int | None) -> Corpus:
    """The data of a recipe.

    Args:
        tokenizer: of the model.
        takes: names of arguments of the model's `forward`.
        longest: how many tokens the model has positions for.

    Raises:
        RecipeError: data that cannot be read, lack a column, are too short, or do not fit the model.
    """
    data = recipe.data
    if tokenizer is None:
        raise RecipeError(f"{recipe.model.path} has no tokenizer to read text with: put its files beside config.json.")
    if longest is not None and data.block > longest:
        raise RecipeError(
            f"data.block is {data.block}, and the model has positions for {longest} tokens: expected fewer."
        )
    disable_progress_bar()
    rows, name = _load(data, data.source)
    make = _packed if data.pack else _each
    if data.held_out_source is not None:
        kept, _ = _load(data, data.held_out_source)
        train, held_out = make(rows, data, tokenizer, data.source), make(kept, data, tokenizer, data.held_out_source)
    else:
        train, held_out = _split(make(rows, data, tokenizer, data.source), data)
    train, held_out = (_fitting(part, takes) for part in (train, held_out))
    held_out = held_out.select(range(min(len(held_out), data.held_out_blocks)))
    masked = next((o for o in recipe.objective if isinstance(o, MaskedLanguageModelling)), None)
    plain = _placeless(default_data_collator if data.pack else _padding(tokenizer, recipe))
    collate = plain
    if masked is not None:
        held_out = _masked(held_out, _masking(tokenizer, masked.probability, _SEED, recipe))
        collate = _drawing(_masking(tokenizer, masked.probability, None, recipe))
    described = f"{len(train)} rows of up to {data.block} tokens of {name}"
    return Corpus(train, held_out, collate, plain, name, described)


def _load(data: Data, source: str) -> tuple[Dataset, str]:
    """All rows of a source, and its name without folders."""
    if source == "shipped":
        files = [str(resources.files("normswap").joinpath("data/calibration.txt"))]
        return _read("text", files, data, source), "shipped Shakespeare"
    path = Path(source).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix in BUILDERS)
    elif any(c in source for c in "*?["):
        root = Path(path.anchor) if path.is_absolute() else Path()
        found = sorted(root.glob(str(path.relative_to(path.anchor))))
    else:
        found = [path] if path.is_file() else []
    if not found:
        if source.count("/") > 1 or source.startswith((".", "/", "~")) or path.suffix in BUILDERS or path.is_dir():
            raise RecipeError(
                f"data: {source} is no file, nor a folder or pattern of {', '.join(BUILDERS)} files, nor a Hub id."
            )
        return _hub(data, source), source
    endings = {p.suffix for p in found}
    if len(endings) > 1 or not endings <= BUILDERS.keys():
        raise RecipeError(
            f"data: expected {source} to be of one kind of {', '.join(BUILDERS)}; found {sorted(endings)}."
        )
    return _read(BUILDERS[endings.pop()], [str(p) for p in found], data, source), path.name


def _read(builder: str, files: list[str], data: Data, source: str) -> Dataset:
    # a text is one row, so that its line ends stay
    options = {"sample_by": "document"} if builder == "text" and data.pack else {}
    try:
        found = load_dataset(builder, data_files=files, split="train", **options)
    except Exception as error:  # of datasets, pyarrow, or the file system
        cause = error.__cause__ or error
        raise RecipeError(f"data: {source} cannot be read as {builder}: {' '.join(str(cause).split()):.300}") from error
    return _checked(found, data, source)


def _hub(data: Data, source: str) -> Dataset:
    try:
        found = load_dataset(source, data.name, split=data.split)
    except Exception as error:  # whatever the Hub or the connection says
        reason = " ".join(str(error).split())
        raise RecipeError(
            f"data: {source} is no local file and could not be had from the Hub: {reason:.300}"
        ) from error
    return _checked(found, data, source)


def _checked(found: Dataset, data: Data, source: str) -> Dataset:
    wanted = {"data.column": data.column, "data.label": data.label}
    for key, name in wanted.items():
        if name is not None and name not in found.column_names:
            raise RecipeError(f"{key} is '{name}', and {source} has the columns {', '.join(found.column_names)}.")
    if not len(found):
        raise RecipeError(f"data: {source} is empty.")
    return found


def _packed(rows: Dataset, data: Data, tokenizer, source: str) -> Dataset:
    """All texts one after another, cut to blocks, each within the special tokens that a text has.

    What is left at the end and is shorter than a block is not used.
    """
    before, after = special_tokens(tokenizer)
    inner = data.block - len(before) - len(after)
    # one text ends, another begins
    between = [tokenizer.eos_token_id] if not after and tokenizer.eos_token_id is not None else []

    rest: list[int] = []  # of the texts that were cut, what goes on into the next block

    def cut(batch: dict[str, list]) -> dict[str, list]:
        ids = tokenizer(batch[data.column], add_special_tokens=False, verbose=False)["input_ids"]
        joined = rest + [token for text in ids for token in (*text, *between)]
        rest[:] = joined[len(joined) // inner * inner :]
        pieces = [before + joined[i : i + inner] + after for i in range(0, len(joined) - inner + 1, inner)]
        return {"input_ids": pieces, "attention_mask": [[1] * len(piece) for piece in pieces]}

    made = rows.map(cut, batched=True, remove_columns=rows.column_names)
    if len(made) < 2:
        raise RecipeError(f"data: {source} gives {len(made)} blocks of {data.block} tokens; expected 2 at least.")
    return made


def _each(rows: Dataset, data: Data, tokenizer, source: str) -> Dataset:
    """Each text a row, cut off at `block` tokens."""

    def cut(batch: dict[str, list]) -> dict[str, list]:
        made = dict(tokenizer(batch[data.column], truncation=True, max_length=data.block, verbose=False))
        return made | ({"labels": batch[data.label]} if data.label is not None else {})

    made = rows.map(cut, batched=True, remove_columns=rows.column_names)
    made = made.filter(lambda row: len(row["input_ids"]) > 1)
    if not len(made):
        raise RecipeError(f"data: no row of {source} has two tokens in its column '{data.column}'.")
    return made


def _split(rows: Dataset, data: Data) -> tuple[Dataset, Dataset]:
    """The last part of the rows is held out; as many as there is room for evaluation are enough of it."""
    kept = max(1, int(len(rows) * data.held_out))
    if kept >= len(rows):
        raise RecipeError(f"data: {len(rows)} rows are too few to hold out {data.held_out:.0%} of them.")
    return rows.select(range(len(rows) - kept)), rows.select(range(len(rows) - kept, len(rows)))


def _fitting(rows: Dataset, takes: set[str]) -> Dataset:
    return rows.remove_columns([name for name in rows.column_names if name not in takes | {"input_ids", "labels"}])


def _padding(tokenizer, recipe: Recipe) -> DataCollatorWithPadding:
    if tokenizer.pad_token is None:
        raise RecipeError(
            f"{recipe.model.path}: rows of different length need padding, and its tokenizer has no pad token."
        )
    return DataCollatorWithPadding(tokenizer)


def _masking(tokenizer, probability: float, seed: int | None, recipe: Recipe) -> DataCollatorForLanguageModeling:
    if tokenizer.mask_token is None:
        raise RecipeError(f"objective mlm: the tokenizer of {recipe.model.path} has no mask token; is it lm?")
    return DataCollatorForLanguageModeling(tokenizer, mlm_probability=probability, seed=seed)


def _drawing(masking: DataCollatorForLanguageModeling) -> Collate:
    """Masks are drawn by the place of a batch in the training: neither a resumed run nor several processes draw others.

    Rows that have their masks keep them.
    """

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if "labels" in rows[0]:
            return default_data_collator(rows)
        if PLACE in rows[0]:
            seed = np.random.SeedSequence(rows[0][PLACE]).generate_state(1, np.uint64)[0]
            masking.generator = torch.Generator().manual_seed(int(seed >> np.uint64(1)))
        return placeless(rows)

    placeless = _placeless(masking)
    return collate


def _placeless(collate: Collate) -> Collate:
    return lambda rows: collate([{name: value for name, value in row.items() if name != PLACE} for row in rows])


def _masked(rows: Dataset, collate: DataCollatorForLanguageModeling) -> Dataset:
    """`rows` with masks drawn once, so that all evaluations are of the same."""

    def mask(batch: dict[str, list]) -> dict[str, list]:
        names = list(batch)
        made = collate([{name: batch[name][i] for name in names} for i in range(len(batch["input_ids"]))])
        return {name: value.tolist() for name, value in made.items()}

    return rows.map(mask, batched=True, batch_size=len(rows))
