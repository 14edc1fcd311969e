"""The main job, start to end: LayerNorm to RMSNorm on a small trained GPT-2, measured, then generating side by side."""

from __future__ import annotations

import os
import tempfile
from contextlib import nullcontext
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything this needs lies beside it

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed
from transformers.utils import logging

import normswap
from normswap.errors import NormswapError
from normswap.report.proof import proof_view

SOURCE = Path(__file__).parent.parent / "tests" / "checkpoints" / "gpt2-shakespeare"
PROMPT = "ROMEO:\n"
SEED = 1


@click.command()
@click.option("--out", type=click.Path(path_type=Path), help="Keep the converted checkpoint in this new folder.")
@click.option("--tokens", default=80, show_default=True, help="How many tokens to generate.")
def main(out: Path | None, tokens: int) -> None:
    """Convert a trained GPT-2 from LayerNorm to RMSNorm and show that it is the same model."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = Console()
    with tempfile.TemporaryDirectory() if out is None else nullcontext(out.parent) as parent:
        destination = out or Path(parent) / "gpt2-shakespeare-rmsnorm"
        try:
            with Progress(console=console, transient=True) as progress:
                progress.add_task("converting and measuring", total=None)
                result = normswap.convert(SOURCE, destination, norm="rmsnorm")
        except NormswapError as error:
            raise click.ClickException(str(error)) from error
        console.print(proof_view(result.report))
        # stock transformers, running the modelling file that convert wrote a moment ago
        original = AutoModelForCausalLM.from_pretrained(SOURCE).eval()
        converted = AutoModelForCausalLM.from_pretrained(result.folder, trust_remote_code=True).eval()
        tokenizer = AutoTokenizer.from_pretrained(SOURCE)
        for sample in (False, True):
            a, b = (generate(model, tokenizer, tokens, sample) for model in (original, converted))
            console.print(side_by_side(f"sampled, seed {SEED}" if sample else "greedy", a, b))
    if out is not None:
        console.print(f"The converted checkpoint is in {out}")


def generate(model: PreTrainedModel, tokenizer, tokens: int, sample: bool) -> str:
    """Text that `model` continues PROMPT with, prompt included."""
    set_seed(SEED)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=sample, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(ids[0])


def side_by_side(how: str, a: str, b: str) -> Table:
    """Two texts in two columns; from their first difference on, the second is red."""
    same = len(os.path.commonprefix([a, b]))
    verdict = "the same text" if a == b else f"they part after {same} characters"
    table = Table(title=f"{how}: {verdict}", title_justify="left", expand=True)
    table.add_column("original", ratio=1)
    table.add_column("converted", ratio=1)
    table.add_row(Text(a), Text.assemble(b[:same], (b[same:], "bold red")))
    return table


if __name__ == "__main__":
    main()
