"""Conversions killed at random moments: no half destination is ever seen, and every resume gives the same bytes.

    .venv/bin/python scripts/check_crash.py --kills 200

A small GPT-2 in many shards is converted once undisturbed. Then, again and again, a conversion of it is killed
(SIGKILL) after a random part of the time that one takes, every second time while it writes, and the same command is run
to its end. Right after each kill the
destination must not be there, or be whole; in the end it must be what the undisturbed run made, byte for byte. Prints
what the kills met, and how many files the resumed runs did not write again. Exits with 1 where anything differs.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import click
import torch
from transformers.utils.logging import disable_progress_bar

import normswap
from models import tiny
from normswap.checkpoint.journal import FOLDER


@click.command()
@click.option("--kills", default=200, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    disable_progress_bar()
    chance, met, kept = random.Random(seed), Counter(), 0
    with tempfile.TemporaryDirectory() as work:
        source, out = Path(work) / "source", Path(work) / "runs" / "out"
        tiny("gpt2", n_embd=64, n_layer=8, n_head=4).save_pretrained(source, max_shard_size="150KB")
        before = contents(source)
        took = [timed(source, out) for _ in range(3)][-1]
        wanted = contents(out)
        while (number := met.total()) < kills:
            shutil.rmtree(out.parent)
            moment = chance.uniform(*(took.writing if number % 2 else took.whole))
            if not killed(lambda: convert(source, out), moment):
                continue  # it had ended by itself
            finished, stage = stage_of(out)
            met[stage] += 1
            kept += len(finished)
            if out.exists():
                check(contents(out) == wanted, number, stage, "the destination is there and is not whole")
            else:
                again = finished & set(json.loads(run(lambda: convert(source, out)))["written"])
                check(not again, number, stage, f"finished files were written again: {sorted(again)}")
            check(contents(out) == wanted, number, stage, "the result differs from an undisturbed run's")
            left = sorted(path.name for path in out.parent.iterdir() if path != out and not path.name.endswith("-lock"))
            check(not left, number, stage, f"beside the destination is left {left}")
        check(contents(source) == before, kills, "the end", "the source has changed")
    print(f"{kills} kills: {', '.join(f'{count} {stage}' for stage, count in met.most_common())}")
    print(f"{kept} finished files were taken up and not written again; every result is the same")


class Took(NamedTuple):
    """Seconds from the start in which a run can be killed: all of it, and while it writes."""

    whole: tuple[float, float]
    writing: tuple[float, float]


def convert(source: Path, out: Path) -> str:
    """Convert; which files were written, and the seconds of each stage, as JSON."""
    from normswap.apply import shard

    written, begin = [], shard.ShardFile.open
    shard.ShardFile.open = lambda self: written.append(self._path.name) or begin(self)
    done = normswap.convert(source, out, norm="rmsnorm", verify="fast")
    return json.dumps({"written": written, "seconds": done.seconds})


def timed(source: Path, out: Path) -> Took:
    """An undisturbed run."""
    shutil.rmtree(out.parent, ignore_errors=True)
    start = time.perf_counter()
    stages = json.loads(run(lambda: convert(source, out)))["seconds"]
    took = time.perf_counter() - start
    return Took((0, 1.1 * took), (stages["planning"], stages["planning"] + stages["writing"]))


def run(task: Callable[[], str]) -> str:
    """What `task` returns in a fork of this process, which ends well."""
    receive, send = os.pipe()
    child = forked(task, send)
    os.close(send)
    with os.fdopen(receive) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    if status:
        sys.exit("a run that nothing killed has failed")
    return said


def killed(task: Callable[[], str], after: float) -> bool:
    """Run `task` in a fork of this process, and kill it so many seconds later; whether it was still running."""
    child = forked(task, os.open(os.devnull, os.O_WRONLY))
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def forked(task: Callable[[], str], send: int) -> int:
    child = os.fork()
    if not child:
        code = 1
        try:
            os.write(send, task().encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def stage_of(out: Path) -> tuple[set[str], str]:
    """Which files a killed run has finished, and how far it was."""
    if out.exists():
        return set(), "published, and still running"
    lines = out.with_name(f".{out.name}.normswap-partial") / FOLDER / "journal.jsonl"
    if not lines.exists():
        return set(), "before the first file"
    said = [json.loads(line) for line in lines.read_text().splitlines() if line.endswith("}")]
    finished = {line["file"] for line in said if "file" in line}
    here = {path.name for path in lines.parents[1].glob("*.safetensors")}
    return finished, "between files" if here == finished else "within a file" if here > finished else "elsewhere"


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of each file."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def check(holds: bool, number: int, stage: str, otherwise: str) -> None:
    if not holds:
        sys.exit(f"kill {number} ({stage}): {otherwise}")


if __name__ == "__main__":
    main()
