"""`normswap convert` beside `cp`, and beside loading, editing and saving: time and memory, as checkpoints grow.

    .venv/bin/python scripts/bench_convert.py --sizes 2,4,8,16

Makes synthetic GPT-NeoX checkpoints in bfloat16, in shards of 1 GB (the width stays, the number of layers grows), in a
folder of its own that is removed afterwards. Each contender runs in a process of its own, on the same files:

- `cp`, and the files of the copy synced, as the conversion syncs its own;
- `normswap convert --norm rmsnorm` and `--fold`, unverified; and the first with `--verify fast`;
- transformers: load in bfloat16, centre the writers, `save_pretrained` in the same shards.

They take turns, another one going first in each round, and the table has medians: what a disk has just been through
counts more than what it is asked for (the first to read what was just written may be twice as fast). Before each run
the source leaves the page cache, as a checkpoint that was not just fetched; `--warm` reads it in instead. Peak memory
is the largest resident set of the process. The table goes to scripts/results/convert.md.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import click
import torch
import transformers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from normswap.checkpoint.header import nbytes_of, render_header

RESULTS = Path(__file__).parent / "results" / "convert.md"
WIDTH, VOCABULARY = 2048, 50304
SHARD = 10**9
# Seconds before each run: what the one before has written and removed is still discarded on the disk.
PAUSE = 5
LARGEST = VOCABULARY * WIDTH * 2  # the embedding, the largest tensor that an edit needs


@click.command()
@click.option("--sizes", default="2,4,8,16", show_default=True, help="In GB, one checkpoint each.")
@click.option("--rounds", default=3, show_default=True, help="Runs of each contender.")
@click.option("--workers", type=int, help="Of normswap; default: its own.")
@click.option("--warm", is_flag=True, help="With the source in the page cache.")
@click.option(
    "--folder", type=click.Path(path_type=Path), help="Where to put the checkpoints; default: a temporary one."
)
@click.option("--verified", default=4.0, show_default=True, help="Largest size, in GB, that is verified as well.")
@click.option("--only", multiple=True, help="Contenders to run.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(
    sizes: str,
    rounds: int,
    workers: int | None,
    warm: bool,
    folder: Path | None,
    verified: float,
    only: tuple[str, ...],
    output: Path,
) -> None:
    rows = []
    with tempfile.TemporaryDirectory(dir=folder) as work:
        for size in (float(text) for text in sizes.split(",")):
            source, out = Path(work) / f"source-{size:g}", Path(work) / "out"
            total = make(source, round(size * 1e9))
            entered = {
                name: command
                for name, command in contenders(source, out, workers).items()
                if (not only or name in only) and not ("verified" in name and size > verified)
            }
            runs = {name: [] for name in entered}
            for turn in range(rounds):
                order = [*entered][turn % len(entered) :] + [*entered][: turn % len(entered)]
                for name in order:
                    os.sync()
                    time.sleep(PAUSE)
                    read_in(source) if warm else drop(source)
                    runs[name].append(timed(entered[name]))
                    shutil.rmtree(out, ignore_errors=True)
                    print(f"{total / 1e9:5.1f} GB  {name:24} {runs[name][-1].seconds:7.1f} s", flush=True)
            rows += [Row(total, name, tuple(of)) for name, of in runs.items()]
            shutil.rmtree(source)
    text = report(rows, rounds, warm)
    output.write_text(text, encoding="utf-8")
    print(text)


def make(folder: Path, size: int) -> int:
    """A checkpoint of about `size` bytes, of random values; its bytes."""
    config = GPTNeoXConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_attention_heads=16,
        vocab_size=VOCABULARY,
        dtype="bfloat16",
        tie_word_embeddings=False,
    )
    layer = 2 * (12 * WIDTH**2 + 13 * WIDTH)
    config.num_hidden_layers = max(1, round((size - 2 * LARGEST) / layer))
    with torch.device("meta"):
        model = GPTNeoXForCausalLM(config)
    config.architectures = ["GPTNeoXForCausalLM"]
    config.save_pretrained(folder)
    shards, filled = [[]], 0
    for name, tensor in model.state_dict().items():
        count = nbytes_of(torch.bfloat16, tensor.shape)
        if filled and filled + count > SHARD:
            shards.append([])
            filled = 0
        shards[-1].append((name, torch.bfloat16, tuple(tensor.shape)))
        filled += count
    # any values do, as long as they are not all alike; a norm's gains are about one
    noise = (torch.randn(2**24, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    where, total = {}, 0
    for number, entries in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        with open(folder / name, "wb") as file:
            file.write(render_header(entries, {"format": "pt"}))
            for key, _, shape in entries:
                left = torch.Size(shape).numel()
                where[key], total = name, total + 2 * left
                while left:
                    part = noise[: min(left, len(noise))] + (1 if "norm.weight" in key else 0)
                    file.write(part.view(torch.uint8).numpy())
                    left -= len(part)
            os.fsync(file.fileno())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return total


def contenders(source: Path, out: Path, workers: int | None) -> dict[str, list[str]]:
    """The command of each."""
    convert = [sys.executable, "-m", "normswap", "convert", str(source), str(out), "--json"]
    convert += ["--workers", str(workers)] if workers else []
    return {
        "cp": ["sh", "-c", f"cp -r '{source}' '{out}' && sync '{out}'/* '{out}'"],
        "convert": [*convert, "--norm", "rmsnorm", "--verify", "none"],
        "convert --fold": [*convert, "--fold", "--verify", "none"],
        "convert, verified": [*convert, "--norm", "rmsnorm", "--verify", "fast"],
        "transformers": [sys.executable, __file__, "--", "load-edit-save", str(source), str(out)],
    }


class Run(NamedTuple):
    """Seconds of a command, of that the seconds that it says it was writing, and its peak resident bytes."""

    seconds: float
    writing: float | None
    peak: int


class Row(NamedTuple):
    """All runs of one contender on one checkpoint of `size` bytes."""

    size: int
    name: str
    runs: tuple[Run, ...]

    @property
    def seconds(self) -> float:
        return median(run.seconds for run in self.runs)

    @property
    def writing(self) -> float | None:
        return None if self.runs[0].writing is None else median(run.writing for run in self.runs)


def timed(command: list[str]) -> Run:
    with tempfile.TemporaryFile("w+") as stdout:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE)
        errors = process.stderr.read()
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        if status:
            raise click.ClickException(f"{command} failed: {errors.decode()[-2000:]}")
        stdout.seek(0)
        said = stdout.read()
    writing = json.loads(said)["seconds"]["writing"] if said.startswith("{") else None
    return Run(seconds, writing, used.ru_maxrss * 1024)


def load_edit_save(source: str, out: str) -> None:
    """What one would write by hand: the model in memory, its writers centred, saved in the same shards."""
    model = GPTNeoXForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    with torch.no_grad():
        embedding = model.gpt_neox.embed_in.weight
        embedding.copy_(embedding - embedding.float().mean(-1, keepdim=True))
        for layer in model.gpt_neox.layers:
            for writer in (layer.attention.dense, layer.mlp.dense_4h_to_h):
                writer.weight.copy_(writer.weight - writer.weight.float().mean(0))
                writer.bias.copy_(writer.bias - writer.bias.float().mean())
    model.save_pretrained(out, max_shard_size=SHARD)
    for path in Path(out).iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def drop(folder: Path) -> None:
    """Have a folder's files leave the page cache."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_in(folder: Path) -> None:
    for path in folder.iterdir():
        with open(path, "rb") as file:
            while file.read(2**24):
                pass


