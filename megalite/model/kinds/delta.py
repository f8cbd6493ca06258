"""The gated delta net (arXiv 2412.06464); importable without torch. Its module: `layers.delta`.

Linear attention in place of softmax attention: what the cache has of a sequence is as large for every length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megalite.core.layout import Even, Split, Whole, width
from megalite.model.kinds.base import LINEAR_CHUNK, NEW_DECAY, CacheSpec, LayerKind, Row

if TYPE_CHECKING:
    from megalite.core.parallel_state import ParallelState
    from megalite.model.config import ModelConfig
    from megalite.model.layers.base import LayerModule


@dataclass(frozen=True, kw_only=True, slots=True)
class GatedDelta(LayerKind):
    """Projections, a short convolution over time, the gated delta rule, a norm with a gate, and a projection.

    Every key head serves as many value heads; tp cuts between key heads.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int
    """Of the convolution."""
    fused: bool
    """The checkpoint has query, key, value and gate of each key head one after the other in one tensor, and so rate and
    decay; else each by itself."""

    @property
    def group(self) -> int:
        """Value heads of a key head."""
        return self.value_heads // self.key_heads

    def by_head(self, size: int) -> Even:
        """A dimension with so many elements for each key head."""
        return Even(self.key_heads, size)

    @property
    def keys(self) -> Even:
        """Also of the queries."""
        return self.by_head(self.key_dim)

    @property
    def values(self) -> Even:
        """Also of the gates."""
        return self.by_head(self.group * self.value_dim)

    @property
    def inputs(self) -> tuple[tuple[str, Split], ...]:
        """What is projected to the width of heads."""
        if self.fused:
            return (("delta_qkvz", self.by_head(2 * self.key_dim + 2 * self.group * self.value_dim)),)
        names = ("delta_q", "delta_k", "delta_v", "delta_z")
        return tuple(zip(names, (self.keys, self.keys, self.values, self.values), strict=True))

    @property
    def rates(self) -> tuple[tuple[str, Split], ...]:
        """What is projected to a number of each value head."""
        if self.fused:
            return (("delta_ba", self.by_head(2 * self.group)),)
        return ("delta_b", self.by_head(self.group)), ("delta_a", self.by_head(self.group))

    @property
    def convolved(self) -> tuple[tuple[str, Split], ...]:
        return ("delta_conv_q", self.keys), ("delta_conv_k", self.keys), ("delta_conv_v", self.values)

    def rows(self, hidden: int) -> list[Row]:
        rows: list[Row] = []
        for param, parts in (("inputs", self.inputs), ("rates", self.rates)):
            before: tuple[Split, ...] = ()
            for name, split in parts:
                place: dict[str, Any] = {"param": f"{param}.weight", "split": split, "before": before}
                rows.append(Row(weight=name, other=(hidden,), linear=True, **place))
                before = (*before, split)
        stored = (sum(split.total for _, split in self.convolved), 1, self.taps)
        before = ()
        for name, split in self.convolved:
            place = {"param": "taps", "split": split, "before": before}
            rows.append(Row(weight=name, other=(self.taps,), stored=stored, std=self.taps**-0.5, **place))
            before = (*before, split)
        for name, spread in NEW_DECAY.items():
            rows.append(Row(weight=f"delta_{name}", param=name, split=self.by_head(self.group), spread=spread))
        rows.append(Row(weight="delta_norm", param="norm", split=Whole(self.value_dim), spread=(1.0, 1.0)))
        rows.append(Row(weight="delta_out", param="out.weight", split=self.values, other=(hidden,), dim=1, linear=True))
        return rows

    def parameters(self, hidden: int) -> int:
        mapped = sum(split.total for _, split in (*self.inputs, *self.rates)) + self.values.total
        return hidden * mapped + self.taps * sum(split.total for _, split in self.convolved)

    def _heads(self, tp: int, tp_rank: int) -> int:
        """Value heads of a rank."""
        return width(self.by_head(self.group), tp, tp_rank)

    def cache(self, tp: int, tp_rank: int) -> CacheSpec:
        return CacheSpec.state(
            taps=self.taps,
            channels=sum(width(split, tp, tp_rank) for _, split in self.convolved),
            heads=self._heads(tp, tp_rank),
            keys=self.key_dim,
            values=self.value_dim,
        )

    def attended(self, length: int) -> int:
        return 1

    @property
    def flops_per_key(self) -> int:
        """Decay, prediction, writing and reading of a state."""
        return 7 * self.value_heads * self.key_dim * self.value_dim

    def widest(self, tp: int, tp_rank: int) -> int:
        return 2 * self.kept(tp, tp_rank)

    def kept(self, tp: int, tp_rank: int) -> int:
        """Most of it in float32, so as twice the numbers: of each head keys, values and what is between tokens."""
        channels = sum(width(split, tp, tp_rank) for _, split in self.convolved)
        of_head = 4 * self.key_dim + 4 * self.value_dim + 3 * LINEAR_CHUNK
        return 4 * channels + 2 * self._heads(tp, tp_rank) * of_head

    def module(self, config: ModelConfig, layer: int, state: ParallelState) -> LayerModule:
        from megalite.model.layers.delta import GatedDeltaNet

        return GatedDeltaNet(self, config, layer, state)
