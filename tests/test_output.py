"""Files of the result: written past the page cache, shared with the source, hashed as they grow."""

import errno
import hashlib
import os
import random
import re
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

import normswap
from normswap.apply import output as output_file
from normswap.apply.output import Output
from normswap.apply.values import Values
from normswap.checkpoint.blocks import mostly_cached
from normswap.checkpoint.direct import AT_ONCE, BLOCK, Buffers, DirectFile
from normswap.checkpoint.files import Checkpoint
from normswap.errors import DestinationError

MIB = 2**20


def cuts(size: int, seed: int) -> list[range]:
    """Spans that fill a file of that size: some of a few bytes, some of whole blocks, one longer than a buffer."""
    chosen = random.Random(seed)
    places = {chosen.randrange(size) for _ in range(12)} | {BLOCK * chosen.randrange(size // BLOCK) for _ in range(12)}
    places = sorted({0, 1, size, *(at for at in places if not MIB < at < MIB + 2 * AT_ONCE)})
    spans = [range(a, b) for a, b in zip(places, places[1:], strict=False)]
    chosen.shuffle(spans)
    return spans


@pytest.fixture
def no_direct(monkeypatch):
    """A file system that takes `O_DIRECT` and then refuses each write."""
    write, refused = os.pwrite, []

    def pwrite(fd, data, offset):
        if fd in refused:
            raise OSError(errno.EINVAL, "Invalid argument")
        return write(fd, data, offset)

    opened = os.open

    def opening(path, flags, *rest):
        fd = opened(path, flags & ~os.O_DIRECT, *rest)
        if flags & os.O_DIRECT:
            refused.append(fd)
        return fd

    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(os, "pwrite", pwrite)
    return refused


def check_written(path: Path, size: int, seed: int) -> None:
    """Several threads write a file in any order: it holds what they wrote, and its hash is the file's."""
    data = random.Random(seed).randbytes(size)
    output = Output(path, size, Buffers())
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(output.write, data[s.start : s.stop], s.start) for s in cuts(size, seed)]:
            done.result()
    digest = output.finish()
    assert path.read_bytes() == data
    assert digest == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("size", [3 * AT_ONCE, 3 * AT_ONCE + 1234])
def test_any_order_gives_the_bytes_and_their_hash(tmp_path, size, seed):
    check_written(tmp_path / "file", size, seed)


def test_what_no_buffer_holds_any_more_is_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(output_file, "_MOST", 1)
    read, reads = output_file.pieces_of, []
    monkeypatch.setattr(output_file, "pieces_of", lambda *span: reads.append(span) or read(*span))
    check_written(tmp_path / "file", 3 * AT_ONCE, seed=1)
    assert len(reads) > 3


def test_a_file_system_without_direct_writes_gets_the_same_bytes(tmp_path, no_direct):
    check_written(tmp_path / "file", 3 * AT_ONCE + 77, seed=2)
    assert no_direct, "nothing was opened for direct writes"


def test_a_system_without_direct_writes_gets_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "O_DIRECT")
    check_written(tmp_path / "file", 2 * AT_ONCE + 77, seed=3)


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="no direct writes on this system")
def test_whole_blocks_go_past_the_page_cache_and_the_rest_does_not(tmp_path, monkeypatch):
    file, write, calls = DirectFile(tmp_path / "file", 10 * BLOCK), os.pwrite, []
    if file._direct is None:
        pytest.skip("no direct writes on this file system")
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: calls.append((fd, at, len(data))) or write(fd, data, at))
    for offset, count, expected in [
        (0, 2 * BLOCK, [(file._direct, 0, 2 * BLOCK)]),
        (2 * BLOCK, 10, [(file.fd, 2 * BLOCK, 10)]),
        (2 * BLOCK + 10, 20, [(file.fd, 2 * BLOCK + 10, 20)]),
        (
            2 * BLOCK + 30,
            3 * BLOCK,
            [
                (file._direct, 3 * BLOCK, 2 * BLOCK),
                (file.fd, 2 * BLOCK + 30, BLOCK - 30),
                (file.fd, 5 * BLOCK, 30),
            ],
        ),
    ]:
        calls.clear()
        buffer = Buffers().take()
        view = buffer.at(offset, count)
        view[:] = count % 251
        file.write(view, offset)
        assert calls == expected
    file.sync()
    file.close()


