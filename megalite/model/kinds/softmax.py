"""Softmax attention with keys and values in pages; importable without torch. Its module: `layers.softmax`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from megalite.core.layout import KVHeads, QueryHeads, Whole, width
from megalite.model.config import Rope
from megalite.model.kinds.base import CacheSpec, LayerKind, Place, Row, projection_back, stacked

if TYPE_CHECKING:
    from megalite.core.parallel_state import ParallelState
    from megalite.model.config import ModelConfig
    from megalite.model.layers.base import LayerModule


QKNorm = Literal["head", "head_after_rope", "width", "length_after_rope", "layer_by_head"]
CACHE_SCALES = ("k_scale", "v_scale")
"""Weights and parameters of `SoftmaxAttention.cache_scales`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SoftmaxAttention(LayerKind):
    """Self-attention with heads cut over tp: q, k, v projection, norms and rotation of heads, attention, projection."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    """Multiplies q k^T."""
    window: int | None = None
    """Sliding window: number of keys a query sees, its own included; None: all earlier ones."""
    softcap: float | None = None
    """Scores become softcap * tanh(score / softcap); None: they stay."""
    rope: Rope | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: QKNorm | None = None
    """Norm of queries and keys. head: RMSNorm of each head, before the rotation; head_after_rope: after it; width:
    RMSNorm over all heads together, before it; length_after_rope: RMSNorm of each head, after it, without weights;
    layer_by_head: LayerNorm of each head, before it, with weights of its own."""
    query_growth: tuple[float, int, int] | None = None
    """(beta, length, first): queries at position p are multiplied by 1 + beta * log(1 + (p + first) // length)
    (Llama 4)."""
    chunk: int | None = None
    """A query sees only keys of its own chunk of so many positions; None: all earlier ones."""
    sinks: bool = False
    """Each head has a learned score of a key without a value (arXiv 2309.17453)."""
    gated: bool = False
    """Each head's output is multiplied by the sigmoid of a gate (arXiv 2505.06708); the gate's projection lies after
    the query's in the checkpoint."""
    fused_by_head: bool = False
    """The checkpoint has query, key and value of each head one after the other in one tensor."""
    cache_scales: bool = False
    """The checkpoint has the numbers by which keys and values are divided in a cache in fp8."""

    @property
    def query_heads(self) -> int:
        return self.heads

    @property
    def queries(self) -> QueryHeads:
        return QueryHeads(self.heads, self.kv_heads, self.head_dim)

    @property
    def asked(self) -> QueryHeads:
        """The split of queries, and of their gates where there are any."""
        return QueryHeads(self.heads, self.kv_heads, 2 * self.head_dim) if self.gated else self.queries

    @property
    def keys(self) -> KVHeads:
        """The split of keys, and of values."""
        return KVHeads(self.kv_heads, self.head_dim)

    def rows(self, hidden: int) -> list[Row]:
        parts = (("q", self.asked), ("k", self.keys), ("v", self.keys))
        rows = stacked("qkv.weight", parts, "qkv.bias" if self.qkv_bias else None, other=(hidden,))
        if self.fused_by_head:  # of as many KV heads as query heads, in the order of the checkpoint
            unit, size = Whole(self.head_dim), self.head_dim
            heads = range(self.heads)
            rows = [replace(row, split=unit, place=Place(row.split, head, size)) for head in heads for row in rows]
        if self.qk_norm == "width":
            rows.append(Row(weight="q_norm", param="q_norm.weight", split=self.queries))
            rows.append(Row(weight="k_norm", param="k_norm.weight", split=self.keys))
        elif self.qk_norm == "layer_by_head":
            for name, split, count in (("q_norm", self.queries, self.heads), ("k_norm", self.keys, self.kv_heads)):
                rows.append(Row(weight=name, param=f"{name}.weight", split=split, stored=(count, self.head_dim)))
        elif self.qk_norm in ("head", "head_after_rope"):
            for name in ("q_norm", "k_norm"):
                rows.append(Row(weight=name, param=f"{name}.weight", split=Whole(self.head_dim)))
        if self.sinks:
            rows.append(Row(weight="sinks", param="sinks", split=QueryHeads(self.heads, self.kv_heads, 1)))
        rows += projection_back("attn_out", "out", self.queries, hidden, bias=self.out_bias)
        scales = CACHE_SCALES if self.cache_scales else ()
        return rows + [Row(weight=name, param=name, split=Whole(1), spread=(1.0, 1.0), exact=True) for name in scales]

    def parameters(self, hidden: int) -> int:
        return ((3 if self.gated else 2) * self.heads + 2 * self.kv_heads) * self.head_dim * hidden

    def cache(self, tp: int, tp_rank: int) -> CacheSpec:
        held = width(self.keys, tp, tp_rank) // self.head_dim
        return CacheSpec.keys_and_values(held, self.head_dim)

    def attended(self, length: int) -> int:
        most = length if self.window is None else min(length, self.window)
        return most if self.chunk is None else min(most, self.chunk)

    @property
    def flops_per_key(self) -> int:
        return 4 * self.heads * self.head_dim

    def widest(self, tp: int, tp_rank: int) -> int:
        return 3 * sum(width(split, tp, tp_rank) for split in (self.asked, self.keys, self.keys))

    def kept(self, tp: int, tp_rank: int) -> int:
        return 3 * (width(self.asked, tp, tp_rank) + width(self.keys, tp, tp_rank))

    def module(self, config: ModelConfig, layer: int, state: ParallelState) -> LayerModule:
        from megalite.model.layers.softmax import Attention

        return Attention(self, config, layer, state)
