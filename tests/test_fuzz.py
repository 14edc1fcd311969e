"""Spoilt checkpoints through the command line: some of what `scripts/fuzz.py` runs, and all that once failed.

What has to be true of each stands in `scripts/fuzzing/cases.py`: one clear error or a result, no traceback, the source
as it was.
"""

import json
import tempfile
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzzing.cases import CASES, Case, Failed, draw, run
from fuzzing.corpus import CORPUS

FOUND = json.loads((CORPUS / "found" / "index.json").read_text())


def done(case: Case) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        return run(case, CORPUS, Path(scratch))


@pytest.mark.parametrize("name", FOUND)
def test_what_once_failed(name):
    found = FOUND[name]
    data = (CORPUS / "found" / name).read_bytes()
    assert done(Case(found["seed"], found["file"], found["command"], data)) in (0, 2)


def test_the_seeds_are_good_before_they_are_spoilt():
    kinds = {(seed, file): command for seed, file, _, command in reversed(CASES)}  # the first of each is the shortest
    for (seed, file), command in kinds.items():
        assert done(Case(seed, file, command, (CORPUS / seed / file).read_bytes())) == 0, (seed, file)


def test_spoilt_checkpoints_are_refused_or_work():
    outcomes: list[int] = []

    @settings(max_examples=120, derandomize=True, deadline=None, database=None)
    @given(st.randoms(use_true_random=False))
    def check(random: Random) -> None:
        outcomes.append(done(draw(CORPUS, random)))

    check()
    # not everything is refused at the door: some of what is spoilt is still a model
    assert outcomes.count(0) > 10 and outcomes.count(2) > 40, (outcomes.count(0), outcomes.count(2))


def test_a_traceback_is_a_failure(tmp_path, monkeypatch):
    import normswap

    monkeypatch.setattr(normswap, "inspect", lambda *args, **options: 1 / 0)
    with pytest.raises(Failed, match="a traceback"):
        run(Case("whole", "config.json", "inspect {}", b"{}"), CORPUS, tmp_path)