def report(rows: list[Row], rounds: int, warm: bool) -> str:
    lines = [
        "# Converting beside copying",
        "",
        f"`scripts/bench_convert.py`; {platform.processor() or platform.machine()}, {os.cpu_count()} processors, "
        f"torch {torch.__version__}, transformers {transformers.__version__}; source "
        f"{'in the page cache' if warm else 'not in the page cache'}. GPT-NeoX, width {WIDTH}, bfloat16, shards of "
        f"1 GB; the largest tensor that an edit needs has {LARGEST / 2**20:.0f} MiB. Medians of "
        f"{rounds} runs, in turns.",
        "",
        "Seconds are those of the whole command, start included, with the fastest and slowest run; `of cp` is cp's "
        "(synced) by them. `writing` counts the stage alone that reads, edits, writes, hashes and syncs the weights.",
        "",
        "| GB | | seconds | fastest, slowest | of cp | of transformers | writing, s | writing, of cp | peak, MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        took = {other.name: other.seconds for other in rows if other.size == row.size}
        spread = [run.seconds for run in row.runs]
        cells = [
            f"{row.size / 1e9:.1f}",
            row.name,
            f"{row.seconds:.1f}",
            f"{min(spread):.1f}, {max(spread):.1f}",
            f"{took['cp'] / row.seconds:.2f}" if "cp" in took else "",
            f"{took['transformers'] / row.seconds:.1f}" if "transformers" in took else "",
            f"{row.writing:.1f}" if row.writing else "",
            f"{took['cp'] / row.writing:.2f}" if row.writing and "cp" in took else "",
            f"{max(run.peak for run in row.runs) / 2**20:.0f}" if row.name != "cp" else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    if sys.argv[1:3] == ["--", "load-edit-save"]:
        load_edit_save(*sys.argv[3:])
    else:
        main()
