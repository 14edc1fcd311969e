"""The readers of files, fuzzed where coverage leads: `pip install atheris`, then

    .venv/bin/python scripts/fuzz_atheris.py header -max_total_time=60

`header`, `archive`, `legacy`, `pickle`, `index`, `plan` or `document`; what follows is for libFuzzer. It begins with
the seeds of `tests/corpus`, and ends with the input that raised what it should not, took 10 seconds, or 2 GiB.
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parent))

with atheris.instrument_imports(include=["normswap.checkpoint", "json", "zipfile", "pickletools"]):
    import pickletools  # noqa: F401
    import zipfile

    from normswap.checkpoint import documents, header, pickled, statedict, stored, weights

from normswap.errors import PlanError, SourceError
from normswap.planning.plans import Plan

CORPUS = Path(__file__).parents[1] / "tests" / "corpus"
_NAME = Path("model.safetensors")


def _plan(data: bytes) -> None:
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        file.write(data)
        file.flush()
        Plan.load(file.name)


def _index(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, weights.CONFIG).write_text("{}")
        Path(folder, weights.INDEX).write_bytes(data)
        weights.find_weights(Path(folder))


def _program(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))


#: what reads it, what that may raise, and seeds
READERS = {
    "header": (
        lambda data: header.read_header(io.BytesIO(data), _NAME),
        SourceError,
        lambda: [path.read_bytes() for path in CORPUS.rglob("*.safetensors")],
    ),
    "archive": (
        lambda data: pickled.read_pickled(io.BytesIO(data), _NAME, _NAME.name),
        SourceError,
        lambda: [(CORPUS / "pickled" / "pytorch_model.bin").read_bytes()],
    ),
    "legacy": (
        lambda data: pickled.read_pickled(io.BytesIO(data), _NAME, _NAME.name),
        SourceError,
        lambda: [(CORPUS / "legacy" / "pytorch_model.bin").read_bytes()],
    ),
    "pickle": (
        lambda data: statedict.tensors_in(io.BytesIO(data)),
        stored.NoStateDict,
        lambda: [_program(CORPUS / "pickled" / "pytorch_model.bin")],
    ),
    "index": (_index, SourceError, lambda: [path.read_bytes() for path in CORPUS.rglob("*.index.json")]),
    "plan": (_plan, PlanError, lambda: [path.read_bytes() for path in (CORPUS / "plans").iterdir()]),
    "document": (documents.load_json, ValueError, lambda: [path.read_bytes() for path in CORPUS.rglob("*.json")]),
}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in READERS:
        sys.exit(f"expected one of {', '.join(READERS)}, and options of libFuzzer")
    read, refusal, seeds = READERS[sys.argv.pop(1)]

    def test(data: bytes) -> None:
        try:
            read(data)
        except refusal:
            pass

    with tempfile.TemporaryDirectory() as folder:
        for number, seed in enumerate(seeds()):
            Path(folder, str(number)).write_bytes(seed)
        atheris.Setup([sys.argv[0], "-timeout=10", "-rss_limit_mb=2048", *sys.argv[1:], folder], test)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
