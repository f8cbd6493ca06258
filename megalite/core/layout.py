"""Where each rank sits and what it holds: pure arithmetic, importable without torch.

`Layout` places ranks on the (dp, pp, tp) grid, tp fastest. The `Split` classes say how one dimension of a weight is
cut over a tp axis. Layers size themselves and the weight table cuts checkpoints with these same objects, so there is
one definition of every shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol

AxisName = Literal["tp", "pp", "dp"]


@dataclass(frozen=True, kw_only=True)
class Coord:
    """A rank's place in its layout."""

    tp: int
    pp: int
    dp: int


@dataclass(frozen=True, kw_only=True)
class LayerCosts:
    """What the stages of a pipeline have to carry, in any one unit (parameters, bytes, seconds)."""

    layers: tuple[int, ...]
    first: int = 0
    """Extra cost of the first stage: the embedding."""
    last: int = 0
    """Extra cost of the last stage: the final norm and the lm_head."""


@dataclass(frozen=True)
class Layout:
    """`tp * pp * dp` ranks starting at global rank `first_rank`; a replica is one tp x pp block.

    The layers are cut into `pp * interleave` chunks in order, dealt out to the stages in turn: chunk c of stage s is
    the (c * pp + s)-th. Several a stage shorten the idle time of pipelined training (arXiv 2104.04473, section 2.2).
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    first_rank: int = 0
    interleave: int = 1

    def __post_init__(self):
        for name in ("tp", "pp", "dp", "interleave"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.interleave > 1 and self.pp == 1:
            raise ValueError(f"interleave={self.interleave} needs more than one pipeline stage")

    @property
    def size(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def ranks(self) -> range:
        """The global ranks of this layout."""
        return range(self.first_rank, self.first_rank + self.size)

    def coord(self, rank: int) -> Coord:
        """Place of global `rank`; ValueError if it is not part of this layout."""
        if rank not in self.ranks:
            raise ValueError(f"rank {rank} is not in {self}")
        index = rank - self.first_rank
        return Coord(tp=index % self.tp, pp=index // self.tp % self.pp, dp=index // (self.tp * self.pp))

    def rank(self, *, tp: int = 0, pp: int = 0, dp: int = 0) -> int:
        """Global rank at a place; the inverse of `coord`."""
        return self.first_rank + (dp * self.pp + pp) * self.tp + tp

    @property
    def control_ranks(self) -> list[int]:
        """Of each replica the rank that samples for it: the first of its last stage."""
        return [self.rank(pp=self.pp - 1, dp=dp) for dp in range(self.dp)]

    def groups(self, axis: AxisName) -> list[tuple[int, ...]]:
        """The rank tuples along `axis`, one for each combination of the other two, in rank order."""
        groups: dict[tuple[int, int], list[int]] = {}
        for rank in self.ranks:
            place = self.coord(rank)
            others = tuple(getattr(place, name) for name in ("dp", "pp", "tp") if name != axis)
            groups.setdefault(others, []).append(rank)
        return [tuple(ranks) for ranks in groups.values()]

    def replicas(self) -> list[tuple[int, ...]]:
        """The ranks of each replica."""
        block = self.tp * self.pp
        return [tuple(self.ranks[i * block : (i + 1) * block]) for i in range(self.dp)]

    def chunks(self, stage: int, costs: LayerCosts) -> tuple[range, ...]:
        """Global indices of the layers of each chunk of `stage`: at least one, the dearest chunk as cheap as can be."""
        return _cut(costs, self.pp * self.interleave)[stage :: self.pp]

    def layers(self, stage: int, costs: LayerCosts) -> Sequence[int]:
        """Global indices of all layers on `stage`, in order; a range unless chunks are interleaved."""
        chunks = self.chunks(stage, costs)
        return chunks[0] if len(chunks) == 1 else tuple(layer for chunk in chunks for layer in chunk)

    def __str__(self) -> str:
        shifted = f",first_rank={self.first_rank}" if self.first_rank else ""
        interleaved = f",interleave={self.interleave}" if self.interleave > 1 else ""
        return f"tp={self.tp},pp={self.pp},dp={self.dp}{shifted}{interleaved}"


@lru_cache(maxsize=256)
def _cut(costs: LayerCosts, parts: int) -> tuple[range, ...]:
    """The contiguous cut that minimises the dearest part; ties prefer short early parts (they hold more in flight)."""
    count = len(costs.layers)
    if parts > count:
        raise ValueError(f"{parts} pipeline stages need at least as many layers, the model has {count}")
    prefix = [0]
    for cost in costs.layers:
        prefix.append(prefix[-1] + cost)

    def part_cost(part: int, start: int, end: int) -> int:
        ends = (costs.first if part == 0 else 0) + (costs.last if part == parts - 1 else 0)
        return prefix[end] - prefix[start] + ends

    # best[end] = (dearest part so far, cuts) for the parts up to the current one holding layers[:end]
    best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}
    for part in range(parts):
        reach: dict[int, tuple[int, tuple[int, ...]]] = {}
        for end in range(part + 1, count - (parts - part - 1) + 1):
            reach[end] = min(
                (max(cost, part_cost(part, start, end)), (*cuts, end))
                for start, (cost, cuts) in best.items()
                if start < end
            )
        best = reach
    cuts = (0, *best[count][1])
    return tuple(range(start, end) for start, end in zip(cuts, cuts[1:], strict=False))


def share(units: int, parts: int, index: int) -> tuple[int, int]:
    """Half-open range of `units` that part `index` of `parts` gets: contiguous, sizes differ by at most one."""
    size, rest = divmod(units, parts)
    start = index * size + min(index, rest)
    return start, start + size + (index < rest)


class Split(Protocol):
    """How one dimension is cut over a tp axis; ranges are in elements of that dimension."""

    @property
    def total(self) -> int:
        """Elements of the uncut dimension."""

    def range(self, parts: int, index: int) -> tuple[int, int]:
        """Half-open range of the uncut dimension on part `index` of `parts`; may be empty, may overlap."""


@dataclass(frozen=True)
class Even:
    """Whole units in balanced contiguous shares; parts beyond the units get nothing."""

    units: int
    unit: int = 1

    @property
    def total(self) -> int:
        return self.units * self.unit

    def range(self, parts: int, index: int) -> tuple[int, int]:
        lo, hi = share(self.units, parts, index)
        return lo * self.unit, hi * self.unit


@dataclass(frozen=True)
class Whole:
    """Not cut: every part holds all of it."""

    total: int

    def range(self, parts: int, index: int) -> tuple[int, int]:
        return 0, self.total


@dataclass(frozen=True)
class KVHeads:
    """Key/value heads: balanced shares, or with more parts than heads one head on each part (replication)."""

    kv_heads: int
    head_dim: int

    @property
    def total(self) -> int:
        return self.kv_heads * self.head_dim

    def heads(self, parts: int, index: int) -> tuple[int, int]:
        if parts > self.kv_heads:
            head = index * self.kv_heads // parts
            return head, head + 1
        return share(self.kv_heads, parts, index)

    def range(self, parts: int, index: int) -> tuple[int, int]:
        lo, hi = self.heads(parts, index)
        return lo * self.head_dim, hi * self.head_dim


@dataclass(frozen=True)
class QueryHeads:
    """Query heads follow the key/value head they attend to, so each part has the same number of queries per key head.

    With at most as many parts as KV heads, a part has whole groups. With more, the parts that hold one KV head share
    its group of query heads; a part may then end up with none.
    """

    heads: int
    kv_heads: int
    head_dim: int

    @property
    def total(self) -> int:
        return self.heads * self.head_dim

    def range(self, parts: int, index: int) -> tuple[int, int]:
        group = self.heads // self.kv_heads
        kv = KVHeads(self.kv_heads, self.head_dim)
        lo, hi = kv.heads(parts, index)
        if parts <= self.kv_heads:
            return lo * group * self.head_dim, hi * group * self.head_dim
        holders = [part for part in range(parts) if kv.heads(parts, part)[0] == lo]
        first, last = share(group, len(holders), index - holders[0])
        return (lo * group + first) * self.head_dim, (lo * group + last) * self.head_dim


def width(split: Split, parts: int, index: int) -> int:
    """Elements that part `index` holds."""
    lo, hi = split.range(parts, index)
    return hi - lo
