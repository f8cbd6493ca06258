"""Mamba-2, a state space model (arXiv 2405.21060); importable without torch. Its module: `layers.mamba`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megalite.core.layout import KVHeads, QueryHeads, Split, Whole, width
from megalite.model.kinds.base import LINEAR_CHUNK, NEW_DECAY, CacheSpec, LayerKind, Row

if TYPE_CHECKING:
    from megalite.core.parallel_state import ParallelState
    from megalite.model.config import ModelConfig
    from megalite.model.layers.base import LayerModule


@dataclass(frozen=True, kw_only=True, slots=True)
class Mamba2(LayerKind):
    """A projection, a short convolution over time, linear attention with decay, a gated norm, and a projection.

    In the words of attention: a head's inputs are values, B are keys and C queries, which the heads of a group share.
    So tp cuts heads as query heads and groups as KV heads, and the norm over a group is a sum over ranks that share it.
    """

    heads: int
    head_dim: int
    groups: int
    state_dim: int
    """Channels of B and C."""
    taps: int
    """Of the convolution."""
    conv_bias: bool
    bias: bool
    """Of both projections."""
    step_limit: tuple[float, float] = (0.0, float("inf"))
    """Least and greatest time step."""

    @property
    def values(self) -> QueryHeads:
        """The heads' inputs; also their gates and outputs."""
        return QueryHeads(self.heads, self.groups, self.head_dim)

    @property
    def numbers(self) -> QueryHeads:
        """One for each head."""
        return QueryHeads(self.heads, self.groups, 1)

    @property
    def keys(self) -> KVHeads:
        """B; also C."""
        return KVHeads(self.groups, self.state_dim)

    @property
    def convolved(self) -> tuple[tuple[str, Split], ...]:
        return ("x", self.values), ("b", self.keys), ("c", self.keys)

    @property
    def inputs(self) -> tuple[tuple[str, Split], ...]:
        """What the first projection makes."""
        return ("gate", self.values), *self.convolved, ("time", self.numbers)

    def rows(self, hidden: int) -> list[Row]:
        rows: list[Row] = []
        before: tuple[Split, ...] = ()
        place: dict[str, Any]
        for name, split in self.inputs:
            weight, place = f"ssm_{name}", {"split": split, "before": before}
            rows.append(Row(weight=weight, param="inputs.weight", other=(hidden,), linear=True, **place))
            if self.bias:
                rows.append(Row(weight=f"{weight}_bias", param="inputs.bias", **place))
            before = (*before, split)
        stored = (sum(split.total for _, split in self.convolved), 1, self.taps)
        before = ()
        for name, split in self.convolved:
            weight, place = f"ssm_conv_{name}", {"split": split, "before": before}
            taps: dict[str, Any] = {"other": (self.taps,), "stored": stored, "std": self.taps**-0.5}
            rows.append(Row(weight=weight, param="taps", **taps, **place))
            if self.conv_bias:
                rows.append(Row(weight=f"{weight}_bias", param="conv_bias", **place))
            before = (*before, split)
        for name, spread in {**NEW_DECAY, "skip": (1.0, 1.0)}.items():
            rows.append(Row(weight=f"ssm_{name}", param=name, split=self.numbers, spread=spread))
        rows.append(Row(weight="ssm_norm", param="norm", split=self.values, spread=(1.0, 1.0)))
        rows.append(Row(weight="ssm_out", param="out.weight", split=self.values, other=(hidden,), dim=1, linear=True))
        if self.bias:
            rows.append(Row(weight="ssm_out_bias", param="out.bias", split=Whole(hidden)))
        return rows

    def parameters(self, hidden: int) -> int:
        mapped = sum(split.total for _, split in self.inputs) + self.values.total
        return hidden * mapped + self.taps * sum(split.total for _, split in self.convolved)

    def cache(self, tp: int, tp_rank: int) -> CacheSpec:
        return CacheSpec.state(
            taps=self.taps,
            channels=sum(width(split, tp, tp_rank) for _, split in self.convolved),
            heads=width(self.numbers, tp, tp_rank),
            keys=self.state_dim,
            values=self.head_dim,
        )

    def attended(self, length: int) -> int:
        return 1

    @property
    def flops_per_key(self) -> int:
        """Decay, writing and reading of a state."""
        return 5 * self.heads * self.state_dim * self.head_dim

    def widest(self, tp: int, tp_rank: int) -> int:
        return 2 * self.kept(tp, tp_rank)

    def kept(self, tp: int, tp_rank: int) -> int:
        """Most of it in float32, so as twice the numbers: of each head keys, values and what is between tokens."""
        channels = sum(width(split, tp, tp_rank) for _, split in self.convolved)
        of_head = 2 * self.state_dim + 5 * self.head_dim + 2 * LINEAR_CHUNK
        return 4 * channels + 2 * width(self.numbers, tp, tp_rank) * of_head

    def module(self, config: ModelConfig, layer: int, state: ParallelState) -> LayerModule:
        from megalite.model.layers.mamba import Mamba

        return Mamba(self, config, layer, state)
