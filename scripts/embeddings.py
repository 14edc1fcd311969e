"""What moving the norms of a model of sentence embeddings costs: the cosine of each embedding to the original's.

    .venv/bin/python scripts/embeddings.py ./all-MiniLM-L6-v2

The model is a BERT (post-norm). It is converted to pre-norm, calibrated on speeches of the text for calibration, and
to the exact form whose skip is normalised. It is measured on speeches of the other shipped text, of 48 tokens at most;
embeddings are means over tokens.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
import torch
from transformers import AutoModel, AutoTokenizer

import normswap
from normswap.cli.options import quiet
from normswap.verification.text import calibration_text, read

SENTENCES, LENGTH = 200, 48


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


def speeches(text: str, count: int) -> list[str]:
    """Speeches from all over a text, without the speakers' names."""
    found = [" ".join(speech.splitlines()[1:]) for speech in text.split("\n\n")]
    found = [speech for speech in found if len(speech) > 30]
    return found[:: max(1, len(found) // count)][:count]


@click.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False))
@click.option("--count", default=480, show_default=True, help="Sentences to calibrate on.")
def main(model: str, count: int) -> None:
    quiet()
    torch.set_grad_enabled(False)
    tokenizer, original = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model).eval()
    tokenizer.model_max_length = LENGTH
    sentences = speeches(read(None)[0], SENTENCES)
    fitted_on = speeches(calibration_text().read_text("utf-8"), count)
    batches = [
        dict(tokenizer(fitted_on[i : i + 32], padding=True, truncation=True, return_tensors="pt"))
        for i in range(0, len(fitted_on), 32)
    ]
    wanted = embed(original, tokenizer, sentences)
    plans = {
        "pre-normalized-skip": normswap.plan(original, placement="pre-normalized-skip"),
        "pre": normswap.plan(original, placement="pre", calibrate=batches),
    }
    click.echo(f"{len(sentences)} sentences\n\n| placement | claim | mean cosine | worst |\n|---|---|---|---|")
    for placement, plan in plans.items():
        with tempfile.TemporaryDirectory() as folder:
            done = normswap.convert(model, Path(folder) / "out", plan=plan, verify="fast")
            found = embed(normswap.load(done.folder).eval(), tokenizer, sentences)
        cosines = (wanted * found).sum(-1)
        click.echo(f"| {placement} | {plan.claim} | {cosines.mean():.6f} | {cosines.min():.6f} |")


if __name__ == "__main__":
    main()
