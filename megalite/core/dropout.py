"""Dropout of what trained adapters read, the same in every layout and whenever a pass is computed again.

What is dropped is a function of the seed, the optimizer step, the sequence's tokens, the place in it, the linear and
the channel: a hash of them in place of a generator's state. So no rank needs to know which tokens others have, and a
run that goes on drops what it would have dropped. Equal sequences of one step are dropped alike, and so is what
several adapters read whose linears are stacked in one, such as those of q, k and v.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

_FIRST, _SECOND = 0x85EBCA6B, 0xC2B2AE35
"""Multipliers of MurmurHash3's finaliser, a bijection of 32 bits in which each depends on all."""
_STRIDE = 0x9E3779B9
"""Step between the counters of neighbours: 2^32 over the golden ratio."""
_INT32 = 1 << 31


class Dropout:
    """Drops elements with probability `rate` and scales up the others, within `of`; outside it does nothing."""

    def __init__(self, rate: float, seed: int):
        self.rate = rate
        self.seed = seed
        self._border = int(rate * 2 * _INT32) - _INT32
        self._tokens: Tensor | None = None

    def keys(self, ids: np.ndarray, lengths: Sequence[int], step: int) -> Tensor:
        """Keys of a micro batch's tokens in an step, int32 [T]; `ids`, int64 [T], are sequences of `lengths`."""
        counts = np.array(lengths, dtype=np.int64)
        starts = np.cumsum(counts) - counts
        places = (np.arange(len(ids), dtype=np.int64) - np.repeat(starts, counts)).astype(np.uint32)
        places *= np.uint32(_STRIDE)
        summands = _mixed_words(ids.astype(np.uint32) ^ _mixed_words(places)).astype(np.uint64)
        sums = np.add.reduceat(summands, starts).astype(np.uint32)
        begin = np.uint32(zlib.crc32(f"{self.seed}:{step}".encode()))
        found = _mixed_words(np.repeat(_mixed_words(sums ^ begin), counts) + places)
        return torch.from_numpy(found.view(np.int32))

    @contextmanager
    def of(self, tokens: Tensor) -> Iterator[None]:
        """Context of forward and backward passes over the tokens with these keys, int32 [T] on their device."""
        self._tokens = tokens
        try:
            yield
        finally:
            self._tokens = None

    def channels(self, linear: str, indices: Tensor) -> Tensor:
        """Keys of a linear's inputs, int32 [K]; `indices`: those of the inputs over all ranks, int32 [K]."""
        salt = zlib.crc32(linear.encode())
        words = indices.cpu().numpy().astype(np.uint32) * np.uint32(_STRIDE) + np.uint32(salt)
        return torch.from_numpy(_mixed_words(words).view(np.int32)).to(indices.device)

    def __call__(self, x: Tensor, channels: Tensor) -> Tensor:
        """x [T, K] after dropout."""
        if self._tokens is None:
            return x
        dropped = _mixed(self._tokens[:, None] ^ channels) < self._border
        return (x * (1 / (1 - self.rate))).masked_fill(dropped, 0)


def _mixed_words(words: np.ndarray) -> np.ndarray:
    """`_mixed` of a copy of uint32 words."""
    mixed: np.ndarray = _mixed(torch.from_numpy(words.view(np.int32).copy())).numpy().view(np.uint32)
    return mixed


def _mixed(words: Tensor) -> Tensor:
    """MurmurHash3's finaliser of int32, in place: products wrap; shifts take the sign along, which is masked out."""
    for shift, factor in ((16, _FIRST), (13, _SECOND), (16, None)):
        words ^= (words >> shift) & ((1 << (32 - shift)) - 1)
        if factor is not None:
            words *= factor - 2 * _INT32
    return words
