"""What a claim means, in one sentence, and how it looks."""

from __future__ import annotations

from normswap.planning.plans import Claim

#: claim -> style on a terminal
STYLES: dict[Claim, str] = {"exact": "green", "calibrated": "yellow", "untrained": "bold red"}
#: claim -> what it promises
MEANINGS: dict[Claim, str] = {
    "exact": "The result computes the same function, up to rounding.",
    "calibrated": "Constants and weights are fitted to what the model does on data: the result is not the same "
    "function, and how close it comes is measured. A fine-tune heals the rest.",
    "untrained": "Nothing is fitted to data: every constant of the move is 1, and the result is far from the original "
    "until it is calibrated (--calibrate) or trained.",
}
