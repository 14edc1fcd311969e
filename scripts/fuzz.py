"""Spoilt checkpoints in numbers: `.venv/bin/python scripts/fuzz.py` runs 10,000 and says what was wrong with them.

Each is given to the command line in a process of its own kind: one works through many, another watches its time and
memory, ends it where it goes beyond, and starts the next. What failed is kept in a folder, as `tests/corpus/found` has
what once did; `--only SEED` does one again.
"""

from __future__ import annotations

import collections
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from random import Random

import click

sys.path.insert(0, str(Path(__file__).parent))

CORPUS = Path(__file__).parents[1] / "tests" / "corpus"
SECONDS, BYTES = 10, 2 * 2**30


def work(numbers, corpus: Path, results) -> None:
    """Cases by number, until there are no more; `results` gets (number, what is being done or came out, details)."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    from fuzzing.cases import Failed, draw, run

    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _too_long)
    for number in numbers:
        results.send((number, "begins", ""))
        with tempfile.TemporaryDirectory() as scratch:
            case = draw(corpus, Random(number))
            signal.alarm(SECONDS)
            try:
                outcome, details = f"exit {run(case, corpus, Path(scratch))}", case.name
            except (Failed, _TooLong):
                outcome, details = "failed", f"{case.name}: {case.command}\n{traceback.format_exc()}"
            finally:
                signal.alarm(0)
        results.send((number, outcome, details))
    results.send((-1, "ends", ""))


class _TooLong(BaseException):
    pass


def _too_long(*_) -> None:
    raise _TooLong


@click.command()
@click.option("--cases", default=10_000, show_default=True)
@click.option("--begin", default=0, show_default=True, help="Number of the first case.")
@click.option("--only", type=int, help="One case alone, in this process.")
@click.option("--keep", type=click.Path(path_type=Path), default="fuzz-failures", show_default=True)
def fuzz(cases: int, begin: int, only: int | None, keep: Path) -> None:
    """Run spoilt checkpoints through the command line; exits with 1 where something was wrong."""
    if only is not None:
        work([only], CORPUS, _Printer())
        return
    outcomes, failures = collections.Counter(), []
    slowest, largest, next_case, end = (0.0, -1), (0, -1), begin, begin + cases
    while next_case < end:
        receiver, sender = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(target=work, args=(range(next_case, end), CORPUS, sender))
        process.start()
        sender.close()
        started, current = None, next_case
        while True:
            if receiver.poll(0.05):
                try:
                    number, outcome, details = receiver.recv()
                except EOFError:
                    failures.append((current, f"the process ended: {process.exitcode}"))
                    break
                if outcome == "ends":
                    next_case = end
                    break
                current = number
                if outcome == "begins":
                    started = time.monotonic()
                    continue
                outcomes[f"{details.splitlines()[0].split(':')[0]}: {outcome}"] += 1
                slowest = max(slowest, (time.monotonic() - started, number))
                if outcome == "failed":
                    failures.append((number, details))
                    click.echo(f"case {number}: {details}", err=True)
                if (number - begin) % 500 == 0:
                    click.echo(f"{number - begin} cases, {len(failures)} failed", err=True)
                next_case = number + 1
            size = _resident(process.pid)
            largest = max(largest, (size, current))
            too_long = started is not None and time.monotonic() - started > SECONDS + 5
            if size > BYTES or too_long:
                process.kill()
                why = "hangs" if too_long else f"takes {size / 2**30:.1f} GiB"
                failures.append((current, why))
                click.echo(f"case {current}: {why}", err=True)
                next_case = current + 1
                break
        if next_case <= current:
            next_case = current + 1
        process.join()
    _report(outcomes, failures, slowest, largest, cases, keep)


def _report(outcomes, failures, slowest, largest, cases: int, keep: Path) -> None:
    for what, count in sorted(outcomes.items()):
        click.echo(f"{count:6} {what}")
    click.echo(f"slowest: {slowest[0]:.1f} s (case {slowest[1]}); memory: {largest[0] / 2**30:.2f} GiB at most")
    click.echo(f"{cases} cases, {len(failures)} failed")
    from fuzzing.cases import draw

    for number, details in failures:
        case = draw(CORPUS, Random(number))
        target = keep / f"{number}"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        (target / case.file).write_bytes(case.data)
        (target / "what.txt").write_text(f"{case.seed}\n{case.command}\n{details}\n")
    sys.exit(1 if failures else 0)


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


class _Printer:
    def send(self, result) -> None:
        click.echo(" ".join(map(str, result)))


if __name__ == "__main__":
    fuzz()
