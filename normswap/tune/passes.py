"""The rows of a training in the order in which it takes them: pass after pass over the data, each shuffled anew.

The order is one list from the first step to the last, by the seed alone. So every step has as many rows as another, a
resumed run goes on in the middle of it, and what two processes take in turns is what one takes with twice the
accumulation.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch.utils.data import Dataset

from normswap.tune.data import PLACE


class Passes(Dataset):
    """Row `i` of the training, with its place in it (`data.PLACE`).

    Args:
        rows: of the training part.
        length: how many rows the training takes.
        seed: of the order.
    """

    def __init__(self, rows: Any, length: int, seed: int):
        self.rows, self.length, self.seed = rows, length, seed
        self._pass, self._order = -1, np.empty(0)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict[str, Any]:
        turn, place = divmod(i, len(self.rows))
        if turn != self._pass:
            self._pass, self._order = turn, np.random.default_rng((self.seed, turn)).permutation(len(self.rows))
        return self.rows[int(self._order[place])] | {PLACE: (self.seed, i)}
