"""The weight table: which range of which Hugging Face tensor is which range of which local parameter.

`owned(config, layout, rank)` is the only shard arithmetic in the project. Loading reads its ranges, export copies them
back, resharding (on disk or between processes) intersects the ranges of two layouts. Ranges are in Hugging Face
coordinates, along one dimension of the stored tensor, and values are never changed. Importable without torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from megalite.core.layout import Even, KVHeads, Layout, QueryHeads, Split, Whole, share, width
from megalite.model.config import ModelConfig
from megalite.model.families import Source, weight_names


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

    def local_start(self, tp: int, tp_rank: int) -> int | None:
        """Offset in the local parameter along `dim`; None if this tp rank has no part of it."""
        start = sum(width(split, tp, tp_rank) for split in self.before)
        if self.expert is None:
            return start
        first = self.expert.start(tp, tp_rank)
        return None if first is None else first + start


@dataclass(frozen=True, slots=True)
class Owned:
    """The range of a piece that one rank holds."""

    piece: Piece
    lo: int
    hi: int
    """Half-open range of the stored tensor along `piece.hf_dim`, fused offset included."""
    start: int
    """Where it begins in the local parameter along `piece.dim`."""

    @property
    def elements(self) -> int:
        return (self.hi - self.lo) * math.prod(self.piece.other)


@lru_cache(maxsize=8)
def pieces(config: ModelConfig) -> tuple[Piece, ...]:
    """Every weight of the model once for each place it is used in (a tied embedding: twice)."""
    names = weight_names(config)
    vocab, hidden = Even(config.vocab_size), config.hidden_size
    table = _Table(stage="first")
    table.matrix(names.embed, "embed.tokens.weight", vocab, hidden)
    table.matrix(names.positions, "embed.positions", Whole(config.max_position_embeddings), hidden)
    for layer in range(config.num_layers):
        table.rows += _layer_pieces(config, layer)
    table.stage = "last"
    table.vector(names.final_norm, "norm.weight", hidden)
    table.vector(names.final_norm_bias, "norm.bias", hidden)
    table.matrix(names.embed if config.tie_embeddings else names.lm_head, "head.weight", vocab, hidden)
    return tuple(table.rows)


def owned(config: ModelConfig, layout: Layout, rank: int) -> Iterator[Owned]:
    """The ranges that global `rank` of `layout` holds, in the order of `pieces`; empty ranges are left out."""
    place = layout.coord(rank)
    layers = layout.layers(place.pp, config.layer_costs())
    ends = {"first": place.pp == 0, "last": place.pp == layout.pp - 1}
    for piece in pieces(config):
        if piece.stage not in layers and not ends.get(piece.stage, False):
            continue
        if piece.param == "head.weight" and config.tie_embeddings and layout.pp == 1:
            continue  # one parameter serves as both
        start = piece.local_start(layout.tp, place.tp)
        lo, hi = piece.split.range(layout.tp, place.tp)
        if start is not None and lo < hi:
            yield Owned(piece, piece.hf_start + lo, piece.hf_start + hi, start)


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


def local_elements(config: ModelConfig, layout: Layout, rank: int) -> int:
    """Parameters that `rank` holds."""
    return sum(part.elements for part in owned(config, layout, rank))


class _Table:
    """Collects pieces of one stage; a source of None means that the family has no such weight."""

    def __init__(self, stage: int | Literal["first", "last"]):
        self.stage = stage
        self.rows: list[Piece] = []

    def vector(self, source: Source | None, param: str, size: int) -> None:
        """A vector that every tp rank holds whole."""
        self._add(source, param, 0, Whole(size), ())

    def cut_vector(self, source: Source | None, param: str, split: Split, before: tuple[Split, ...] = ()) -> None:
        self._add(source, param, 0, split, (), before)

    def matrix(
        self, source: Source | None, param: str, split: Split, inputs: int, before: tuple[Split, ...] = (), expert=None
    ) -> None:
        """[split, inputs], cut by rows (outputs)."""
        self._add(source, param, 0, split, (inputs,), before, expert)

    def row_matrix(self, source: Source | None, param: str, outputs: int, split: Split) -> None:
        """[outputs, split], cut by columns (inputs)."""
        self._add(source, param, 1, split, (outputs,))

    def _add(self, source, param, dim, split, other, before=(), expert=None) -> None:
        if source is None:
            return
        hf = source.hf
        if "{" in hf:
            hf = hf.format(layer=self.stage, expert=expert.index if expert else None)
        piece = Piece(hf, param, self.stage, dim, split, other, before, source.start, source.transpose, expert)
        self.rows.append(piece)


def _layer_pieces(config: ModelConfig, layer: int) -> list[Piece]:
    names = weight_names(config)
    hidden, head = config.hidden_size, config.head_dim
    queries = QueryHeads(config.num_heads, config.num_kv_heads, head)
    keys = KVHeads(config.num_kv_heads, head)
    prefix = f"layers.{layer}"
    table = _Table(stage=layer)
    for source, bias, name in (
        (names.attn_norm, names.attn_norm_bias, "attn_norm"),
        (names.post_attn_norm, None, "post_attn_norm"),
        (names.mlp_norm, names.mlp_norm_bias, "mlp_norm"),
        (names.post_mlp_norm, None, "post_mlp_norm"),
    ):
        table.vector(source, f"{prefix}.{name}.weight", hidden)
        table.vector(bias, f"{prefix}.{name}.bias", hidden)
    stacked = ((names.q, names.q_bias, queries, ()), (names.k, names.k_bias, keys, (queries,)))
    stacked += ((names.v, names.v_bias, keys, (queries, keys)),)
    for source, bias, split, before in stacked:
        table.matrix(source, f"{prefix}.attn.qkv.weight", split, hidden, before)
        table.cut_vector(bias, f"{prefix}.attn.qkv.bias", split, before)
    table.vector(names.q_norm, f"{prefix}.attn.q_norm.weight", head)
    table.vector(names.k_norm, f"{prefix}.attn.k_norm.weight", head)
    table.row_matrix(names.attn_out, f"{prefix}.attn.out.weight", hidden, queries)
    table.vector(names.attn_out_bias, f"{prefix}.attn.out.bias", hidden)
    if config.moe[layer] is None:
        _mlp_pieces(config, table, f"{prefix}.mlp")
    else:
        _moe_pieces(config, layer, table, f"{prefix}.mlp")
    return table.rows


def _mlp_pieces(config: ModelConfig, table: _Table, prefix: str) -> None:
    names = weight_names(config)
    inner, hidden = Even(config.intermediate_size), config.hidden_size
    before: tuple[Split, ...] = ()
    if config.gated_mlp:
        table.matrix(names.gate, f"{prefix}.up.weight", inner, hidden)
        table.cut_vector(names.gate_bias, f"{prefix}.up.bias", inner)
        before = (inner,)
    table.matrix(names.up, f"{prefix}.up.weight", inner, hidden, before)
    table.cut_vector(names.up_bias, f"{prefix}.up.bias", inner, before)
    table.row_matrix(names.down, f"{prefix}.down.weight", hidden, inner)
    table.vector(names.down_bias, f"{prefix}.down.bias", hidden)


def _moe_pieces(config: ModelConfig, layer: int, table: _Table, prefix: str) -> None:
    names, moe, hidden = weight_names(config), config.moe[layer], config.hidden_size
    table.matrix(names.router, f"{prefix}.router", Whole(moe.num_experts), hidden)
    inner = Whole(moe.intermediate_size)
    for index in range(moe.num_experts):
        up = ExpertPlace(index, moe.num_experts, 2 * moe.intermediate_size)
        down = ExpertPlace(index, moe.num_experts, hidden)
        table.matrix(names.expert_gate, f"{prefix}.up", inner, hidden, (), up)
        table.matrix(names.expert_up, f"{prefix}.up", inner, hidden, (inner,), up)
        table.matrix(names.expert_down, f"{prefix}.down", Whole(hidden), moe.intermediate_size, (), down)
