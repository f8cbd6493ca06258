"""Which replica has which blocks of prompts in its prefix cache, as far as can be known from outside. Torch-free.

A block is known by the key of its content, which includes everything before it (`blocks.block_keys`). A replica's
blocks are kept in the order of their last use, as many as its cache can hold: what is older it has surely evicted.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

LIMIT = 1 << 21
"""Most blocks known, of all replicas together: what bounds the memory."""


class PrefixIndex:
    """Blocks by replica; replicas have small numbers, which are bits of masks."""

    def __init__(self, limit: int = LIMIT):
        self.limit = limit
        self._capacity: dict[int, int] = {}
        self._blocks: dict[int, OrderedDict[bytes, None]] = {}
        """The one used longest ago first."""
        self._holders: dict[bytes, int] = {}
        """Of each known block, the mask of the replicas that have it; never 0."""

    def add(self, replica: int, num_blocks: int) -> None:
        """A replica with a cache of so many blocks, of which nothing is known."""
        self._capacity[replica] = num_blocks
        self._blocks[replica] = OrderedDict()

    def remove(self, replica: int) -> None:
        """Forget a replica."""
        self._forget(replica, self._blocks.pop(replica))
        del self._capacity[replica]

    def use(self, replica: int, keys: Sequence[bytes]) -> None:
        """A replica computes or shares the blocks of a prompt. As in its cache, the last ones are evicted first."""
        blocks, holders, bit = self._blocks[replica], self._holders, 1 << replica
        for key in reversed(keys):
            if key in blocks:
                blocks.move_to_end(key)
            else:
                blocks[key] = None
                holders[key] = holders.get(key, 0) | bit
        surplus = len(blocks) - min(self._capacity[replica], self.limit // len(self._blocks))
        if surplus > 0:
            self._forget(replica, [blocks.popitem(last=False)[0] for _ in range(surplus)])

    def match(self, keys: Iterable[bytes]) -> tuple[int, int]:
        """The mask of the replicas that have the longest beginning of a prompt, and its blocks; 0, 0: none has any."""
        mask, known = 0, 0
        for key in keys:
            both = self._holders.get(key, 0) & (mask if known else -1)
            if not both:
                break
            mask, known = both, known + 1
        return mask, known

    def known(self, replica: int, keys: Iterable[bytes]) -> int:
        """Leading blocks of a prompt that a replica has."""
        blocks, known = self._blocks[replica], 0
        for key in keys:
            if key not in blocks:
                break
            known += 1
        return known

    def __len__(self) -> int:
        """Blocks known, of all replicas together."""
        return sum(map(len, self._blocks.values()))

    def _forget(self, replica: int, keys: Iterable[bytes]) -> None:
        holders, bit = self._holders, 1 << replica
        for key in keys:
            left = holders[key] & ~bit
            if left:
                holders[key] = left
            else:
                del holders[key]
