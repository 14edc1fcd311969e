"""Conversions that end before their end: what is left, and what the same command makes of it."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import normswap
from models import tiny
from normswap.apply import shard
from normswap.apply.crew import Crew
from normswap.checkpoint.files import Checkpoint
from normswap.checkpoint.journal import Journal
from normswap.cli import main
from normswap.conversion import WRITING
from normswap.errors import DestinationError, SourceError

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def source(tmp_path):
    tiny("gpt2", n_layer=3).save_pretrained(tmp_path / "source", max_shard_size="20KB")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 5
    return tmp_path / "source"


@pytest.fixture
def written(monkeypatch):
    """Names of the weight files that are written."""
    names, begin = [], shard.ShardFile.open
    monkeypatch.setattr(shard.ShardFile, "open", lambda self: names.append(self._path.name) or begin(self))
    return names


def convert(source, out, **options):
    return normswap.convert(source, out, **({"norm": "rmsnorm", "verify": "none", "workers": 2} | options))


def interrupted(source, out, share=0.6, error=KeyboardInterrupt, **options):
    """A conversion that is stopped when that share of its bytes is written; the exception."""

    def stop(what, done, total):
        if what == WRITING and done > share * total:
            raise error("stopped")

    with pytest.raises(error) as stopped:
        convert(source, out, progress=stop, **options)
    return stopped.value


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_same_command_goes_on_from_finished_files_and_gives_the_same_bytes(tmp_path, source, written):
    convert(source, tmp_path / "undisturbed" / "out")
    everything = set(written)
    written.clear()
    error = interrupted(source, tmp_path / "runs" / "out")
    assert os.listdir(tmp_path / "runs") == [".out.normswap-partial"]
    assert "the same command goes on from there" in error.__notes__[0]
    journal = tmp_path / "runs" / ".out.normswap-partial" / ".resume" / "journal.jsonl"
    finished = {line["file"] for line in map(json.loads, journal.read_text().splitlines()) if "file" in line}
    assert 1 < len(finished) < len(everything)
    with open(journal, "a") as file:
        file.write('{"file": "model-0')  # torn, as by a loss of power
    written.clear()
    interrupted(source, tmp_path / "runs" / "out", share=0.9)  # what it finishes counts behind the torn line, too
    assert written and not set(written) & finished
    finished = set(Journal.resume(journal.parents[1], json.loads(journal.read_text().splitlines()[0])["of"]).finished)
    written.clear()
    convert(source, tmp_path / "runs" / "out")
    assert set(written) == everything - finished and len(finished) > len(everything) / 2
    assert contents(tmp_path / "runs" / "out") == contents(tmp_path / "undisturbed" / "out")
    assert os.listdir(tmp_path / "runs") == ["out"]
    assert normswap.undo(tmp_path / "runs" / "out", tmp_path / "back", verify="none").folder.is_dir()


@pytest.mark.parametrize("other", ["request", "dtype", "source", "damaged"])
def test_what_another_run_left_is_not_taken_up(tmp_path, source, written, other):
    out = tmp_path / "runs" / "out"
    interrupted(source, out)
    options = {"request": dict(fold=True, partial=True), "dtype": dict(dtype="bfloat16")}.get(other, {})
    partial = out.with_name(".out.normswap-partial")
    if other == "source":
        path = min(source.glob("*.safetensors"))
        os.utime(path, ns=(1, 1))
    if other == "damaged":
        (partial / ".resume" / "journal.jsonl").write_text("no journal")
    written.clear()
    convert(source, out, **options)
    assert set(written) == {path.name for path in source.glob("*.safetensors")}
    assert os.listdir(out.parent) == ["out"]


def test_permissions_are_the_users_own(tmp_path, source):
    old = os.umask(0o027)
    try:
        out = convert(source, tmp_path / "out").folder
    finally:
        os.umask(old)
    modes = {path.name: path.stat().st_mode & 0o777 for path in out.iterdir()}
    assert "normswap.undo" in modes and set(modes.values()) == {0o640}


def test_a_refusal_leaves_nothing(tmp_path, source):
    interrupted(source, tmp_path / "runs" / "out", error=SourceError)
    assert not (tmp_path / "runs").exists()


def test_a_source_that_changes_meanwhile_is_noticed(tmp_path, source):
    def touch(what, done, total):
        os.utime(min(source.glob("*.safetensors")), ns=(1, done))

    with pytest.raises(SourceError, match="changed while they were read"):
        convert(source, tmp_path / "runs" / "out", progress=touch)
    assert not (tmp_path / "runs").exists()


def test_a_full_disk_is_told_and_hurts_nothing(tmp_path, source, written):
    """A limit of the file size is what stands for a full disk where no file system can be mounted."""
    out, before = tmp_path / "runs" / "out", contents(source)
    large = tmp_path / "large"
    tiny("gpt2", n_embd=96).save_pretrained(large, max_shard_size="1MB")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(DestinationError, match=r"model\.safetensors: cannot be written: File too large"):
            convert(large, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert not out.exists() and contents(source) == before
    assert convert(large, out).folder.is_dir()


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="needs to mount a file system")
def test_a_disk_that_fills_up_midway_is_told_and_gone_on_from(tmp_path, source, written):
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(path.stat().st_size for path in source.iterdir())
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={2 * size}", "tmpfs", disk], stderr=-3).returncode:
        pytest.skip("may not mount a file system")
    try:
        ballast, before = disk / "ballast", contents(source)

        def fill(what, done, total):
            if what == WRITING and done > total / 2 and not ballast.exists():
                ballast.write_bytes(b"")
                with open(ballast, "wb", buffering=0) as file, pytest.raises(OSError):
                    while True:
                        file.write(bytes(4096))

        with pytest.raises(DestinationError, match="cannot be written: No space left") as full:
            convert(source, disk / "out", progress=fill)
        assert "the same command goes on" in full.value.__notes__[0]
        assert not (disk / "out").exists() and contents(source) == before
        ballast.unlink()
        everything = len(written)
        convert(source, disk / "out")
        assert 0 < len(written) - everything < len(list(source.glob("*.safetensors")))
        with pytest.raises(DestinationError, match="are free"):  # before the first byte
            ballast.write_bytes(bytes(size // 2))
            convert(source, disk / "other")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_ctrl_c_says_how_to_go_on_and_v_names_each_tensor(tmp_path, source, monkeypatch):
    command = ["convert", str(source), str(tmp_path / "out"), "--norm", "rmsnorm", "--verify", "none"]

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(normswap.conversion, "prove", interrupt)
        stopped = CliRunner().invoke(main, command)
    assert stopped.exit_code == 130 and not (tmp_path / "out").exists()
    assert "Interrupted.\n" in stopped.stderr and "the same command goes on from there" in stopped.stderr
    again = CliRunner().invoke(main, [*command, "-v"])
    assert again.exit_code == 0, again.stderr
    lines = again.stdout.splitlines()
    for key, info in Checkpoint.open(source).tensors.items():
        assert any(key in line and "x".join(map(str, info.shape)) in line and info.shard in line for line in lines), key
    assert sum(line.split()[:1] == ["edited"] for line in lines) > 5


@pytest.mark.long
def test_kills_at_random_moments():
    command = [sys.executable, SCRIPTS / "check_crash.py", "--kills", "12"]
    said = subprocess.run(command, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr[-2000:]
    assert "12 kills" in said.stdout and "every result is the same" in said.stdout


def test_tasks_share_a_bounded_memory():
    lock, taken, most, done = threading.Lock(), [0], [0], []

    def task(cost):
        with lock:
            taken[0] += cost
            most[0] = max(most[0], taken[0])
        torch.ones(1000).sum()
        with lock:
            taken[0] -= cost
            done.append(cost)

    with Crew(4, memory=100) as crew:
        for cost in [30, 60, 20, 100, 90, 5, 5, 5, 150, 10] * 20:
            crew.give(cost, task, cost)
    assert len(done) == 200 and most[0] == 150  # alone, as it takes more than there is


def test_the_first_task_that_fails_ends_the_rest():
    ran = []

    def fail():
        raise ValueError("this one")

    with pytest.raises(ValueError, match="this one"), Crew(2, memory=100) as crew:
        crew.give(1, fail)
        for number in range(1000):
            crew.give(1, ran.append, number)
    assert len(ran) < 1000
