"""The weight table: which range of which Hugging Face tensor is which range of which local parameter.

`owned(config, layout, rank)` is the only shard arithmetic in the project. Loading reads its ranges, export copies them
back, resharding (on disk or between processes) intersects the ranges of two layouts. Ranges are in Hugging Face
coordinates, along one dimension of the stored tensor, and values are never changed. Which weights a layer has its kinds
say (`model/kinds`), how they are called its family. Importable without torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from megalite.core.layout import Layout, Split, width
from megalite.model.config import ModelConfig
from megalite.model.families import WeightNames, weight_names
from megalite.model.kinds.base import Place, Row


@dataclass(frozen=True, slots=True)
class Piece:
    """One Hugging Face tensor, or a part of a fused one, and its place in a local parameter.

    Row `hf_start + i` of the tensor (column, if `transpose`d or `dim` is 1) is element `i` of `split`.
    """

    hf: str
    param: str
    stage: int | Literal["first", "last"]
    """Global layer index, or the end of the pipeline it is on."""
    dim: int
    """Dimension of the local parameter along which ranges are counted."""
    split: Split
    other: tuple[int, ...]
    """Sizes of the remaining dimensions: () for a vector, (columns,) or (rows,) for a matrix."""
    before: tuple[Split, ...] = ()
    """What precedes this piece in a stacked local parameter."""
    hf_start: int = 0
    transpose: bool = False
    """The file holds the matrix as [in, out]."""
    expert: int | None = None
    """Index of the expert whose weight it is."""
    place: Place | None = None
    """The unit it belongs to, where only the rank that holds that unit has it."""
    linear: bool = False
    """The matrix of a linear map, in the format that linears have."""

    @property
    def hf_dim(self) -> int:
        """Dimension of the stored tensor along which ranges are counted."""
        return 1 - self.dim if self.transpose else self.dim

    @property
    def row(self) -> int:
        """Elements of one index along `dim`."""
        return math.prod(self.other)

    def local_start(self, tp: int, tp_rank: int) -> int | None:
        """Offset in the local parameter along `dim`; None if this tp rank has no part of it."""
        start = sum(width(split, tp, tp_rank) for split in self.before)
        if self.place is None:
            return start
        first = self.place.start(tp, tp_rank)
        return None if first is None else first + start

    def as_stored(self) -> Range:
        """All of the piece, where it lies in the Hugging Face tensor."""
        return Range(self, self.hf_start, self.hf_start + self.split.total, self.hf_start, self.hf_dim)


@dataclass(frozen=True, slots=True)
class Range:
    """Indices lo..hi of a piece, counted along `piece.hf_dim` of the Hugging Face tensor, and their place in a tensor.

    That tensor is a local parameter, or the Hugging Face tensor itself.
    """

    piece: Piece
    lo: int
    hi: int
    start: int
    """Where the range begins in that tensor, along `dim`."""
    dim: int

    @property
    def count(self) -> int:
        return self.hi - self.lo

    @property
    def elements(self) -> int:
        return self.count * self.piece.row

    def cut(self, lo: int, hi: int) -> Range:
        """The part of it that is lo..hi."""
        return replace(self, lo=lo, hi=hi, start=self.start + lo - self.lo)

    def __str__(self) -> str:
        return f"{self.piece.hf} {'columns' if self.piece.hf_dim else 'rows'} {self.lo}..{self.hi}"


@lru_cache(maxsize=8)
def pieces(config: ModelConfig) -> tuple[Piece, ...]:
    """Every weight of the model once for each place it is used in (a tied embedding: twice)."""
    names = weight_names(config)
    found = _pieces(names, config.first_rows(), "first")
    for layer in range(config.num_layers):
        found += _pieces(names, config.layer_rows(layer), layer)
    return tuple(found + _pieces(names, config.last_rows(), "last"))


def _pieces(names: WeightNames, rows: list[Row], stage: int | Literal["first", "last"]) -> list[Piece]:
    """The rows of one stage with their places in the checkpoint: those of one tensor lie in it in their order."""
    prefix = f"layers.{stage}." if isinstance(stage, int) else ""
    ends: dict[str, int] = {}
    found = []
    for row in rows:
        source = names.tensors[row.weight]
        hf = source.hf.format(layer=stage, expert=row.expert) if "{" in source.hf else source.hf
        start = ends.get(hf, 0)
        ends[hf] = start + row.split.total
        piece = Piece(
            hf=hf,
            param=prefix + row.param,
            stage=stage,
            dim=row.dim,
            split=row.split,
            other=row.other,
            before=row.before,
            hf_start=start,
            transpose=source.transpose,
            expert=row.expert,
            place=row.place,
            linear=row.linear,
        )
        found.append(piece)
    return found


def owned(config: ModelConfig, layout: Layout, rank: int) -> Iterator[Range]:
    """The ranges that global `rank` of `layout` holds, in the order of `pieces`; empty ranges are left out."""
    place = layout.coord(rank)
    layers = layout.layers(place.pp, config.layer_costs())
    here = {*layers, *["first"] * (place.pp == 0), *["last"] * (place.pp == layout.pp - 1)}
    for piece in pieces(config):
        if piece.stage not in here:
            continue
        if piece.param == "head.weight" and config.tie_embeddings and layout.pp == 1:
            continue  # one parameter serves as both
        start = piece.local_start(layout.tp, place.tp)
        lo, hi = piece.split.range(layout.tp, place.tp)
        if start is not None and lo < hi:
            yield Range(piece, piece.hf_start + lo, piece.hf_start + hi, start, piece.dim)


def hf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape that each Hugging Face tensor of the model must have, as stored."""
    shapes: dict[str, tuple[int, ...]] = {}
    for piece in pieces(config):
        extent = piece.hf_start + piece.split.total
        if piece.hf in shapes:  # another part of a fused tensor
            extent = max(extent, shapes[piece.hf][piece.hf_dim])
        shape = list(piece.other)
        shape.insert(piece.hf_dim, extent)
        shapes[piece.hf] = tuple(shape)
    return shapes


def expected(config: ModelConfig, layout: Layout, rank: int) -> dict[str, tuple[tuple[int, ...], list[Range]]]:
    """Shape of each local parameter that `rank` stores, and the ranges it is made of, in the order they lie in it.

    Parameters of which this rank has nothing are left out.
    """
    ranges: dict[str, list[Range]] = {}
    for one in owned(config, layout, rank):
        ranges.setdefault(one.piece.param, []).append(one)
    found = {}
    for name, mine in ranges.items():
        mine.sort(key=lambda one: one.start)
        piece, end = mine[0].piece, 0
        for one in mine:
            same = (one.piece.dim, one.piece.other) == (piece.dim, piece.other)
            assert one.start == end and same, f"the weight table leaves a gap in {name}"
            end += one.count
        assert piece.dim == 0 or len(mine) == 1, f"{name}: ranges along dim 1 would not lie one after another"
        shape = list(piece.other)
        shape.insert(piece.dim, end)
        found[name] = (tuple(shape), mine)
    return found


def local_elements(config: ModelConfig, layout: Layout, rank: int) -> int:
    """Parameters that `rank` holds."""
    return sum(part.elements for part in owned(config, layout, rank))