def test_a_failing_disk_is_not_taken_for_one_without_direct_writes(tmp_path, monkeypatch):
    file, buffer = DirectFile(tmp_path / "file", BLOCK), Buffers().take()

    def pwrite(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        file.write(buffer.at(0, BLOCK), 0)
    file.close()


def test_what_lies_far_behind_what_is_hashed_has_to_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(output_file, "_NEAR", AT_ONCE)
    output = Output(tmp_path / "file", 4 * AT_ONCE, Buffers())
    block = np.zeros(AT_ONCE, np.uint8)
    output.write(block, AT_ONCE)
    assert output.is_near(AT_ONCE, seconds=0) and not output.is_near(2 * AT_ONCE, seconds=0.01)
    output.write(block, 0)
    assert output.is_near(3 * AT_ONCE, seconds=20) and not output.is_near(3 * AT_ONCE + 1, seconds=0.01)
    output.close()


def test_nobody_waits_for_what_cannot_be_read_back(tmp_path, monkeypatch):
    def unreadable(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(output_file, "_NEAR", AT_ONCE)
    monkeypatch.setattr(output_file, "_MOST", 0)
    monkeypatch.setattr(output_file, "pieces_of", unreadable)
    output = Output(tmp_path / "file", 4 * AT_ONCE, Buffers())
    assert not output.is_near(3 * AT_ONCE, seconds=0.01)
    output.write(np.zeros(AT_ONCE, np.uint8), 0)
    assert output.is_near(3 * AT_ONCE, seconds=20)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        output.finish()
    output.close()


@pytest.fixture
def in_line(tmp_path, monkeypatch):
    """A sharded checkpoint; each step of a conversion waits until all before it is hashed, and computing is slow."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=3, n_head=2, vocab_size=300, n_positions=32))
    model.save_pretrained(tmp_path / "source", max_shard_size="300KB")
    normswap.convert(tmp_path / "source", tmp_path / "expected", norm="rmsnorm", verify="none")
    monkeypatch.setattr(output_file, "_NEAR", 0)
    monkeypatch.setattr(output_file, "_MOST", 1)
    edited = Values.edited
    monkeypatch.setattr(Values, "edited", lambda *args: (time.sleep(0.01), edited(*args))[1])
    return tmp_path


@pytest.mark.parametrize("workers", [1, 4])
def test_steps_that_wait_for_each_other_come_to_an_end(in_line, workers):
    normswap.convert(in_line / "source", in_line / "out", norm="rmsnorm", verify="none", workers=workers)
    files = sorted((in_line / "expected").glob("*.safetensors"))
    assert len(files) == 3
    assert all((in_line / "out" / file.name).read_bytes() == file.read_bytes() for file in files)


def test_a_step_that_fails_ends_the_wait_for_it(in_line, monkeypatch):
    write, writes = os.pwrite, []

    def pwrite(fd, data, offset):
        writes.append(offset)
        if len(writes) > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(DestinationError, match="cannot be written: No space left on device"):
        normswap.convert(in_line / "source", in_line / "out", norm="rmsnorm", verify="none")
    assert len(writes) > 20 and not (in_line / "out").exists()


@pytest.fixture(scope="module", params=["xfs", "btrfs"])
def sharing(request, tmp_path_factory):
    """A folder on a file system whose files can share blocks."""
    make = shutil.which(f"mkfs.{request.param}", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if make is None or os.geteuid() != 0:
        pytest.skip(f"needs mkfs.{request.param}, and to mount a file system")
    image, disk = tmp_path_factory.mktemp("disk") / "image", tmp_path_factory.mktemp("mounted")
    with image.open("wb") as file:
        file.truncate(400 * MIB)
    subprocess.run([make, "-q", image], check=True, capture_output=True)
    if subprocess.run(["mount", "-o", "loop", image, disk], capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def shared_bytes(path: Path) -> int:
    """Bytes of a file that lie in blocks which another has as well."""
    listed = subprocess.run(["filefrag", "-v", path], check=True, capture_output=True, text=True).stdout
    extents = [line.split(":") for line in listed.splitlines() if "shared" in line]
    return sum(int(extent[3]) for extent in extents) * BLOCK


def refused_below(source: Path, out: Path, monkeypatch) -> int:
    """The free bytes below which a conversion is refused, above which it is not."""
    usage = shutil.disk_usage(source)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
    with pytest.raises(DestinationError, match="are free") as none:
        normswap.convert(source, out, norm="rmsnorm", verify="none")
    needed = int(re.search(r"\((\d+) bytes\), 0\.00 GiB", str(none.value)).group(1))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    normswap.convert(source, out, norm="rmsnorm", verify="none")
    return needed


def test_where_no_blocks_are_shared_all_bytes_have_to_be_free(tmp_path, monkeypatch):
    source = tmp_path / "source"
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=8)).save_pretrained(source)
    monkeypatch.setattr(Checkpoint, "can_share", lambda *_: False)
    needed = refused_below(source, tmp_path / "out", monkeypatch)
    tensors = load_file(tmp_path / "out" / "model.safetensors").values()
    assert needed == sum(tensor.nbytes for tensor in tensors) > 10_000


@pytest.mark.skipif(shutil.which("filefrag", path="/usr/sbin:/sbin:/usr/bin") is None, reason="needs filefrag")
def test_untouched_tensors_share_the_blocks_of_the_source(sharing, tmp_path, monkeypatch):
    """And the result has the values that it has anywhere else."""
    source = sharing / "source"
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_embd=256, n_layer=2, n_head=4, vocab_size=500, n_positions=64)).save_pretrained(source)
    # a tensor that nothing touches, large enough to be seen, behind a header of another length than the result's
    with safe_open(source / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    tensors = load_file(source / "model.safetensors")
    large = max(tensors, key=lambda key: "c_fc.weight" in key)
    save_file(tensors, source / "model.safetensors", {**metadata, "note": "x" * 1000})
    os.sync()
    normswap.convert(source, sharing / "out", norm="rmsnorm", verify="none")
    normswap.convert(source, tmp_path / "out", norm="rmsnorm", verify="none")
    here, there = (load_file(folder / "out" / "model.safetensors") for folder in (sharing, tmp_path))
    assert here.keys() == there.keys() and all(torch.equal(here[key], there[key]) for key in here)
    with Checkpoint.open(sharing / "out") as made, Checkpoint.open(source) as own:
        aligned = made.tensors[large].offset % BLOCK == own.tensors[large].offset % BLOCK
    assert aligned and torch.equal(here[large], tensors[large])
    taken = (sharing / "out" / "model.safetensors").stat().st_size - tensors[large].nbytes
    needed = refused_below(source, sharing / "other", monkeypatch)
    assert needed <= taken + 2 * BLOCK  # and less, since it is not the only one
    # all whole blocks of the untouched tensors, at least those of the largest
    assert tensors[large].nbytes > 16 * BLOCK
    assert shared_bytes(sharing / "out" / "model.safetensors") >= tensors[large].nbytes - 2 * BLOCK


def cached(folder: Path) -> list[bool]:
    found = []
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            found.append(mostly_cached(file.fileno(), path.stat().st_size))
    return found


def drop(folder: Path) -> None:
    os.sync()
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="a system without such hints")
@pytest.mark.parametrize("warm", [False, True])
def test_the_page_cache_is_left_as_it_was_found(tmp_path, warm):
    """A source that was not there is not there afterwards; one that was stays."""
    torch.manual_seed(0)
    source = tmp_path / "source"
    model = GPT2LMHeadModel(GPT2Config(n_embd=512, n_layer=8, n_head=4, vocab_size=500, n_positions=64))
    model.save_pretrained(source, max_shard_size="10MB")
    drop(source)
    if any(cached(source)):
        pytest.skip("a file system whose files are always in memory")
    if warm:
        assert all(path.read_bytes() for path in source.glob("*.safetensors"))
        assert all(cached(source))
    normswap.convert(source, tmp_path / "out", norm="rmsnorm", verify="none")
    after = cached(source)
    assert len(after) == 12
    assert all(after) if warm else not any(after), after
