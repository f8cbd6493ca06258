"""The order of training data: which sequence is the nth. A function of the seed and n, so that a run goes on anywhere.

Torch-free.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np


class TrainingOrder:
    """Endless epochs over `count` sequences, each epoch in another order.

    `length` is 1 for examples. Else the sequences are windows of so many tokens of running text, which every epoch cuts
    at another offset, below `length`.
    """

    def __init__(self, count: int, seed: int, length: int = 1):
        self.count = count
        self.seed = seed
        self.length = length
        self._epoch = lru_cache(maxsize=2)(self._indices_of_epoch)

    def indices(self, first: int, number: int) -> np.ndarray:
        """Indices of sequences number `first` to `first + number - 1`, counted over all epochs: int64 [number].

        An index is that of an example, or of the first token of a window.
        """
        epochs, places = np.divmod(np.arange(first, first + number), self.count)
        return np.array([self._epoch(int(e))[p] for e, p in zip(epochs, places, strict=True)], dtype=np.int64)

    def _indices_of_epoch(self, epoch: int) -> np.ndarray:
        # Random bits by counter: with a stable sort, the same order on every platform and numpy version.
        bits = np.random.Philox(key=[self.seed, epoch]).random_raw(self.count + 1)
        return np.argsort(bits[:-1], kind="stable") * self.length + int(bits[-1] % self.length)
