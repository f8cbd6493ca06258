"""The plan of moving a model in memory from the ranks of one layout to those of another. Torch-free.

    owned(source) --\\
                     atoms --> plan: one Transfer a range --> buckets: rounds of bounded memory
    owned(target) --/

The two layouts may share all, some or none of their ranks. Every rank derives the same lists from the model and the
layouts alone, so nothing has to be agreed. What a rank has already it copies locally; the rest comes from whichever
holder has least to send.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from megalite.core.layout import Layout
from megalite.weights.table import Range, Weights, owned

PORTIONS = 8
"""Ranges longer than this part of a bucket are cut, so that buckets fill up whatever the sizes are."""


@dataclass(frozen=True, slots=True)
class Held:
    """A range in a local parameter, and all ranks that have it there: the replicas of one place of the grid."""

    ranks: tuple[int, ...]
    range: Range


@dataclass(frozen=True, slots=True)
class Atom:
    """One range, where each layout holds it: a rank of either has all of it or none."""

    sources: tuple[Held, ...]
    targets: tuple[Held, ...]

    @property
    def range(self) -> Range:
        """Its place in a parameter of the target."""
        return self.targets[0].range


@dataclass(frozen=True, slots=True)
class Transfer:
    """One range, on its way from one rank's parameter to another's."""

    sender: int
    source: Range
    receiver: int
    target: Range

    @property
    def elements(self) -> int:
        return self.target.elements

    @property
    def is_local(self) -> bool:
        return self.sender == self.receiver

    @property
    def pair(self) -> tuple[int, int]:
        return self.sender, self.receiver

    def cut(self, lo: int, hi: int) -> Transfer:
        """The part of it that is lo..hi."""
        return Transfer(self.sender, self.source.cut(lo, hi), self.receiver, self.target.cut(lo, hi))


_Held = dict[tuple[str, int], list[Held]]
"""By Hugging Face tensor and dim."""


def atoms(model: Weights, source: Layout, target: Layout) -> list[Atom]:
    """The model, cut wherever a range of either layout begins or ends, in the order of the weight table."""
    sources, found = _held(model, source), []
    for key, wanted in _held(model, target).items():
        there = sources[key]
        cuts = sorted({cut for held in (*there, *wanted) for cut in (held.range.lo, held.range.hi)})
        senders, receivers = _pieces(there, cuts), _pieces(wanted, cuts)
        for lo, hi in pairwise(cuts):
            assert senders[lo] and receivers[lo], f"{key[0]} {lo}..{hi}: the layouts do not hold the same"
            found.append(Atom(tuple(senders[lo]), tuple(receivers[lo])))
    return found


def _held(model: Weights, layout: Layout) -> _Held:
    """What `owned` gives each place of the grid, with the ranks that are at it in each replica."""
    found: _Held = defaultdict(list)
    for ranks in zip(*layout.replicas(), strict=True):
        for one in owned(model, layout, ranks[0]):
            found[one.piece.hf, one.piece.hf_dim].append(Held(ranks, one))
    return found


def _pieces(held: list[Held], cuts: list[int]) -> dict[int, list[Held]]:
    """Who holds what, cut up, by where it begins."""
    index = {cut: number for number, cut in enumerate(cuts)}
    found: dict[int, list[Held]] = {cut: [] for cut in cuts}
    for one in held:
        for lo, hi in pairwise(cuts[index[one.range.lo] : index[one.range.hi] + 1]):
            found[lo].append(Held(one.ranks, one.range.cut(lo, hi)))
    return found


def plan(model: Weights, source: Layout, target: Layout) -> list[Transfer]:
    """Every element of every parameter of `target` once, from a rank of `source` that holds it."""
    transfers = []
    loads = _Loads()
    for atom in atoms(model, source, target):
        have = {rank: held.range for held in atom.sources for rank in held.ranks}
        holders = tuple(sorted(have))
        for held in atom.targets:
            for rank in held.ranks:
                sender = rank if rank in have else loads.add_to_least(holders, held.range.elements)
                transfers.append(Transfer(sender, have[sender], rank, held.range))
    return transfers


class _Loads:
    """What each rank has to send so far."""

    def __init__(self) -> None:
        self.sent: dict[int, int] = defaultdict(int)
        self._heaps: dict[tuple[int, ...], list[tuple[int, int]]] = {}

    def add_to_least(self, ranks: tuple[int, ...], elements: int) -> int:
        """Give `elements` to the rank that has least to send, the lowest of equals, and say which it is.

        A heap for each set of ranks; loads only grow, so an entry that is out of date is put back when it comes up.
        """
        if ranks not in self._heaps:
            self._heaps[ranks] = sorted((self.sent[rank], rank) for rank in ranks)
        heap = self._heaps[ranks]
        while (load := self.sent[heap[0][1]]) != heap[0][0]:
            heapq.heapreplace(heap, (load, heap[0][1]))
        rank = heap[0][1]
        self.sent[rank] += elements
        heapq.heapreplace(heap, (self.sent[rank], rank))
        return rank


def least_received(model: Weights, source: Layout, target: Layout) -> dict[int, int]:
    """Elements that each rank of `target` lacks before: no plan can move fewer. Ranks that lack none are left out."""
    counts: dict[int, int] = defaultdict(int)
    for atom in atoms(model, source, target):
        have = {rank for held in atom.sources for rank in held.ranks}
        for rank in {rank for held in atom.targets for rank in held.ranks} - have:
            counts[rank] += atom.range.elements
    return dict(counts)


def buckets(transfers: Iterable[Transfer], bucket_bytes: int, itemsize: int) -> list[list[Transfer]]:
    """The transfers between ranks, in rounds: what a rank sends and receives in one takes at most `bucket_bytes`.

    Long ranges are cut along their dim; a single index that is larger than a bucket has a round in which its two ranks
    do nothing else. Each pair of ranks goes through its transfers at the same pace, so that every round uses all
    links, and a rank reads its parameters in order. Local copies need no memory and are left out.
    """
    portion = bucket_bytes // PORTIONS
    rounds: list[list[Transfer]] = []
    used: list[dict[int, int]] = []  # bytes by rank, of each round
    full: dict[int, int] = defaultdict(int)  # by rank, a bit for each round that another portion would be too much for
    for transfer in _evenly(transfers, portion // itemsize):
        size = transfer.elements * itemsize
        pair = transfer.pair
        roomy = ~(full[pair[0]] | full[pair[1]])
        at = (roomy & -roomy).bit_length() - 1
        while at < len(used) and any(used[at][rank] and used[at][rank] + size > bucket_bytes for rank in pair):
            at += 1  # only what is larger than a portion comes here
        while at >= len(used):
            rounds.append([])
            used.append(defaultdict(int))
        rounds[at].append(transfer)
        for rank in pair:
            used[at][rank] += size
            if used[at][rank] + portion > bucket_bytes:
                full[rank] |= 1 << at
    return [_joined(one) for one in rounds]


def _evenly(transfers: Iterable[Transfer], portion: int) -> list[Transfer]:
    """Transfers between ranks, none much longer than `portion`, by the share of their pair's elements before them."""
    before: dict[tuple[int, int], int] = defaultdict(int)
    parts = []
    for transfer in transfers:
        if not transfer.is_local:
            lo, hi = transfer.target.lo, transfer.target.hi
            step = max(1, portion // transfer.target.piece.row)
            for first in range(lo, hi, step):
                part = transfer if step >= hi - lo else transfer.cut(first, min(first + step, hi))
                parts.append((before[part.pair], part))
                before[part.pair] += part.elements
    parts.sort(key=lambda one: one[0] / before[one[1].pair])  # stable: equals stay in the order of the plan
    return [part for _, part in parts]


def _joined(transfers: list[Transfer]) -> list[Transfer]:
    """The transfers with portions of one range put together again, grouped by pair."""
    by_pair: dict[tuple[int, int], list[Transfer]] = defaultdict(list)
    for transfer in transfers:
        mine = by_pair[transfer.pair]
        if mine and _goes_on(mine[-1].source, transfer.source) and _goes_on(mine[-1].target, transfer.target):
            mine[-1] = mine[-1].cut(mine[-1].target.lo, transfer.target.hi)
        else:
            mine.append(transfer)
    return [transfer for mine in by_pair.values() for transfer in mine]


def _goes_on(one: Range, other: Range) -> bool:
    """Whether a range goes on where another ends, in the tensor and in the parameter."""
    return one.piece is other.piece and (one.hi, one.start + one.count) == (other.lo, other.start)
