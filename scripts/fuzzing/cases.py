"""One case: a seed with one file spoilt, given to a command, and what has to be true of that."""

from __future__ import annotations

import shutil
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from random import Random

from click.testing import CliRunner

from fuzzing.mutate import SPOILERS
from normswap.cli import main

#: seed, the file of it that is spoilt, how often, and the command: {} is the folder, {out} where nothing may come up
CASES = [
    ("whole", "model.safetensors", 5, "inspect {}"),
    ("whole", "model.safetensors", 2, "convert {} {out} --norm rmsnorm --verify none"),
    ("whole", "config.json", 4, "inspect {}"),
    ("whole", "config.json", 1, "convert {} {out} --norm rmsnorm --verify none"),
    ("sharded", "model.safetensors.index.json", 4, "inspect {}"),
    ("sharded", "model.safetensors.index.json", 2, "convert {} {out} --norm rmsnorm --verify none"),
    ("sharded", "model-00001-of-00002.safetensors", 1, "inspect {}"),
    ("pickled", "pytorch_model.bin", 5, "inspect {}"),
    ("pickled", "pytorch_model.bin", 2, "convert {} {out} --norm rmsnorm --verify none"),
    ("legacy", "pytorch_model.bin", 4, "inspect {}"),
    ("converted", "normswap.json", 3, "inspect {}"),
    ("converted", "normswap.json", 1, "convert {} {out} --undo --verify none"),
    ("converted", "normswap.undo", 1, "convert {} {out} --undo --verify none"),
    ("moved", "normswap.json", 3, "inspect {}"),
    ("whole", "config.json", 1, "verify {} {whole} --tokens 16"),
    ("pickled", "pytorch_model.bin", 1, "verify {} {whole} --tokens 16"),
    ("converted", "normswap.json", 1, "verify {} {whole} --tokens 16"),
    ("moved", "normswap.json", 1, "verify {} {whole} --tokens 16"),
    ("plans", "kind.json", 3, "convert {whole} {out} --plan {}/kind.json --verify none"),
    ("plans", "place.json", 3, "convert {whole} {out} --plan {}/place.json --verify none"),
]


class Failed(Exception):
    """Something was not as it has to be; the message says what."""


@dataclass(frozen=True)
class Case:
    """A spoilt seed. `data` is what its file holds."""

    seed: str
    file: str
    command: str
    data: bytes

    @property
    def name(self) -> str:
        return f"{self.seed}/{self.file}"


def draw(corpus: Path, random: Random) -> Case:
    """A case at random."""
    seed, file, _, command = random.choices(CASES, [case[2] for case in CASES])[0]
    spoil = SPOILERS[Path(file).suffix]
    return Case(seed, file, command, spoil((corpus / seed / file).read_bytes(), random))


def run(case: Case, corpus: Path, scratch: Path) -> int:
    """Do a case in this process. Gives the exit code.

    Args:
        corpus: the seeds.
        scratch: an empty folder.

    Raises:
        Failed: a traceback, an exit code other than 0 and 2, a refusal that is none, a result where none may be, a
            changed source.
    """
    folder, out = scratch / "model", scratch / "out"
    shutil.copytree(corpus / case.seed, folder)
    (folder / case.file).write_bytes(case.data)
    before = _contents(folder)
    words = [word.format(folder, out=out, whole=corpus / "whole") for word in case.command.split()]
    done = CliRunner().invoke(main, words)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise Failed("a traceback") from done.exception
    if done.exit_code not in (0, 2):
        raise Failed(f"exit code {done.exit_code}: {done.stderr[:2000]}")
    if done.exit_code == 2:
        if done.stdout or not done.stderr.startswith(("Error: ", "Refused: ")):
            raise Failed(f"a refusal that is none: {done.stdout[:500]!r} {done.stderr[:2000]!r}")
        if sorted(path.name for path in scratch.iterdir()) != ["model"]:
            raise Failed(f"left behind: {sorted(path.name for path in scratch.iterdir())}")
    if any(unicodedata.category(c)[0] == "C" and c != "\n" for c in done.output):
        raise Failed(f"what is printed moves the cursor: {done.output[:2000]!r}")
    if len(done.stderr) > 20_000:
        raise Failed(f"a message of {len(done.stderr)} characters: {done.stderr[:500]}")
    if _contents(folder) != before:
        raise Failed("the source was changed")
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(folder)
    return done.exit_code


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
