"""Softmax attention with keys and values in pages; importable without torch. Its module: `layers.softmax`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megalite.core.layout import KVHeads, QueryHeads, Split, Whole, width
from megalite.model.config import Rope
from megalite.model.kinds.base import CacheSpec, LayerKind, Row

if TYPE_CHECKING:
    from megalite.core.parallel_state import ParallelState
    from megalite.model.config import ModelConfig
    from megalite.model.layers.base import LayerModule


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
    qk_norm: Literal["head"] | None = None
    """Normalise each head's query and key before the rotation."""

    @property
    def query_heads(self) -> int:
        return self.heads

    @property
    def queries(self) -> QueryHeads:
        return QueryHeads(self.heads, self.kv_heads, self.head_dim)

    @property
    def keys(self) -> KVHeads:
        """Also of the values."""
        return KVHeads(self.kv_heads, self.head_dim)

    def rows(self, hidden: int) -> list[Row]:
        rows: list[Row] = []
        before: tuple[Split, ...] = ()
        for name, split in (("q", self.queries), ("k", self.keys), ("v", self.keys)):
            rows.append(Row(weight=name, param="qkv.weight", split=split, other=(hidden,), before=before, linear=True))
            if self.qkv_bias:
                rows.append(Row(weight=f"{name}_bias", param="qkv.bias", split=split, before=before))
            before = (*before, split)
        if self.qk_norm is not None:
            for name in ("q_norm", "k_norm"):
                rows.append(Row(weight=name, param=f"{name}.weight", split=Whole(self.head_dim)))
        rows.append(Row(weight="attn_out", param="out.weight", split=self.queries, other=(hidden,), dim=1, linear=True))
        if self.out_bias:
            rows.append(Row(weight="attn_out_bias", param="out.bias", split=Whole(hidden)))
        return rows

    def parameters(self, hidden: int) -> int:
        return (2 * self.heads + 2 * self.kv_heads) * self.head_dim * hidden

    def cache(self, tp: int, tp_rank: int) -> CacheSpec:
        held = width(self.keys, tp, tp_rank) // self.head_dim
        return CacheSpec.keys_and_values(held, self.head_dim)

    def attended(self, length: int) -> int:
        return length if self.window is None else min(length, self.window)

    @property
    def flops_per_key(self) -> int:
        return 4 * self.heads * self.head_dim

    def widest(self, tp: int, tp_rank: int) -> int:
        return 3 * sum(width(split, tp, tp_rank) for split in (self.queries, self.keys, self.keys))

    def kept(self, tp: int, tp_rank: int) -> int:
        return 3 * (width(self.queries, tp, tp_rank) + width(self.keys, tp, tp_rank))

    def module(self, config: ModelConfig, layer: int, state: ParallelState) -> LayerModule:
        from megalite.model.layers.softmax import Attention

        return Attention(self, config, layer, state)
