"""The destination appears whole or not at all, the source stays as it is, and side files come along unchanged."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import normswap
from normswap.checkpoint.files import Checkpoint
from normswap.checkpoint.publish import Staging, check_space, copy_side_files
from normswap.errors import DestinationError


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({"w": torch.ones(2)}, folder / "model.safetensors")
    return folder


def model_at(folder: Path, content: str = "old") -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(content)
    return folder


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_appears_at_the_end_and_not_before(tmp_path, source):
    out = tmp_path / "out"
    with Staging(out, source) as folder:
        (folder / "config.json").write_text("new")
        assert not out.exists()
        assert folder.parent == out.parent and folder.name == ".out.normswap-partial"
    assert everything(out) == {"config.json": b"new"}
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]


def test_modes_are_the_users_own(tmp_path, source):
    old = os.umask(0o027)
    try:
        with Staging(tmp_path / "out", source) as folder:
            (folder / "config.json").write_text("new")
    finally:
        os.umask(old)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("parents", ["", "a/b/"])
def test_on_failure_nothing_is_left(tmp_path, source, error, parents):
    before = everything(tmp_path)
    with pytest.raises(error), Staging(tmp_path / parents / "out", source) as folder:
        (folder / "config.json").write_text("new")
        raise error
    assert everything(tmp_path) == before
    assert os.listdir(tmp_path) == ["source"]


def test_missing_parents_are_made(tmp_path, source):
    with Staging(tmp_path / "a" / "b" / "out", source) as folder:
        (folder / "config.json").write_text("new")
    assert everything(tmp_path / "a") == {"b/out/config.json": b"new"}


def test_an_existing_destination_stays(tmp_path, source):
    out = model_at(tmp_path / "out")
    with pytest.raises(DestinationError, match="exists"), Staging(out, source):
        pytest.fail("entered")
    assert everything(out) == {"config.json": b"old"}


def test_overwrite_replaces_the_whole_folder(tmp_path, source):
    out = model_at(tmp_path / "out")
    (out / "stale.bin").write_text("stale")
    with Staging(out, source, overwrite=True) as folder:
        (folder / "config.json").write_text("new")
        assert (out / "config.json").read_text() == "old"
    assert everything(out) == {"config.json": b"new"}
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]


def test_overwrite_that_fails_in_the_middle_restores(tmp_path, source, monkeypatch):
    out, rename = model_at(tmp_path / "out"), os.rename

    def broken(a, b):
        if "partial" in Path(a).name:
            raise OSError(5, "Input/output error")
        rename(a, b)

    monkeypatch.setattr(normswap.checkpoint.publish.os, "rename", broken)
    with pytest.raises(DestinationError, match="Input/output error"), Staging(out, source, overwrite=True) as folder:
        (folder / "config.json").write_text("new")
    assert everything(out) == {"config.json": b"old"}
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]


@pytest.mark.parametrize("make", ["folder", "file"])
def test_overwrite_takes_only_model_folders(tmp_path, source, make):
    out = tmp_path / "out"
    if make == "folder":
        out.mkdir()
        (out / "thesis.tex").write_text("years of work")
    else:
        out.write_text("years of work")
    with pytest.raises(DestinationError, match="expected a model folder"), Staging(out, source, overwrite=True):
        pytest.fail("entered")
    assert b"years of work" in everything(tmp_path).values()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("where", [".", "inside", "..", "link"])
def test_the_source_is_never_the_destination(tmp_path, source, where, overwrite):
    (tmp_path / "link").symlink_to(source)
    out = tmp_path / "link" if where == "link" else source / where
    before = everything(tmp_path)
    with pytest.raises(DestinationError, match="source"), Staging(out, source, overwrite=overwrite):
        pytest.fail("entered")
    assert everything(tmp_path) == before


def test_a_second_run_on_the_same_destination_is_kept_off(tmp_path, source):
    out = tmp_path / "out"
    with Staging(out, source) as folder:
        (folder / "config.json").write_text("first")
        with pytest.raises(DestinationError, match="another run"), Staging(out, source):
            pytest.fail("entered")
        with Staging(tmp_path / "other", source) as other:
            (other / "config.json").write_text("second")
    assert everything(out) == {"config.json": b"first"}


def test_what_a_killed_run_left_is_cleared(tmp_path, source):
    """SIGKILL leaves the partial folder and the lock file; neither stands in the next run's way."""
    script = f"""
        import os, signal
        from normswap.checkpoint.publish import Staging
        with Staging({str(tmp_path / "out")!r}, {str(source)!r}) as folder:
            (folder / "config.json").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    env = os.environ | {"PYTHONPATH": str(Path(normswap.__file__).parents[1])}
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=env)
    assert killed.returncode == -9
    assert len(os.listdir(tmp_path)) == 3 and not (tmp_path / "out").exists()
    with Staging(tmp_path / "out", source) as folder:
        (folder / "config.json").write_text("whole")
    assert everything(tmp_path / "out") == {"config.json": b"whole"}
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]


def test_an_old_destination_set_aside_by_a_killed_run_comes_back(tmp_path, source):
    model_at(tmp_path / ".out.normswap-old")
    with pytest.raises(DestinationError, match="exists"), Staging(tmp_path / "out", source):
        pytest.fail("entered")
    assert everything(tmp_path / "out") == {"config.json": b"old"}
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]


def test_other_folders_leftovers_are_left(tmp_path, source):
    model_at(tmp_path / ".outer.normswap-partial-01234567")
    with Staging(tmp_path / "out", source) as folder:
        (folder / "config.json").write_text("new")
    assert (tmp_path / ".outer.normswap-partial-01234567").is_dir()


def test_a_destination_that_came_up_meanwhile_is_not_replaced(tmp_path, source):
    out = tmp_path / "out"
    with pytest.raises(DestinationError, match="cannot be published"), Staging(out, source) as folder:
        (folder / "config.json").write_text("new")
        model_at(out, "someone else's")
    assert everything(out) == {"config.json": b"someone else's"}
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]


def test_a_parent_that_is_no_folder_is_named(tmp_path, source):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DestinationError, match="file.*Not a directory|file.*File exists"):
        Staging(tmp_path / "file" / "out", source).__enter__()


def test_space_is_checked_against_the_disk(tmp_path):
    check_space(tmp_path, 1)
    with pytest.raises(DestinationError, match=r"needs 1073741824\.00 GiB .*are free"):
        check_space(tmp_path, 2**60)


def test_side_files_come_along(tmp_path, source):
    files = {
        "tokenizer.json": b"\x00\xff tokens",
        "generation_config.json": b"{}",
        "LICENSE": b"text",
        ".gitattributes": b"lfs",
        "modeling_x.py": b"code",
        "1_Pooling/config.json": b"{1}",
        "deep/er/vocab.txt": b"v",
    }
    stays = {
        "README.md": b"card",
        ".cache/huggingface/x": b"hidden",
        "sub/.git/y": b"hidden",
    }
    weights = {
        "pytorch_model.bin": b"w",
        "pytorch_model.bin.index.json": b"w",
        "model.fp16.safetensors": b"w",
        "onnx/model.onnx": b"w",
        "tf_model.h5": b"w",
        "flax_model.msgpack": b"w",
        "m.gguf": b"w",
        "original/consolidated.00.pth": b"w",
        "2_Dense/model.safetensors": b"w",
        "adapter_config.json": b"{}",  # or transformers would load the base that it names
    }
    for name, content in (files | stays | weights).items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(content)
    (source / "gone.txt").symlink_to("nowhere")
    before, out = everything(source), tmp_path / "out"
    out.mkdir()
    with Checkpoint.open(source) as checkpoint:
        skipped = copy_side_files(checkpoint, out)
    assert everything(out) == files
    assert sorted(skipped) == sorted([*weights, "gone.txt"])
    assert everything(source) == before


def test_linked_side_files_become_files(tmp_path, source):
    (source / "blob").write_bytes(b"tokens")
    os.chmod(source / "blob", 0o444)
    (source / "tokenizer.json").symlink_to("blob")
    out = tmp_path / "out"
    out.mkdir()
    with Checkpoint.open(source) as checkpoint:
        assert copy_side_files(checkpoint, out) == []
    copied = out / "tokenizer.json"
    assert not copied.is_symlink() and copied.read_bytes() == b"tokens"
    # the source's read-only bit is about the source
    assert copied.stat().st_mode & 0o200
