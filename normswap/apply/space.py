"""The space that a result takes: all of its bytes but those that share the source's blocks."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from normswap.apply.layout import Layout
from normswap.apply.shard import header_of
from normswap.checkpoint.files import Checkpoint
from normswap.checkpoint.sharing import whole_blocks


def space_for(source: Checkpoint, layout: Layout, folder: Path, finished: Collection[str] = ()) -> int:
    """Bytes that the files of `layout` will take in `folder`, but for those called `finished`, which are there."""
    shares, taken = source.can_share(folder), 0
    for shard in source.shards:
        entries = layout.shards[shard.name] if shard.name not in finished else ()
        at = len(header_of(shard, entries, shares))
        for entry in entries:
            span, at = range(at, at + entry.bytes_after), at + entry.bytes_after
            place = source.place(entry.key) if shares and entry.what == "copied" else None
            taken += len(span) - (len(whole_blocks(span, place.offset)) if place else 0)
    return taken
