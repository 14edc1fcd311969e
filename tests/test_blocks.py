"""Weights read past the page cache: the bytes of the file, each block of it once while it is kept."""

import errno
import fcntl
import os
import random
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from normswap.checkpoint.blocks import Blocks, mostly_cached
from normswap.checkpoint.direct import AT_ONCE, BLOCK
from normswap.checkpoint.files import Checkpoint
from normswap.errors import SourceError
from normswap.pages import huge

KIB = 2**10
DIRECT = getattr(os, "O_DIRECT", 0)
pytestmark = pytest.mark.skipif(not DIRECT, reason="no direct reads on this system")


def drop(fd: int) -> None:
    """Have a file leave the page cache."""
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.fixture
def written(tmp_path):
    """An open file of three blocks and a bit that is not in the page cache, and its bytes."""
    data = random.Random(0).randbytes(3 * AT_ONCE + 12345)
    path = tmp_path / "file"
    path.write_bytes(data)
    with path.open("rb") as file:
        drop(file.fileno())
        if mostly_cached(file.fileno(), len(data)):
            pytest.skip("a file system whose files are always in memory")
        yield file.fileno(), data


@pytest.fixture
def reads(monkeypatch):
    """(whether direct, offset, bytes) of each read."""
    read, seen = os.preadv, []

    def preadv(fd, buffers, offset):
        count = read(fd, buffers, offset)
        seen.append((is_direct(fd), offset, count))
        return count

    monkeypatch.setattr(os, "preadv", preadv)
    return seen


def is_direct(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & DIRECT)


def spans(size: int) -> list[range]:
    """Of a few bytes, of about a block's end, of the file's end and beyond it, and of all."""
    chosen = random.Random(1)
    starts = [chosen.randrange(size) for _ in range(30)]
    short = [range(at, at + chosen.randrange(1, 2000)) for at in starts[:10]]
    long = [range(at, at + chosen.randrange(300 * KIB, 6 * 2**20)) for at in starts[10:]]
    ends = [range(k * AT_ONCE + d, k * AT_ONCE + d + n) for k in (1, 2) for d in (-1, 0, 1) for n in (1, 300 * KIB)]
    return [*short, *long, *ends, range(0, size), range(size - 400 * KIB, size), range(size, size + 10)]


def read(made: Blocks, fd: int, span: range) -> bytes:
    view = np.full(len(span), 7, np.uint8)
    return view[: made.read_into(view, fd, span.start)].tobytes()


def check(fd: int, data: bytes, most: int = 2) -> None:
    made, wanted = Blocks(), spans(len(data)) * 3
    random.Random(2).shuffle(wanted)
    with made.keeping(most), ThreadPoolExecutor(6) as pool:
        found = [*pool.map(lambda span: read(made, fd, span), wanted)]
    assert len(found) > 100
    assert all(got == data[span.start : span.stop] for got, span in zip(found, wanted, strict=True))
    made.close()


def mapping_of(address: int) -> list[str]:
    """The lines of /proc/self/smaps on the memory that holds an address."""
    found = []
    with open("/proc/self/smaps") as smaps:
        for line in smaps:
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                begin, end = (int(bound, 16) for bound in line.split()[0].split("-"))
                if found:
                    break
                inside = begin <= address < end
            if inside:
                found.append(line)
    return found


@pytest.mark.skipif(not os.path.exists("/sys/kernel/mm/transparent_hugepage"), reason="no large pages on this system")
@pytest.mark.parametrize("count", [0, 1, AT_ONCE, 5 * AT_ONCE + 77])
def test_buffers_may_lie_in_large_pages(count):
    """Memory that is shared, or that the kernel was not told of, gets none."""
    memory = huge(count)
    memory[:] = 7
    assert len(memory) == count and memory.ctypes.data % (2 * 2**20) == 0
    lines = mapping_of(memory.ctypes.data)
    assert lines[0].split()[1] == "rw-p"
    assert "hg" in next(line for line in lines if line.startswith("VmFlags")).split()


def test_several_threads_get_the_bytes_of_the_file(written, reads):
    check(*written)
    assert any(direct for direct, *_ in reads)


