"""The weight table: which range of which Hugging Face tensor is which range of which local parameter.

`owned(config, layout, rank)` is the only shard arithmetic in the project. Loading reads its ranges, export copies them
back, resharding (on disk or between processes) intersects the ranges of two layouts. Ranges are in Hugging Face
coordinates, along one dimension of the stored tensor, and values are never changed. The kinds of a layer say which
weights it has (`model/kinds`), the family how these are called, and the format which tensors store a weight
(`core.formats`). Importable without torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Union

from megalite.core.formats import ALL, Part, Stage, WeightFormat
from megalite.core.layout import Even, InUnits, Layout, Split, Whole, width
from megalite.errors import ConfigError, Problem
from megalite.model.config import ModelConfig
from megalite.model.families import WeightNames, weight_names
from megalite.model.kinds.base import Place, Row
from megalite.weights.dtypes import DTYPE_BYTES

if TYPE_CHECKING:
    from megalite.weights.adapter_table import AdapterTable


@dataclass(frozen=True, slots=True)
class Piece:
    """One Hugging Face tensor, or a part of a fused one, and its place in a local parameter.

    Row `hf_start + i` of the tensor (column, if `transpose`d or `dim` is 1) is element `i` of `split`.
    """

    hf: str
    param: str
    stage: Stage
    dim: int
    """Dimension of the local parameter along which ranges are counted."""
    split: Split
    other: tuple[int, ...]
    """Sizes of the remaining dimensions: () for a vector, (columns,) or (rows,) for a matrix."""
    before: tuple[Split, ...] = ()
    """The splits of what precedes this piece in a stacked local parameter."""
    hf_start: int = 0
    transpose: bool = False
    """The file holds the matrix as [in, out]."""
    expert: int | None = None
    """Index of the expert whose weight it is."""
    place: Place | None = None
    """The unit it belongs to, where only the rank that holds that unit has it."""
    linear: bool = False
    """The matrix of a linear map."""
    stored: tuple[int, ...] = ()
    """Shape of the stored tensor where it has more dimensions; see `Row`."""
    part: Part | None = None
    """Which of the tensors of a quantized weight it is; None: a weight of plain numbers."""
    format: WeightFormat | None = None
    """Format of that quantized weight."""
    weight: str = ""
    """Tensor name that the quantized weight would have if it were stored as plain numbers."""
    spread: tuple[float, float] | None = None
    """See `Row`, also for `std` and `exact`."""
    std: float | None = None
    exact: bool = False
    numbers: int = 1
    """Numbers of the weight that one element stands for; 0 for scales and the like."""

    @property
    def keeps_dtype(self) -> bool:
        """Whether it keeps its stored dtype where the model's numbers are converted."""
        return self.part is not None or self.exact

    def itemsize(self, itemsize: int) -> int:
        """Bytes of an element in memory, where the model's numbers take `itemsize`."""
        if self.part is None:
            return 4 if self.exact else itemsize
        return 4 if self.part.is_float else DTYPE_BYTES[self.part.dtypes[0]]

    @property
    def hf_dim(self) -> int:
        """Dimension of the stored tensor along which ranges are counted."""
        return 1 - self.dim if self.transpose else self.dim

    def shape(self, dim: int, size: int) -> tuple[int, ...]:
        """Shape of a tensor of this piece that has `size` indices along `dim`."""
        return (*self.other[:dim], size, *self.other[dim:])

    @property
    def row(self) -> int:
        """Number of elements at one index along `dim`."""
        return math.prod(self.other)

    def local_start(self, tp: int, tp_rank: int) -> int | None:
        """Offset in the local parameter along `dim`; None if this tp rank has no part of it."""
        start = sum(width(split, tp, tp_rank) for split in self.before)
        if self.place is None:
            return start
        first = self.place.start(tp, tp_rank)
        return None if first is None else first + start

    def as_stored(self) -> Range:
        """The whole piece as a range of its Hugging Face tensor."""
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


Weights = Union[ModelConfig, "AdapterTable"]
"""What a table lists the weights of: a model, or adapters beside one."""


@lru_cache(maxsize=8)
def pieces(config: Weights) -> tuple[Piece, ...]:
    """Every weight of the model once for each place it is used in (a tied embedding: twice)."""
    if not isinstance(config, ModelConfig):
        return config.pieces()
    names = weight_names(config)
    found = _pieces(config, names, config.first_rows(), "first")
    for layer in range(config.num_layers):
        found += _pieces(config, names, config.layer_rows(layer), layer)
    return tuple(found + _pieces(config, names, config.last_rows(), "last"))


def _pieces(config: ModelConfig, names: WeightNames, rows: list[Row], stage: Stage) -> list[Piece]:
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
            stored=row.stored,
            spread=row.spread,
            std=row.std,
            exact=row.exact,
        )
        format = config.format(stage, row.weight)
        found += [piece] if format is None else [_stored(piece, format, part) for part in format.parts]
    return found


