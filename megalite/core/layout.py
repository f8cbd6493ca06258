"""The process grid and how weights are cut over it: pure arithmetic, importable without torch.

`Layout` maps ranks to coordinates (dp, pp, tp) and layers to pipeline stages. A `Split` cuts one dimension of a weight
over the tp ranks. Layers size themselves and the weight table cuts checkpoints with these same objects, so there is one
definition of every shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Literal, Protocol

AxisName = Literal["tp", "pp", "dp"]


@dataclass(frozen=True, kw_only=True)
class Coord:
    """Coordinates of a rank in its layout: tensor-parallel rank, pipeline stage, replica."""

    tp: int
    pp: int
    dp: int


@dataclass(frozen=True, kw_only=True)
class LayerCosts:
    """Cost of each layer by which pipeline stages are balanced, in any one unit (parameters, bytes, seconds)."""

    layers: tuple[int, ...]
    first: int = 0
    """Extra cost of the first stage: the embedding."""
    last: int = 0
    """Extra cost of the last stage: the final norm and the lm_head."""


@dataclass(frozen=True)
class Layout:
    """A grid of tp * pp * dp ranks: dp replicas of the model, each of pp pipeline stages of tp tensor-parallel ranks.

    Global rank = first_rank + (dp rank * pp + stage) * tp + tp rank: tp varies fastest, a replica is a block of
    tp * pp consecutive ranks. The layers are cut into pp * interleave chunks of consecutive layers; stage s has chunks
    s, s + pp, s + 2 pp, ... (arXiv 2104.04473, section 2.2: more chunks shorten the idle time of pipelined training).
    `stages`: how many layers each stage has, in order; empty: as costs say. ValueError for a size below 1, interleave
    without pp, or `stages` that are not one number a stage, or interleaved.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    first_rank: int = 0
    interleave: int = 1
    stages: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "dp", "interleave"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.interleave > 1 and self.pp == 1:
            raise ValueError(f"interleave={self.interleave} needs more than one pipeline stage")
        if self.stages and (len(self.stages) != self.pp or min(self.stages) < 1 or self.interleave > 1):
            raise ValueError(f"layers of {self.pp} stages that are not interleaved, at least 1 each: {self.stages}")

    @property
    def size(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.tp, self.pp, self.dp

    @property
    def ranks(self) -> range:
        """The global ranks of this layout."""
        return range(self.first_rank, self.first_rank + self.size)

    def coord(self, rank: int) -> Coord:
        """Coordinates of global `rank`; ValueError if it is not part of this layout."""
        if rank not in self.ranks:
            raise ValueError(f"rank {rank} is not in {self}")
        index = rank - self.first_rank
        return Coord(tp=index % self.tp, pp=index // self.tp % self.pp, dp=index // (self.tp * self.pp))

    def rank(self, *, tp: int = 0, pp: int = 0, dp: int = 0) -> int:
        """Global rank at these coordinates; the inverse of `coord`."""
        return self.first_rank + (dp * self.pp + pp) * self.tp + tp

    @property
    def control_ranks(self) -> list[int]:
        """The rank of each replica that samples for it: tp rank 0 of its last stage."""
        return [self.rank(pp=self.pp - 1, dp=dp) for dp in range(self.dp)]

    def groups(self, axis: AxisName) -> list[tuple[int, ...]]:
        """The ranks along `axis` for each combination of the other two coordinates, in rank order."""
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
        """Global layer indices of each chunk of `stage`.

        Contiguous layers, at least one, as many as `stages` says or such that the most expensive chunk is as cheap as
        possible. ValueError if there are fewer layers than chunks, or not as many as `stages` has.
        """
        if self.stages:
            ends = list(accumulate(self.stages, initial=0))
            if ends[-1] != len(costs.layers):
                raise ValueError(f"{self.stages} are {ends[-1]} layers, the model has {len(costs.layers)}")
            return (range(ends[stage], ends[stage + 1]),)
        return _cut(costs, self.pp * self.interleave)[stage :: self.pp]

    def layers(self, stage: int, costs: LayerCosts) -> Sequence[int]:
        """Global indices of all layers on `stage`, ascending; a range unless chunks are interleaved."""
        chunks = self.chunks(stage, costs)
        return chunks[0] if len(chunks) == 1 else tuple(layer for chunk in chunks for layer in chunk)

    def __str__(self) -> str:
        shifted = f",first_rank={self.first_rank}" if self.first_rank else ""
        interleaved = f",interleave={self.interleave}" if self.interleave > 1 else ""
        by_hand = f",layers={list(self.stages)}".replace(" ", "") if self.stages else ""
        return f"tp={self.tp},pp={self.pp},dp={self.dp}{shifted}{interleaved}{by_hand}"


@lru_cache(maxsize=256)
def _cut(costs: LayerCosts, parts: int) -> tuple[range, ...]:
    """Contiguous parts whose largest cost is least; ties prefer short early parts (they hold more in flight)."""
    count = len(costs.layers)
    if parts > count:
        raise ValueError(f"{parts} pipeline stages need at least as many layers, the model has {count}")
    prefix = list(accumulate(costs.layers, initial=0))

    def part_cost(part: int, start: int, end: int) -> int:
        ends = (costs.first if part == 0 else 0) + (costs.last if part == parts - 1 else 0)
        return prefix[end] - prefix[start] + ends

    # best[end] = (largest cost so far, cuts) for the parts up to the current one holding layers[:end]
    best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}
    for part in range(parts):
        best = {
            end: min(
                (max(c, part_cost(part, start, end)), (*cuts, end)) for start, (c, cuts) in best.items() if start < end
            )
            for end in range(part + 1, count - (parts - part - 1) + 1)
        }
    cuts = (0, *best[count][1])
    return tuple(range(start, end) for start, end in zip(cuts, cuts[1:], strict=False))


def share(units: int, parts: int, index: int) -> tuple[int, int]:
    """Half-open range of `units` that part `index` of `parts` gets; sizes differ by at most one, larger ones first."""
    size, rest = divmod(units, parts)
    start = index * size + min(index, rest)
    return start, start + size + (index < rest)


class Split(Protocol):
    """How one dimension of a weight is cut over the tp ranks. Ranges are in elements of that dimension."""

    @property
    def total(self) -> int:
        """Elements of the uncut dimension."""

    def range(self, parts: int, index: int) -> tuple[int, int]:
        """Half-open range that tp rank `index` of `parts` holds; may be empty, and overlaps others' if replicated."""


@dataclass(frozen=True)
class Even:
    """Contiguous shares of whole units of `unit` elements, as equal as possible; parts beyond the units get nothing."""

    units: int
    unit: int = 1

    @property
    def total(self) -> int:
        return self.units * self.unit

    def range(self, parts: int, index: int) -> tuple[int, int]:
        lo, hi = share(self.units, parts, index)
        return lo * self.unit, hi * self.unit


@dataclass(frozen=True)
class Groups:
    """As `Even`, of elements that are cut only in groups of `unit`, of which the last may be shorter."""

    total: int
    unit: int

    def range(self, parts: int, index: int) -> tuple[int, int]:
        lo, hi = share(-(-self.total // self.unit), parts, index)
        return min(lo * self.unit, self.total), min(hi * self.unit, self.total)


@dataclass(frozen=True)
class InUnits:
    """A split counted in units of so many elements, of which the last may be shorter; it is cut only between units."""

    split: Split
    unit: int

    @property
    def total(self) -> int:
        return -(-self.split.total // self.unit)

    def range(self, parts: int, index: int) -> tuple[int, int]:
        lo, hi = self.split.range(parts, index)
        return -(-lo // self.unit), -(-hi // self.unit)

    def fits(self, parts: int) -> bool:
        """Whether every cut lies between units."""
        cuts = {cut for index in range(parts) for cut in self.split.range(parts, index)}
        return all(cut % self.unit == 0 or cut == self.split.total for cut in cuts)


@dataclass(frozen=True)
class Whole:
    """Not cut: every tp rank holds all of it."""

    total: int

    def range(self, parts: int, index: int) -> tuple[int, int]:
        return 0, self.total


@dataclass(frozen=True)
class KVHeads:
    """Key or value heads in balanced shares of whole heads; more parts than heads hold one head each (replication)."""

    kv_heads: int
    head_dim: int

    @property
    def total(self) -> int:
        return self.kv_heads * self.head_dim

    def heads(self, parts: int, index: int) -> tuple[int, int]:
        """Half-open range of KV heads on part `index`."""
        if parts > self.kv_heads:
            head = index * self.kv_heads // parts
            return head, head + 1
        return share(self.kv_heads, parts, index)

    def range(self, parts: int, index: int) -> tuple[int, int]:
        lo, hi = self.heads(parts, index)
        return lo * self.head_dim, hi * self.head_dim


@dataclass(frozen=True)
class QueryHeads:
    """Query heads, each on a part that holds its KV head, and equally many to each KV head of a part.

    With at most as many parts as KV heads a part has whole groups (the query heads of a KV head). With more, the parts
    that hold one KV head share its group; a part may then have no query heads.
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
    """Elements of a split that part `index` of `parts` holds."""
    lo, hi = split.range(parts, index)
    return hi - lo