def test_each_block_is_read_once_while_it_is_kept(written, reads):
    fd, data = written
    made = Blocks()
    with made.keeping(4), ThreadPoolExecutor(8) as pool:
        parts = [range(at, min(at + 500 * KIB, len(data))) for at in range(0, len(data), 500 * KIB)] * 4
        parts = [part for part in parts if len(part) >= 256 * KIB]
        assert all(pool.map(lambda part: read(made, fd, part) == data[part.start : part.stop], parts))
    made.close()
    large = [(offset, count) for direct, offset, count in reads if direct and count > BLOCK]
    assert sorted(offset for offset, _ in large) == [0, AT_ONCE, 2 * AT_ONCE, 3 * AT_ONCE]


def test_blocks_that_are_not_kept_are_given_back(written):
    fd, data = written
    made = Blocks()
    with made.keeping(3):
        read(made, fd, range(0, len(data)))
        assert len(made._blocks) == 3
    assert len(made._blocks) <= 4 and not made._buffers._free
    made.close()
    assert not made._blocks
    os.fstat(fd)  # it was not closed


def test_what_is_small_takes_no_block(written, reads):
    fd, data = written
    made = Blocks()
    assert read(made, fd, range(1000, 3000)) == data[1000:3000]
    assert not made._blocks
    read(made, fd, range(0, AT_ONCE))
    reads.clear()
    assert read(made, fd, range(1000, 3000)) == data[1000:3000]  # of the block that is there
    assert not reads
    made.close()


@pytest.mark.parametrize("why", ["cached", "no such flag", "no /proc", "refused"])
def test_a_file_that_cannot_be_read_so_is_read_as_any_other(written, reads, monkeypatch, why):
    fd, data = written
    opened = os.open
    if why == "cached":
        assert os.pread(fd, len(data), 0) == data
    elif why == "no such flag":
        monkeypatch.delattr(os, "O_DIRECT")
    elif why == "no /proc":

        def opening(path, *rest):
            return opened(str(path).replace("/proc/", "/no/such/"), *rest)

        monkeypatch.setattr(os, "open", opening)
    else:
        counted = os.preadv

        def refuse(fd, buffers, offset):
            if is_direct(fd):
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return counted(fd, buffers, offset)

        monkeypatch.setattr(os, "preadv", refuse)
    check(fd, data)
    assert reads and not any(direct for direct, *_ in reads)


def test_a_disk_that_fails_is_an_error_for_all_who_wait(written, monkeypatch):
    fd, data = written
    read_file, began = os.preadv, threading.Event()

    def preadv(fd, buffers, offset):
        if is_direct(fd) and len(buffers[0]) > BLOCK:
            began.wait(1)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read_file(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    made = Blocks()
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(read, made, fd, range(0, AT_ONCE)) for _ in range(3)]
        began.set()
        for one in waiting:
            with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                one.result(timeout=20)
    made.close()


def test_a_failing_disk_is_named(tmp_path, monkeypatch):
    save_file({"a": torch.zeros(2**20)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with Checkpoint.open(tmp_path) as checkpoint:

        def preadv(*_):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(os, "preadv", preadv)
        with pytest.raises(SourceError, match=r"model\.safetensors: cannot be read: .* Is the disk sound"):
            checkpoint.read("a")


def test_what_is_read_is_the_file_that_was_opened(tmp_path):
    """Also where its name means another by now."""
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2**20)}, path)
    (tmp_path / "config.json").write_text("{}")
    with Checkpoint.open(tmp_path) as checkpoint:
        with path.open("rb") as file:
            drop(file.fileno())
        path.unlink()
        save_file({"a": torch.zeros(2**20)}, path)
        assert torch.equal(checkpoint.read("a"), torch.ones(2**20))


def test_files_stay_open_no_longer_than_the_checkpoint(tmp_path):
    """Those that were opened once more, too."""
    program = f"""
import os, torch
from pathlib import Path
from safetensors.torch import save_file
from normswap.checkpoint.files import Checkpoint
folder = Path({str(tmp_path)!r})
save_file({{"a": torch.ones(2**20)}}, folder / "model.safetensors")
(folder / "config.json").write_text("{{}}")
def opened():
    links = Path("/proc/self/fd").iterdir()
    return sum(link.is_symlink() and os.readlink(link).endswith("model.safetensors") for link in links)
with open(folder / "model.safetensors", "rb") as file:
    os.fsync(file.fileno())
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
for _ in range(3):
    with Checkpoint.open(folder) as checkpoint:
        checkpoint.read("a")
        most = opened()
print(most, opened())
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert said[0] in "12" and said[1] == "0"
