"""What moving the norms of a model of sentence embeddings costs: the cosine of each embedding to the original's.

    .venv/bin/python scripts/embeddings.py ./all-MiniLM-L6-v2

The model is a BERT (post-norm). It is converted to pre-norm, calibrated on the shipped text, and to the exact form
whose skip is normalised. Sentences are the speeches of the shipped text that is kept for measuring, without the names;
their embeddings are means over tokens.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
import torch
from transformers import AutoModel, AutoTokenizer

import normswap
from normswap.cli.options import quiet
from normswap.verification.text import read

SENTENCES = 200


@torch.no_grad()
def embed(model: torch.nn.Module, tokenizer, sentences: list[str]) -> torch.Tensor:
    """`(sentences, width)`, each of length 1."""
    found = []
    for start in range(0, len(sentences), 32):
        batch = tokenizer(sentences[start : start + 32], padding=True, truncation=True, return_tensors="pt")
        hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        found.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.nn.functional.normalize(torch.cat(found), dim=-1)


@click.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False))
@click.option("--tokens", default=8192, show_default=True, help="To calibrate on.")
@click.option("--window", default=32, show_default=True, help="In windows of so many: sentences are short.")
def main(model: str, tokens: int, window: int) -> None:
    quiet()
    torch.set_grad_enabled(False)
    tokenizer = AutoTokenizer.from_pretrained(model)
    speeches = [" ".join(speech.splitlines()[1:]) for speech in read(None)[0].split("\n\n")]
    sentences = [speech for speech in speeches if len(speech) > 30][:SENTENCES]
    wanted = embed(AutoModel.from_pretrained(model).eval(), tokenizer, sentences)
    click.echo(f"{len(sentences)} sentences\n\n| placement | claim | mean cosine | worst |\n|---|---|---|---|")
    for placement, options in (("pre-normalized-skip", {}), ("pre", {"tokens": tokens, "window": window})):
        with tempfile.TemporaryDirectory() as folder:
            done = normswap.convert(model, Path(folder) / "out", placement=placement, verify="fast", **options)
            found = embed(normswap.load(done.folder).eval(), tokenizer, sentences)
        cosines = (wanted * found).sum(-1)
        click.echo(f"| {placement} | {done.plan.claim} | {cosines.mean():.6f} | {cosines.min():.6f} |")


if __name__ == "__main__":
    main()
