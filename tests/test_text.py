"""Evaluation batches: what they hold, where they are from, and what is refused."""

import pytest
import torch
from transformers import AutoTokenizer

from normswap.errors import SourceError
from normswap.verification.text import batches


@pytest.fixture(scope="module")
def tokenizer(checkpoints):
    return AutoTokenizer.from_pretrained(checkpoints / "gpt2-shakespeare")


class WithSpecialTokens:
    """A tokenizer of letters that puts 1 before and 2 after a text."""

    def __call__(self, text, add_special_tokens=True, **_):
        ids = [ord(c) % 64 + 3 for c in text]
        return {"input_ids": [1, *ids, 2] if add_special_tokens else ids}


def test_windows_follow_the_text(tokenizer, tmp_path):
    text = "To be, or not to be, that is the question. " * 40
    (tmp_path / "text.txt").write_text(text)
    found = batches(tokenizer, tmp_path / "text.txt", 1024, length=16, count=10)
    rows = torch.cat(found.ids)
    assert rows.shape == (10, 16) and rows.dtype == torch.long
    assert text.startswith(tokenizer.decode(rows.flatten().tolist()))
    assert found.source == str(tmp_path / "text.txt")


def test_shipped_text_is_enough_for_the_default(tokenizer):
    found = batches(tokenizer, None, 1024, length=256, count=16)
    assert sum(ids.numel() for ids in found.ids) == 4096
    assert "Shakespeare" in found.source


def test_shipped_text_was_not_trained_on(checkpoints, tokenizer):
    """All three models are surprised by it: their cross-entropy on it is near 4 nats, against 3.5 in training."""
    from transformers import AutoModelForCausalLM

    ids = torch.cat(batches(tokenizer, None, 1024, length=256, count=8).ids)
    model = AutoModelForCausalLM.from_pretrained(checkpoints / "llama-shakespeare").eval()
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert 3.9 < loss < 4.4  # measured 4.15; 3.55 on the 93% to 97% that were trained on


def test_special_tokens_stand_around_every_window():
    rows = torch.cat(batches(WithSpecialTokens(), None, 128, length=12, count=5).ids)
    assert rows.shape == (5, 12)
    assert (rows[:, 0] == 1).all() and (rows[:, -1] == 2).all() and (rows[:, 1:-1] > 2).all()


def test_random_ids_without_a_tokenizer_are_repeatable_and_named():
    first, again = (batches(None, None, 50, length=8, count=30) for _ in range(2))
    assert torch.equal(torch.cat(first.ids), torch.cat(again.ids))
    assert "random" in first.source and "no tokenizer" in first.source
    assert int(torch.cat(first.ids).max()) < 50 and torch.cat(first.ids).unique().numel() > 40


def test_large_vocabularies_get_small_batches():
    assert all(ids.shape[0] == 1 for ids in batches(None, None, 256_000, length=256, count=4).ids)
    assert batches(None, None, 1024, length=256, count=8).ids[0].shape[0] == 8


def test_a_short_text_gives_the_windows_it_has(tokenizer, tmp_path):
    (tmp_path / "text.txt").write_text("Speak, speak. " * 10)
    rows = torch.cat(batches(tokenizer, tmp_path / "text.txt", 1024, length=16, count=1000).ids)
    assert 1 <= rows.shape[0] < 10


def test_refusals(tokenizer, tmp_path):
    (tmp_path / "short.txt").write_text("Speak.")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(SourceError, match="too short.*longer text"):
        batches(tokenizer, tmp_path / "short.txt", 1024, length=64, count=1)
    with pytest.raises(SourceError, match="UTF-8"):
        batches(tokenizer, tmp_path / "binary.txt", 1024, length=64, count=1)
    with pytest.raises(SourceError, match="nowhere.txt.*No such file"):
        batches(tokenizer, tmp_path / "nowhere.txt", 1024, length=64, count=1)
    with pytest.raises(SourceError, match="no tokenizer"):
        batches(None, tmp_path / "short.txt", 1024, length=64, count=1)
    with pytest.raises(SourceError, match="do not belong together"):
        batches(tokenizer, None, 100, length=64, count=1)
