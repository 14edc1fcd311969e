"""What recipes train on: files of each kind, packed without loss, and a held-out part that is never trained on."""

import json
from pathlib import Path

import datasets
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from normswap.errors import RecipeError
from normswap.tune.data import Corpus, corpus
from normswap.tune.recipe import Recipe

CHECKPOINTS = Path(__file__).parent / "checkpoints"
TAKES = {"input_ids", "attention_mask", "token_type_ids", "labels"}
# each of its own, so that rows can be told apart
TEXTS = [f"Text {i}: " + " ".join(f"word{(7 * i + k * k) % 50}" for k in range(4 + i % 9)) for i in range(60)]


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """What `datasets` keeps goes where pytest clears up."""
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def causal():
    """A tokenizer without special tokens around a text, and with one for its end, as GPT-2 has."""
    return AutoTokenizer.from_pretrained(CHECKPOINTS / "gpt2-shakespeare")


@pytest.fixture(scope="module")
def masked():
    """A small tokenizer as BERT has it: [CLS] text [SEP], with a mask and padding."""
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    names["mask_token"] = "[MASK]"
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=160, special_tokens=list(names.values())))
    ends = [(name, made.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    made.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """The same texts in each kind of file."""
    folder = tmp_path_factory.mktemp("texts")
    rows = datasets.Dataset.from_dict(
        {"text": TEXTS, "label": [i % 3 for i in range(len(TEXTS))], "other": TEXTS[::-1]}
    )
    (folder / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    (folder / "a.json").write_text(json.dumps(list(rows)), encoding="utf-8")
    rows.to_parquet(folder / "a.parquet")
    rows.to_csv(folder / "a.csv")
    (folder / "a.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    for name, part in (("one", TEXTS[:20]), ("three", TEXTS[40:]), ("two", TEXTS[20:40])):
        (folder / "parts").mkdir(exist_ok=True)
        (folder / "parts" / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in part))
    (folder / "parts" / "README").write_text("no data")
    return folder


def made(tokenizer, objective="lm", takes=TAKES, **data) -> Corpus:
    recipe = {"model": "m", "output": "o", "stages": [{"steps": 1, "learning_rate": 1e-3}], "objective": objective}
    return corpus(Recipe.of(recipe | {"data": {"block": 16} | data}), tokenizer, takes, None)


def ids(rows) -> list[list[int]]:
    return [list(row) for row in rows["input_ids"]]


# ---- packing


@pytest.mark.parametrize("rows", [60, 2500], ids=["few", "more than are read at once"])
def test_packing_loses_no_token_and_doubles_none(causal, tmp_path, rows):
    texts = [TEXTS[i % len(TEXTS)] + str(i) for i in range(rows)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    found = made(causal, source=str(tmp_path / "a.jsonl"), held_out_blocks=10**6)
    blocks = ids(found.train) + ids(found.held_out)
    expected = []
    for text in texts:  # one text ends, another begins
        expected += causal(text)["input_ids"] + [causal.eos_token_id]
    assert len(blocks) == len(expected) // 16 > 50 and all(len(block) == 16 for block in blocks)
    assert [token for block in blocks for token in block] == expected[: 16 * len(blocks)]
    assert all(set(row) == {1} for part in (found.train, found.held_out) for row in part["attention_mask"])
    assert found.train_tokens == 16 * len(found.train)


def test_each_block_is_a_text_as_the_model_knows_it(masked, files):
    found = made(masked, source=str(files / "a.jsonl"), held_out_blocks=10**6)
    blocks = ids(found.train) + ids(found.held_out)
    expected = [token for text in TEXTS for token in masked(text, add_special_tokens=False)["input_ids"]]
    assert all(block[0] == masked.cls_token_id and block[-1] == masked.sep_token_id for block in blocks)
    assert all(len(block) == 16 for block in blocks) and len(blocks) == len(expected) // 14 > 20
    inner = [token for block in blocks for token in block[1:-1]]
    assert inner == expected[: len(inner)] and masked.sep_token_id not in inner


def test_lines_of_a_text_stay_what_they_are(causal, tmp_path):
    text = "To be,\n  or not\n\nto be: that\tis the question.\n" * 20
    (tmp_path / "a.txt").write_text(text)
    found = made(causal, source=str(tmp_path / "a.txt"), held_out_blocks=10**6)
    again = causal.decode([token for block in ids(found.train) + ids(found.held_out) for token in block])
    assert len(again) > 800 and text.startswith(again)


# ---- sources


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.csv", "parts", "parts/*.jsonl", "pa*/t*.jsonl"])
def test_every_kind_of_file_gives_the_same_rows(masked, files, name):
    found = made(masked, pack=False, block=64, source=str(files / name), held_out_blocks=10**6)
    order = [*TEXTS[:20], *TEXTS[40:], *TEXTS[20:40]] if name.startswith("pa") else TEXTS  # files by name
    expected = masked(order[20:] if name.startswith("pa*") else order)["input_ids"]
    assert ids(found.train) + ids(found.held_out) == expected
    assert len(found.held_out) == len(expected) // 10


def test_lines_of_a_text_file_are_rows_where_nothing_is_packed(masked, files):
    found = made(masked, pack=False, block=64, source=str(files / "a.txt"), held_out_blocks=10**6)
    assert ids(found.train) + ids(found.held_out) == masked(TEXTS)["input_ids"]


def test_the_shipped_text(causal):
    found = made(causal, block=64)
    assert "shipped Shakespeare" in found.described and len(found.train) > 100
    assert len(found.held_out) >= 10


def test_columns(masked, files):
    source = str(files / "a.jsonl")
    other = made(masked, pack=False, block=64, source=source, column="other", held_out_blocks=10**6)
    assert ids(other.train) + ids(other.held_out) == masked(TEXTS[::-1])["input_ids"]
    found = made(masked, "classification", pack=False, block=64, source=source, label="label")
    assert list(found.train["labels"]) == [i % 3 for i in range(len(found.train))]
    batch = found.collate([found.train[i] for i in range(5)])
    assert batch["labels"].tolist() == [0, 1, 2, 0, 1]
    # padded on the right, and said so
    lengths = [len(masked(text)["input_ids"]) for text in TEXTS[:5]]
    assert len(set(lengths)) > 1 and batch["input_ids"].shape == (5, max(lengths))
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert (batch["input_ids"][batch["attention_mask"] == 0] == masked.pad_token_id).all()
    # a model that takes fewer inputs gets fewer
    assert set(made(masked, takes={"input_ids"}, source=source).train.column_names) == {"input_ids"}


def test_long_rows_are_cut_and_empty_ones_left_out(masked, causal, tmp_path):
    rows = ["word1 " * 50, "", "word2 word3", "word4 " * 20, "word5 word6 word7"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in rows))
    found = made(masked, pack=False, source=str(tmp_path / "a.jsonl"), held_out=0.3, held_out_blocks=9)
    lengths = [len(row) for row in ids(found.train) + ids(found.held_out)]
    assert max(lengths) == 16 and ids(found.train)[0][-1] == masked.sep_token_id
    assert len(lengths) == 5 and lengths[1] == 2  # [CLS] [SEP]: a text for this model
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": ""}) for _ in range(9)))
    padded = AutoTokenizer.from_pretrained(CHECKPOINTS / "gpt2-shakespeare", pad_token="<|endoftext|>")
    with pytest.raises(RecipeError, match="no row of .*b.jsonl has two tokens in its column 'text'"):
        made(padded, pack=False, source=str(tmp_path / "b.jsonl"))


# ---- what is held out


@pytest.mark.parametrize("pack", [True, False])
def test_the_last_part_is_held_out_and_not_trained_on(masked, files, pack):
    source = str(files / "a.jsonl")
    found = made(masked, pack=pack, source=source, held_out=0.25)
    train, held_out = ids(found.train), ids(found.held_out)
    assert len(held_out) == (len(train) + len(held_out)) // 4 > 5
    assert not {tuple(row) for row in train} & {tuple(row) for row in held_out}
    # fewer are evaluated on; no more are trained on for that
    few = made(masked, pack=pack, source=source, held_out=0.25, held_out_blocks=3)
    assert ids(few.held_out) == held_out[:3] and ids(few.train) == train


def test_another_file_may_be_held_out(masked, files):
    parts = files / "parts"
    found = made(masked, pack=False, block=64, source=str(parts / "one.jsonl"), held_out_source=str(parts / "t*.jsonl"))
    assert ids(found.train) == masked(TEXTS[:20])["input_ids"]
    assert ids(found.held_out) == masked([*TEXTS[40:], *TEXTS[20:40]])["input_ids"]


def test_too_little_to_hold_some_out(masked, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "one row alone"}))
    with pytest.raises(RecipeError, match="1 rows are too few to hold out 10% of them"):
        made(masked, pack=False, source=str(tmp_path / "a.jsonl"))


def test_calibration_is_of_the_training_part(masked, files):
    found = made(masked, pack=False, block=64, source=str(files / "a.jsonl"), held_out=0.25)
    batches = found.calibration(200)
    rows = [
        row[keep.bool()].tolist()
        for batch in batches
        for row, keep in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    train = ids(found.train)
    assert all(row in train for row in rows) and not any(row in ids(found.held_out) for row in rows)
    assert len(batches) >= 2 and 200 / 2 < sum(map(len, rows)) < 200 * 2
    assert {train.index(row) // 15 for row in rows} == {0, 1, 2}, "they are from all over it"


# ---- masks


def test_held_out_masks_are_the_same_each_time_and_those_of_the_training_are_not(masked, files):
    masking = {"kind": "mlm", "probability": 0.3}
    found = made(masked, masking, source=str(files / "a.jsonl"), held_out=0.4)
    again = made(masked, masking, source=str(files / "a.jsonl"), held_out=0.4)
    plain = made(masked, source=str(files / "a.jsonl"), held_out=0.4)
    kept = [found.held_out[i] for i in range(len(found.held_out))]
    first, second = found.collate(kept), found.collate(kept)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert list(found.held_out["labels"]) == list(again.held_out["labels"])
    assert ids(found.held_out) == ids(again.held_out) and ids(found.train) == ids(plain.train)

    labels = first["labels"]
    chosen = labels >= 0
    original = torch.tensor(ids(plain.held_out))
    assert 0.2 < float(chosen.float().mean()) < 0.35  # 0.26: of 16 tokens, 14 may be masked
    assert torch.equal(labels[chosen], original[chosen]) and (labels[~chosen] == -100).all()
    assert torch.equal(first["input_ids"][~chosen], original[~chosen])
    assert (first["input_ids"][chosen] == masked.mask_token_id).float().mean() > 0.6  # 80%, 10% another, 10% as it is
    assert not chosen[:, 0].any() and not chosen[:, -1].any()  # no special token

    rows = [found.train[i] for i in range(len(found.train))]
    draws = [found.collate(rows)["labels"] for _ in range(2)]
    assert not torch.equal(*draws) and all((draw >= 0).any() for draw in draws)


def test_masks_of_rows_of_different_length(masked, files):
    found = made(masked, "mlm", pack=False, block=64, source=str(files / "a.jsonl"), held_out=0.4)
    batch = found.collate([found.train[i] for i in range(6)])
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all() and (batch["attention_mask"] == 0).any()