def param_of(param: str, part: Part) -> str:
    """Name of the parameter, or of the stored tensor, that holds one part of a quantized weight."""
    return f"{param.removesuffix('weight')}{part.name}" if param.endswith(".weight") else f"{param}_{part.name}"


def _shape_of(part: Part, stored: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a part's tensor, for stacked weights of shape `stored`."""
    if not stored:
        return ()
    *stacked, rows, columns = stored
    width = part.width(columns)
    return (*stacked, part.height(rows), *((width // part.folded, part.folded) if part.folded else (width,)))


def _stored(piece: Piece, format: WeightFormat, part: Part) -> Piece:
    """One of the tensors that make the weight of a piece, cut where the weight is cut."""
    is_codes = part == format.parts[0]
    found = replace(
        piece,
        hf=param_of(piece.hf, part),
        param=param_of(piece.param, part),
        weight=piece.hf,
        stored=_shape_of(part, piece.stored),
        hf_start=piece.hf_start // part.rows if part.rows else 0,
        transpose=part.turned,
        part=part,
        format=format,
        numbers=(part.rows or 1) * (part.columns or 1) if is_codes else 0,
    )
    return _cut_by_columns(found, part) if piece.dim == 1 else _cut_by_rows(found, part)


def _cut_by_rows(piece: Piece, part: Part) -> Piece:
    """The tensor of a weight whose rows are cut, or belong to a unit that is on one rank."""
    (columns,) = piece.other

    def cut(split: Split) -> Split:
        if part.rows is None:
            return Whole(part.width(columns))
        if part.rows == ALL:
            return Whole(part.entries)
        return split if part.rows == 1 else InUnits(split, part.rows)

    place = piece.place
    if place is not None:
        assert isinstance(place.split, Even)
        unit = place.unit // piece.split.total * cut(piece.split).total
        place = Place(Even(place.split.units, unit), place.index, unit)
    other = () if part.columns is None or part.rows is None else (part.width(columns),)
    return replace(piece, split=cut(piece.split), before=tuple(map(cut, piece.before)), other=other, place=place)


def _cut_by_columns(piece: Piece, part: Part) -> Piece:
    """The tensor of a weight whose columns are cut."""
    (rows,) = piece.other
    if part.columns is None:
        return replace(piece, dim=0, split=Whole(part.entries), other=())
    split = piece.split
    if part.whole or part.columns == ALL:
        split = Whole(part.width(split.total))
    elif part.columns > 1:
        split = InUnits(split, part.columns)
    if part.rows is None:
        return replace(piece, dim=0, split=split, other=())
    return replace(piece, split=split, other=(part.height(rows),))


def owned(config: Weights, layout: Layout, rank: int) -> Iterator[Range]:
    """The ranges that global `rank` of `layout` holds, in the order of `pieces`; empty ranges are left out."""
    if config.quantization is not None:
        check_cuts(config, layout.tp)
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


@lru_cache(maxsize=32)
def check_cuts(config: Weights, tp: int) -> None:
    """ConfigError where tp ranks would share what a weight's format keeps together."""
    for piece in pieces(config):
        for split in (piece.split, *piece.before):
            if isinstance(split, InUnits) and not split.fits(tp):
                kept = f"{split.unit} {'columns' if piece.dim else 'rows'}"
                rule = f"cuts {piece.hf} within {kept} of its weight, which its format keeps together"
                fix = "Use fewer tensor parallel ranks, so that heads and their groups stay whole, and more stages."
                raise ConfigError(Problem(key="parallel.tp", rule=rule, value=tp, fix=fix))


def hf_shapes(config: Weights) -> dict[str, tuple[int, ...]]:
    """Shape that each Hugging Face tensor of the model must have, as stored."""
    shapes: dict[str, tuple[int, ...]] = {}
    for piece in pieces(config):
        extent = piece.hf_start + piece.split.total
        if piece.hf in shapes and not piece.stored:  # another part of a fused tensor
            extent = max(extent, shapes[piece.hf][piece.hf_dim])
        shapes[piece.hf] = piece.stored or piece.shape(piece.hf_dim, extent)
    return shapes


@lru_cache(maxsize=32)
def expected(config: Weights, layout: Layout, rank: int) -> dict[str, tuple[tuple[int, ...], list[Range]]]:
    """Shape of each local parameter that `rank` stores, and the ranges it is made of, in the order they lie in it.

    Kept, so not to be changed. Parameters of which this rank has nothing are left out.
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
        found[name] = (piece.shape(piece.dim, end), mine)
    return found


def local_elements(config: Weights, layout: Layout, rank: int) -> int:
    """Parameters that `rank` holds; a code counts as the numbers that it stands for, scales do not count."""
    return sum(part.elements * part.piece.numbers for part in owned(config, layout, rank))


def local_bytes(config: Weights, layout: Layout, rank: int, itemsize: int) -> int:
    """Bytes that the weights of `rank` take, where the model's numbers take `itemsize`."""
    return sum(part.elements * part.piece.itemsize(itemsize) for part in owned(config, layout, rank))
