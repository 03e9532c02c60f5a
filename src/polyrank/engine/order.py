"""In which order rows are trained on: a permutation drawn by key, for each epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from polyrank.frame import seed_of


class KeyedOrder(Sampler[int]):
    """Row numbers in an order drawn by (key, epoch, part).

    Args:
        sizes: rows of each part; parts come one after another and rows are mixed inside a part.
        key: what the order is drawn from.
        repeats: how often each part is gone through within one epoch.
    """

    def __init__(self, sizes: Sequence[int], *key: int | str, repeats: int = 1) -> None:
        self.sizes, self.key, self.repeats, self.epoch = list(sizes), key, repeats, 0

    def __len__(self) -> int:
        return sum(self.sizes) * self.repeats

    def __iter__(self) -> Iterator[int]:
        first = 0
        for part, size in enumerate(self.sizes):
            for again in range(self.repeats):
                seed = seed_of("order", *self.key, self.epoch, part, again)
                yield from (first + np.random.default_rng(seed).permutation(size)).tolist()
            first += size

    def set_epoch(self, epoch: int) -> None:
        """Choose which epoch's order comes next."""
        self.epoch = epoch

    def ends(self) -> list[int]:
        """Return after how many rows each part is done, within one epoch."""
        return [int(n) for n in np.cumsum(self.sizes) * self.repeats]
