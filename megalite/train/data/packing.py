"""Which sequences are computed together: a pure plan, the same on every rank that knows the lengths. Torch-free."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

Packs = list[list[int]]
"""Micro batches of one replica, each the indices of its sequences from the shortest on; one may be empty."""


def pack(lengths: Sequence[int], capacity: int, replicas: int, *, least: int = 1) -> list[Packs]:
    """Deal sequences of `lengths` tokens out to `replicas`, as micro batches of at most `capacity` tokens.

    Every sequence is in one micro batch; one that is longer than `capacity` has a micro batch of its own. Every replica
    gets the same number of micro batches, at least `least` and no more than the fullest replica needs or `least` says;
    where a replica has too few sequences, its last ones are empty. Replicas differ by at most the longest sequence. In
    a micro batch like lengths are neighbours, which attention makes use of.

    Longest first to the replica with the fewest tokens (Graham 1969), then first-fit decreasing into micro batches,
    whose number is within 11/9 of the best (Dósa 2007, plus 6/9).
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    shares = _spread(order, lengths, replicas)
    fitted = [_first_fit(share, lengths, capacity) for share in shares]
    count = max(least, *map(len, fitted))
    return [_even(share, packs, count, lengths, capacity) for share, packs in zip(shares, fitted, strict=True)]


def _spread(order: Sequence[int], lengths: Sequence[int], parts: int) -> Packs:
    """Each index of `order` to the part with the fewest tokens so far, of several the first."""
    shares: Packs = [[] for _ in range(parts)]
    heap = [(0, part) for part in range(parts)]
    for index in order:
        tokens, part = heap[0]
        shares[part].append(index)
        heapq.heapreplace(heap, (tokens + lengths[index], part))
    return shares


def _first_fit(order: Sequence[int], lengths: Sequence[int], capacity: int) -> Packs:
    packs: Packs = []
    rooms: list[int] = []
    for index in order:
        place = next((place for place, room in enumerate(rooms) if lengths[index] <= room), len(packs))
        if place == len(packs):
            packs.append([])
            rooms.append(capacity)
        packs[place].append(index)
        rooms[place] -= lengths[index]
    return packs


def _even(share: Sequence[int], packs: Packs, count: int, lengths: Sequence[int], capacity: int) -> Packs:
    """`share` as `count` micro batches: of even size if that fits, else `packs` and empty ones."""
    even = _spread(share, lengths, count)
    if any(len(pack) > 1 and sum(lengths[index] for index in pack) > capacity for pack in even):
        even = packs + [[]] * (count - len(packs))
    return [sorted(pack, key=lambda index: (lengths[index], index)) for pack in even]
