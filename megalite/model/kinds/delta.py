"""The gated delta net (arXiv 2412.06464); importable without torch. Its module: `layers.delta`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from megalite.core.layout import Even, Split, Whole
from megalite.model.kinds.base import Row, projection_back, stacked
from megalite.model.kinds.linear_attention import LINEAR_CHUNK, NEW_DECAY, LinearAttention

if TYPE_CHECKING:
    from megalite.core.parallel_state import ParallelState
    from megalite.model.config import ModelConfig
    from megalite.model.layers.base import LayerModule


@dataclass(frozen=True, kw_only=True, slots=True)
class GatedDelta(LinearAttention):
    """Projections, a short convolution over time, the gated delta rule, a norm with a gate, and a projection.

    Every key head serves as many value heads; tp cuts between key heads.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int
    flops_per_element: ClassVar[int] = 7
    """Decay, prediction, writing and reading."""
    fused: bool
    """The checkpoint has query, key, value and gate of each key head one after the other in one tensor, and so rate and
    decay; else each by itself."""

    @property
    def group(self) -> int:
        """Value heads of a key head."""
        return self.value_heads // self.key_heads

    def by_head(self, size: int) -> Even:
        """The split of a dimension with `size` elements for each key head."""
        return Even(self.key_heads, size)

    @property
    def keys(self) -> Even:
        """The split of the keys, and of the queries."""
        return self.by_head(self.key_dim)

    @property
    def values(self) -> Even:
        """The split of the values, and of the gates."""
        return self.by_head(self.group * self.value_dim)

    @property
    def inputs(self) -> tuple[tuple[str, Split], ...]:
        """The projections to heads: (name, split) of each."""
        if self.fused:
            return (("delta_qkvz", self.by_head(2 * self.key_dim + 2 * self.group * self.value_dim)),)
        names = ("delta_q", "delta_k", "delta_v", "delta_z")
        return tuple(zip(names, (self.keys, self.keys, self.values, self.values), strict=True))

    @property
    def rates(self) -> tuple[tuple[str, Split], ...]:
        """The projections to a number for each value head: (name, split) of each."""
        if self.fused:
            return (("delta_ba", self.by_head(2 * self.group)),)
        return ("delta_b", self.numbers), ("delta_a", self.numbers)

    @property
    def convolved(self) -> tuple[tuple[str, Split], ...]:
        return ("delta_conv_q", self.keys), ("delta_conv_k", self.keys), ("delta_conv_v", self.values)

    @property
    def projected(self) -> tuple[tuple[str, Split], ...]:
        return *self.inputs, *self.rates

    @property
    def numbers(self) -> Even:
        return self.by_head(self.group)

    @property
    def state(self) -> tuple[int, int]:
        return self.key_dim, self.value_dim

    @property
    def kept_by_head(self) -> int:
        """Of keys, values, and products between the tokens of a chunk."""
        return 4 * self.key_dim + 4 * self.value_dim + 3 * LINEAR_CHUNK

    def rows(self, hidden: int) -> list[Row]:
        rows = stacked("inputs.weight", self.inputs, other=(hidden,))
        rows += stacked("rates.weight", self.rates, other=(hidden,))
        rows += self.convolution()
        for name, spread in NEW_DECAY.items():
            rows.append(Row(weight=f"delta_{name}", param=name, split=self.numbers, spread=spread))
        rows.append(Row(weight="delta_norm", param="norm", split=Whole(self.value_dim), spread=(1.0, 1.0)))
        return rows + projection_back("delta_out", "out", self.values, hidden)

    def module(self, config: ModelConfig, layer: int, state: ParallelState) -> LayerModule:
        from megalite.model.layers.delta import GatedDeltaNet

        return GatedDeltaNet(self, config, layer, state)
