"""Text from checkpoints made safe to show."""

from __future__ import annotations

import unicodedata


def printable(text: str) -> str:
    """`text` without control characters: names and texts from a checkpoint may hold some that move the cursor."""
    return "".join("?" if unicodedata.category(c)[0] == "C" and c != "\n" else c for c in text)
