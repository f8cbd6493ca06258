"""Plans of how a model moves in memory from the ranks of one layout to those of another.

    owned(source) --\\
                     atoms --> plan: one Transfer a range --> buckets: rounds of bounded memory --> Parcels of a rank
    owned(target) --/

The two layouts may share all, some or none of their ranks. Every rank derives the same lists from the model and the
layouts alone, so nothing has to be agreed. What a rank has already it copies locally; the rest comes from whichever
holder has least to send. Importable without torch.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

from megalite.core.layout import Layout
from megalite.model.config import ModelConfig
from megalite.weights.table import owned

PORTIONS = 8
"""Ranges longer than this part of a bucket are cut, so that buckets fill up whatever the sizes are."""


@dataclass(frozen=True, slots=True)
class Held:
    """Where a range lies in a local parameter, on every rank that has it there: the replicas of one place."""

    ranks: tuple[int, ...]
    param: str
    dim: int
    start: int


@dataclass(frozen=True, slots=True)
class Atom:
    """Indices lo..hi along `dim` of a Hugging Face tensor: of either layout, a rank holds all of them or none."""

    hf: str
    dim: int
    lo: int
    hi: int
    row: int
    """Elements of one index."""
    sources: tuple[Held, ...]
    targets: tuple[Held, ...]

    @property
    def elements(self) -> int:
        return (self.hi - self.lo) * self.row

    def __str__(self) -> str:
        return f"{self.hf} {'columns' if self.dim else 'rows'} {self.lo}..{self.hi}"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a range begins: index `start` along `dim` of a parameter of a global rank."""

    rank: int
    param: str
    dim: int
    start: int


@dataclass(frozen=True, slots=True)
class Transfer:
    """Indices lo..hi along `dim` of a Hugging Face tensor, on their way from one rank's parameter to another's."""

    hf: str
    dim: int
    lo: int
    hi: int
    row: int
    """Elements of one index."""
    source: Place
    target: Place

    @property
    def count(self) -> int:
        """Indices, along the dims of both places."""
        return self.hi - self.lo

    @property
    def elements(self) -> int:
        return self.count * self.row

    @property
    def is_local(self) -> bool:
        return self.source.rank == self.target.rank

    @property
    def pair(self) -> tuple[int, int]:
        """Sending and receiving rank."""
        return self.source.rank, self.target.rank

    def part(self, first: int, count: int) -> Transfer:
        """`count` of the indices from the `first` on."""
        if count == self.count:
            return self
        lo, source, target = self.lo + first, self.source, self.target
        source = Place(source.rank, source.param, source.dim, source.start + first)
        target = Place(target.rank, target.param, target.dim, target.start + first)
        return Transfer(self.hf, self.dim, lo, lo + count, self.row, source, target)


@dataclass(frozen=True, slots=True)
class Parcel:
    """What one rank sends to one other in a round, packed into one message in this order."""

    peer: int
    """The other rank."""
    transfers: tuple[Transfer, ...]


@dataclass(frozen=True, slots=True)
class _Range:
    """What `owned` gives one place of the grid, and the ranks that are at it in each replica."""

    lo: int
    hi: int
    row: int
    held: Held


_Ranges = dict[tuple[str, int], list[_Range]]
"""By Hugging Face tensor and dim."""


def atoms(model: ModelConfig, source: Layout, target: Layout) -> list[Atom]:
    """The model, cut wherever a range of either layout begins or ends, in the order of the weight table."""
    return _cut(_ranges(model, source), _ranges(model, target))


def _ranges(model: ModelConfig, layout: Layout) -> _Ranges:
    found: _Ranges = defaultdict(list)
    for pp in range(layout.pp):
        for tp in range(layout.tp):
            ranks = tuple(layout.rank(tp=tp, pp=pp, dp=dp) for dp in range(layout.dp))
            for part in owned(model, layout, ranks[0]):
                piece = part.piece
                held = Held(ranks, piece.param, piece.dim, part.start)
                found[piece.hf, piece.hf_dim].append(_Range(part.lo, part.hi, math.prod(piece.other), held))
    return found


def _cut(sources: _Ranges, targets: _Ranges) -> list[Atom]:
    found = []
    for key, wanted in targets.items():
        hf, dim = key
        cuts = sorted({cut for one in (*sources[key], *wanted) for cut in (one.lo, one.hi)})
        senders, receivers = _holders(sources[key], cuts), _holders(wanted, cuts)
        for lo, hi in zip(cuts, cuts[1:], strict=False):
            assert senders[lo] and receivers[lo], f"{hf} {lo}..{hi}: the layouts do not hold the same"
            found.append(Atom(hf, dim, lo, hi, wanted[0].row, tuple(senders[lo]), tuple(receivers[lo])))
    return found


