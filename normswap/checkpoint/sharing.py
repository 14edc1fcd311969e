"""Files that have blocks in common (reflinks, on btrfs, XFS and others): a copy that neither reads nor writes."""

from __future__ import annotations

import errno
import struct
import tempfile
from pathlib import Path

from normswap.checkpoint.direct import BLOCK

# ioctl_ficlonerange(2), and its argument: descriptor, offset and length there, offset here.
_FICLONERANGE, _RANGE = 0x4020940D, "=qQQQ"
# Of two files that cannot, or not with these offsets.
_CANNOT = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS, errno.EXDEV, errno.EPERM, errno.ETXTBSY}


def share(fd: int, offset: int, count: int, source: int, start: int) -> bool:
    """Have `count` bytes at `offset` of an open file be those from `start` on of another; all multiples of a block.

    Returns:
        Whether it was done; not where the file system has no such thing.

    Raises:
        OSError: it has, and failed.
    """
    try:
        import fcntl  # not on Windows

        fcntl.ioctl(fd, _FICLONERANGE, struct.pack(_RANGE, source, start, count, offset))
    except ImportError:
        return False
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
        return False
    return True


def whole_blocks(span: range, start: int) -> range:
    """What of a file's bytes in `span` can be shared with those from `start` on of another: a part, perhaps none.

    Both have to have it in the same places of their blocks.
    """
    first = span.start + -span.start % BLOCK
    last = max(first, span.stop - span.stop % BLOCK)
    if first == last or (start + first - span.start) % BLOCK:
        return range(span.start, span.start)
    return range(first, last)


def can_share(source: int, folder: Path) -> bool:
    """Whether files in `folder` can share the blocks of this open file, of a block at least; tried, and undone."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return share(file.fileno(), 0, BLOCK, source, 0)
    except OSError:  # what is wrong there, writing will say
        return False
