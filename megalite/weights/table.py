"""The weight table: which range of which Hugging Face tensor is which range of which local parameter.

`owned(config, layout, rank)` is the only shard arithmetic in the project. Loading reads its ranges, export copies them
back, resharding (on disk or between processes) intersects the ranges of two layouts. Ranges are in Hugging Face
coordinates, along one dimension of the stored tensor, and values are never changed. Importable without torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from megalite.core.layout import Even, KVHeads, Layout, QueryHeads, Split, Whole, share, width
from megalite.model.config import ModelConfig, MoESpec
from megalite.model.families import TensorRef, weight_names


@dataclass(frozen=True, slots=True)
class ExpertPlace:
    """Which expert a piece belongs to; a rank holds it if it holds that expert."""

    index: int
    num_experts: int
    rows: int
    """Rows of the local parameter that one expert takes."""

    def start(self, tp: int, tp_rank: int) -> int | None:
        """First row of this expert in the local parameter; None if it is on another rank."""
        lo, hi = share(self.num_experts, tp, tp_rank)
        return (self.index - lo) * self.rows if lo <= self.index < hi else None


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
    expert: ExpertPlace | None = None

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
        if self.expert is None:
            return start
        first = self.expert.start(tp, tp_rank)
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
    tensors = weight_names(config).tensors
    vocab, hidden = Even(config.vocab_size), config.hidden_size
    table = _Table(stage="first")
    table.add(tensors["embed"], "embed.tokens.weight", vocab, hidden)
    table.add(tensors["positions"], "embed.positions", config.max_position_embeddings, hidden)
    for layer in range(config.num_layers):
        table.rows += _layer_pieces(config, layer)
    table.stage = "last"
    table.add(tensors["final_norm"], "norm.weight", hidden)
    table.add(tensors["final_norm_bias"], "norm.bias", hidden)
    table.add(tensors["embed"] if config.tie_embeddings else tensors["lm_head"], "head.weight", vocab, hidden)
    return tuple(table.rows)


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


class _Table:
    """Collects pieces of one stage; a source of None means that the family has no such weight."""

    def __init__(self, stage: int | Literal["first", "last"]):
        self.stage = stage
        self.rows: list[Piece] = []

    def add(
        self,
        source: TensorRef | None,
        param: str,
        cut: Split | int,
        *other: int,
        dim: int = 0,
        before: tuple[Split, ...] = (),
        expert: ExpertPlace | None = None,
    ) -> None:
        """A vector, or a matrix whose other dim is given. `cut`: over tp ranks; a number is not cut."""
        if source is None:
            return
        hf = source.hf
        if "{" in hf:
            hf = hf.format(layer=self.stage, expert=expert.index if expert else None)
        split = Whole(cut) if isinstance(cut, int) else cut
        piece = Piece(hf, param, self.stage, dim, split, other, before, source.start, source.transpose, expert)
        self.rows.append(piece)


def _layer_pieces(config: ModelConfig, layer: int) -> list[Piece]:
    tensors = weight_names(config).tensors
    hidden, head = config.hidden_size, config.head_dim
    queries = QueryHeads(config.num_heads, config.num_kv_heads, head)
    keys = KVHeads(config.num_kv_heads, head)
    prefix = f"layers.{layer}"
    table = _Table(stage=layer)
    for source, bias, name in (
        (tensors["attn_norm"], tensors["attn_norm_bias"], "attn_norm"),
        (tensors["post_attn_norm"], None, "post_attn_norm"),
        (tensors["mlp_norm"], tensors["mlp_norm_bias"], "mlp_norm"),
        (tensors["post_mlp_norm"], None, "post_mlp_norm"),
    ):
        table.add(source, f"{prefix}.{name}.weight", hidden)
        table.add(bias, f"{prefix}.{name}.bias", hidden)
    before: tuple[Split, ...] = ()
    for source, bias, split in (
        (tensors["q"], tensors["q_bias"], queries),
        (tensors["k"], tensors["k_bias"], keys),
        (tensors["v"], tensors["v_bias"], keys),
    ):
        table.add(source, f"{prefix}.attn.qkv.weight", split, hidden, before=before)
        table.add(bias, f"{prefix}.attn.qkv.bias", split, before=before)
        before = (*before, split)
    table.add(tensors["q_norm"], f"{prefix}.attn.q_norm.weight", head)
    table.add(tensors["k_norm"], f"{prefix}.attn.k_norm.weight", head)
    table.add(tensors["attn_out"], f"{prefix}.attn.out.weight", queries, hidden, dim=1)
    table.add(tensors["attn_out_bias"], f"{prefix}.attn.out.bias", hidden)
    moe = config.moe[layer]
    if moe is None:
        _mlp_pieces(config, table, f"{prefix}.mlp")
    else:
        _moe_pieces(config, moe, table, f"{prefix}.mlp")
    return table.rows


def _mlp_pieces(config: ModelConfig, table: _Table, prefix: str) -> None:
    tensors = weight_names(config).tensors
    inner, hidden = Even(config.intermediate_size), config.hidden_size
    before: tuple[Split, ...] = ()
    if config.gated_mlp:
        table.add(tensors["gate"], f"{prefix}.up.weight", inner, hidden)
        table.add(tensors["gate_bias"], f"{prefix}.up.bias", inner)
        before = (inner,)
    table.add(tensors["up"], f"{prefix}.up.weight", inner, hidden, before=before)
    table.add(tensors["up_bias"], f"{prefix}.up.bias", inner, before=before)
    table.add(tensors["down"], f"{prefix}.down.weight", inner, hidden, dim=1)
    table.add(tensors["down_bias"], f"{prefix}.down.bias", hidden)


def _moe_pieces(config: ModelConfig, moe: MoESpec, table: _Table, prefix: str) -> None:
    tensors, hidden = weight_names(config).tensors, config.hidden_size
    table.add(tensors["router"], f"{prefix}.router", moe.num_experts, hidden)
    inner = moe.intermediate_size
    for index in range(moe.num_experts):
        up = ExpertPlace(index, moe.num_experts, 2 * inner)
        down = ExpertPlace(index, moe.num_experts, hidden)
        table.add(tensors["expert_gate"], f"{prefix}.up", inner, hidden, expert=up)
        table.add(tensors["expert_up"], f"{prefix}.up", inner, hidden, before=(Whole(inner),), expert=up)
        table.add(tensors["expert_down"], f"{prefix}.down", hidden, inner, expert=down)
