"""Multi-head latent attention (MLA, arXiv 2405.04434); importable without torch. Its module: `layers.latent`.

Keys and values of all heads are linear maps of one latent vector of a token, beside one key that is rotated and shared
by the heads. The cache has these two instead of keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megalite.core.layout import Even, Whole, width
from megalite.model.config import Rope
from megalite.model.kinds.base import CacheSpec, LayerKind, Row, projection_back, stacked

if TYPE_CHECKING:
    from megalite.core.parallel_state import ParallelState
    from megalite.model.config import ModelConfig
    from megalite.model.layers.base import LayerModule


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentAttention(LayerKind):
    """Attention with heads cut over tp; the latent vectors are computed and cached on every tp rank."""

    heads: int
    rank: int
    """Width of the latent vector of keys and values."""
    query_rank: int | None
    """Width of the latent vector of queries; None: queries are projected from the residual stream."""
    plain_dim: int
    """Channels of a key that are not rotated."""
    rope_dim: int
    """Channels of a key that are rotated; all heads share them."""
    value_dim: int
    scale: float
    """Multiplies q k^T."""
    rope: Rope
    bias: bool = False
    """The projections to latent vectors and of the output have biases."""

    @property
    def query_heads(self) -> int:
        return self.heads

    @property
    def queries_name(self) -> str:
        """Key of the projection to queries in a family's table of tensor names."""
        return "q" if self.query_rank is None else "q_up"

    @property
    def queries(self) -> Even:
        return Even(self.heads, self.plain_dim + self.rope_dim)

    @property
    def expanded(self) -> Even:
        """The split of keys without their rotated part, and values, head by head."""
        return Even(self.heads, self.plain_dim + self.value_dim)

    @property
    def values(self) -> Even:
        return Even(self.heads, self.value_dim)

    @property
    def latent_dim(self) -> int:
        """Width of what the cache holds of a token."""
        return self.rank + self.rope_dim

    def rows(self, hidden: int) -> list[Row]:
        def down(name: str, size: int) -> list[Row]:
            """Rows of a projection to a latent vector, whole on every rank."""
            biases = f"{name}.bias" if self.bias else None
            return stacked(f"{name}.weight", [(name, Whole(size))], biases, other=(hidden,))

        rows, source = [], hidden
        if self.query_rank is not None:
            source = self.query_rank
            rows = [*down("q_down", source), Row(weight="q_down_norm", param="q_norm.weight", split=Whole(source))]
        rows += stacked("q_up.weight", [(self.queries_name, self.queries)], other=(source,))
        rows += down("kv_down", self.latent_dim)
        rows.append(Row(weight="kv_down_norm", param="kv_norm.weight", split=Whole(self.rank)))
        rows += stacked("kv_up.weight", [("kv_up", self.expanded)], other=(self.rank,))
        return rows + projection_back("attn_out", "out", self.values, hidden, bias=self.bias)

    def parameters(self, hidden: int) -> int:
        source = hidden if self.query_rank is None else self.query_rank
        down = hidden * (self.latent_dim + (self.query_rank or 0))
        return down + source * self.queries.total + self.rank * self.expanded.total + hidden * self.values.total

    def cache(self, tp: int, tp_rank: int) -> CacheSpec:
        return CacheSpec(token=((1, self.latent_dim),))

    def attended(self, length: int) -> int:
        return length

    @property
    def flops_per_key(self) -> int:
        return 2 * self.heads * (self.latent_dim + self.rank)

    def widest(self, tp: int, tp_rank: int) -> int:
        held = width(self.values, tp, tp_rank) // self.value_dim
        return held * (2 * self.latent_dim + 2 * self.rank) + self.latent_dim + (self.query_rank or 0)

    def kept(self, tp: int, tp_rank: int) -> int:
        splits = (self.queries, self.queries, self.expanded, self.values)
        return sum(width(split, tp, tp_rank) for split in splits) + self.latent_dim + (self.query_rank or 0)

    def module(self, config: ModelConfig, layer: int, state: ParallelState) -> LayerModule:
        from megalite.model.layers.latent import MultiHeadLatentAttention

        return MultiHeadLatentAttention(self, config, layer, state)