def _holders(ranges: list[_Range], cuts: list[int]) -> dict[int, list[Held]]:
    """Who holds what begins at each cut."""
    index = {cut: number for number, cut in enumerate(cuts)}
    found: dict[int, list[Held]] = {cut: [] for cut in cuts}
    for one in ranges:
        held = one.held
        for cut in cuts[index[one.lo] : index[one.hi]]:
            found[cut].append(Held(held.ranks, held.param, held.dim, held.start + cut - one.lo))
    return found


def plan(model: ModelConfig, source: Layout, target: Layout) -> list[Transfer]:
    """Every element of every parameter of `target` once, from a rank of `source` that holds it."""
    transfers = []
    loads = _Loads()
    wanted = _ranges(model, target)
    for atom in _cut(_ranges(model, source), wanted):
        places = {rank: Place(rank, held.param, held.dim, held.start) for held in atom.sources for rank in held.ranks}
        holders = tuple(sorted(places))
        for held in atom.targets:
            for rank in held.ranks:
                sender = rank if rank in places else loads.add_to_least(holders, atom.elements)
                goal = Place(rank, held.param, held.dim, held.start)
                transfers.append(Transfer(atom.hf, atom.dim, atom.lo, atom.hi, atom.row, places[sender], goal))
    _check(transfers, wanted)
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


def _check(transfers: list[Transfer], wanted: _Ranges) -> None:
    """AssertionError unless every parameter of every target rank is filled without gap or overlap."""
    missing: dict[tuple[int, str], int] = defaultdict(int)
    for one in (one for ranges in wanted.values() for one in ranges):
        for rank in one.held.ranks:
            missing[rank, one.held.param] += (one.hi - one.lo) * one.row
    filled: dict[tuple[int, str], list[tuple[int, int]]] = defaultdict(list)
    for transfer in transfers:
        goal = transfer.target
        filled[goal.rank, goal.param].append((goal.start, goal.start + transfer.count))
        missing[goal.rank, goal.param] -= transfer.elements
    for (rank, param), ranges in filled.items():
        end = 0
        for lo, hi in sorted(ranges):
            assert lo == end, f"the plan leaves a gap or an overlap in {param} of rank {rank} at {end}"
            end = hi
    assert not any(missing.values()), f"the plan leaves out {[key for key, count in missing.items() if count]}"


def received(transfers: Iterable[Transfer]) -> dict[int, int]:
    """Elements that each rank gets from others; ranks that get nothing are left out."""
    counts: dict[int, int] = defaultdict(int)
    for transfer in transfers:
        if not transfer.is_local:
            counts[transfer.target.rank] += transfer.elements
    return dict(counts)


def least_received(model: ModelConfig, source: Layout, target: Layout) -> dict[int, int]:
    """Elements that each rank of `target` lacks before: no plan can move fewer. Ranks that lack none are left out."""
    counts: dict[int, int] = defaultdict(int)
    for atom in atoms(model, source, target):
        have = {rank for held in atom.sources for rank in held.ranks}
        for rank in {rank for held in atom.targets for rank in held.ranks} - have:
            counts[rank] += atom.elements
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
            step = max(1, portion // transfer.row)
            for first in range(0, transfer.count, step):
                part = transfer.part(first, min(step, transfer.count - first))
                parts.append((before[part.pair], part))
                before[part.pair] += part.elements
    parts.sort(key=lambda one: one[0] / before[one[1].pair])  # stable: equals stay in the order of the plan
    return [part for _, part in parts]


def _joined(transfers: list[Transfer]) -> list[Transfer]:
    """The transfers with portions of one range put together again, grouped by pair."""
    by_pair: dict[tuple[int, int], list[Transfer]] = defaultdict(list)
    for transfer in transfers:
        mine = by_pair[transfer.pair]
        if mine and _follows(mine[-1], transfer):
            mine[-1] = replace(mine[-1], hi=transfer.hi)
        else:
            mine.append(transfer)
    return [transfer for mine in by_pair.values() for transfer in mine]


def _follows(one: Transfer, other: Transfer) -> bool:
    """Whether a transfer goes on where one of the same pair ends, in the tensor and in both parameters."""
    return (one.hf, one.hi) == (other.hf, other.lo) and all(
        (a.param, a.start + one.count) == (b.param, b.start)
        for a, b in ((one.source, other.source), (one.target, other.target))
    )


def parcels(transfers: Iterable[Transfer], rank: int) -> tuple[list[Parcel], list[Parcel]]:
    """(outgoing, incoming) of one rank in a round, by peer."""
    outgoing: dict[int, list[Transfer]] = defaultdict(list)
    incoming: dict[int, list[Transfer]] = defaultdict(list)
    for transfer in transfers:
        if transfer.source.rank == rank:
            outgoing[transfer.target.rank].append(transfer)
        if transfer.target.rank == rank:
            incoming[transfer.source.rank].append(transfer)
    sent, got = ([Parcel(peer, tuple(mine)) for peer, mine in sorted(side.items())] for side in (outgoing, incoming))
    return sent, got
