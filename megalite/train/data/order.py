"""Which sequence is the nth of a training run: a pure function of the seed and n, so that a run goes on anywhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from megalite.errors import ConfigError, Problem


def _bits(seed: int, epoch: int, count: int) -> np.ndarray:
    """Random bits by counter: with a stable sort, the same order on every platform and numpy version."""
    return np.random.Philox(key=[seed, epoch]).random_raw(count)


def _pick(first: int, count: int, size: int, epoch_of: Callable[[int], np.ndarray]) -> np.ndarray:
    """Entries first..first + count - 1 of endless epochs of `size` entries each: int64 [count]."""
    numbers = np.arange(first, first + count)
    epochs, places = numbers // size, numbers % size
    return np.array([epoch_of(int(e))[p] for e, p in zip(epochs, places, strict=True)], dtype=np.int64)


class TrainingOrder:
    """Which window of running text is the nth training sequence.

    Each epoch cuts the text into windows of `length` at another offset and goes through them in another order.
    """

    def __init__(self, num_tokens: int, length: int, seed: int):
        self.length = length
        self.seed = seed
        self.windows = (num_tokens - length) // length  # one length is left for the offset and the last target
        """Sequences in an epoch."""
        if self.windows < 1:
            rule = f"must be shorter: the training text has {num_tokens} tokens"
            raise ConfigError(Problem(key="data.sequence_length", rule=rule, value=length))
        self._epoch = lru_cache(maxsize=2)(self._starts_of_epoch)

    def _starts_of_epoch(self, epoch: int) -> np.ndarray:
        bits = _bits(self.seed, epoch, self.windows + 1)
        offset = int(bits[-1] % self.length)
        return np.argsort(bits[:-1], kind="stable") * self.length + offset

    def starts(self, first: int, count: int) -> np.ndarray:
        """First token of the sequences `first`..`first + count - 1`, counted over all epochs: int64 [count]."""
        return _pick(first, count, self.windows, self._epoch)


class ExampleOrder:
    """Which of `count` examples is the nth that is read; each epoch goes through all of them in another order."""

    def __init__(self, count: int, seed: int):
        self.count = count
        self.seed = seed
        self._epoch = lru_cache(maxsize=2)(self._order_of_epoch)

    def _order_of_epoch(self, epoch: int) -> np.ndarray:
        return np.argsort(_bits(self.seed, epoch, self.count), kind="stable")

    def indices(self, first: int, count: int) -> np.ndarray:
        """The examples read as numbers `first`..`first + count - 1`, counted over all epochs: int64 [count]."""
        return _pick(first, count, self.count, self._epoch)


def held_out_windows(num_tokens: int, length: int) -> np.ndarray:
    """First token of each window of the held-out text, end to end: int64 [windows], at least one."""
    windows = (num_tokens - 1) // length
    if windows < 1:
        rule = f"must be shorter: the held-out text has {num_tokens} tokens"
        raise ConfigError(Problem(key="data.sequence_length", rule=rule, value=length))
    return np.arange(windows, dtype=np.int64) * length


def read_windows(tokens: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """The inputs and, one further, the targets of each window: int64 [len(starts), length + 1]."""
    return np.stack([tokens[start : start + length + 1] for start in starts]).astype(np.int64)
