"""Mamba-2, a state space model (arXiv 2405.21060); importable without torch. Its module: `layers.mamba`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from megalite.core.layout import KVHeads, QueryHeads, Split
from megalite.model.kinds.base import Row, projection_back, stacked
from megalite.model.kinds.linear_attention import LINEAR_CHUNK, NEW_DECAY, LinearAttention

if TYPE_CHECKING:
    from megalite.core.parallel_state import ParallelState
    from megalite.model.config import ModelConfig
    from megalite.model.layers.base import LayerModule


@dataclass(frozen=True, kw_only=True, slots=True)
class Mamba2(LinearAttention):
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
    conv_bias: bool
    bias: bool
    """Both projections have biases."""
    step_limit: tuple[float, float] = (0.0, float("inf"))
    """Least and greatest time step."""
    flops_per_element: ClassVar[int] = 5
    """Decay, writing and reading."""

    @property
    def values(self) -> QueryHeads:
        """The split of the heads' inputs, gates and outputs."""
        return QueryHeads(self.heads, self.groups, self.head_dim)

    @property
    def numbers(self) -> QueryHeads:
        """The split of vectors with one number for each head."""
        return QueryHeads(self.heads, self.groups, 1)

    @property
    def keys(self) -> KVHeads:
        """The split of B, and of C."""
        return KVHeads(self.groups, self.state_dim)

    @property
    def convolved(self) -> tuple[tuple[str, Split], ...]:
        return ("ssm_conv_x", self.values), ("ssm_conv_b", self.keys), ("ssm_conv_c", self.keys)

    @property
    def projected(self) -> tuple[tuple[str, Split], ...]:
        splits = self.values, self.values, self.keys, self.keys, self.numbers
        return tuple(zip(("ssm_gate", "ssm_x", "ssm_b", "ssm_c", "ssm_time"), splits, strict=True))

    @property
    def state(self) -> tuple[int, int]:
        return self.state_dim, self.head_dim

    @property
    def kept_by_head(self) -> int:
        """Of keys, values, and products between the tokens of a chunk."""
        return 2 * self.state_dim + 5 * self.head_dim + 2 * LINEAR_CHUNK

    def rows(self, hidden: int) -> list[Row]:
        rows = stacked("inputs.weight", self.projected, "inputs.bias" if self.bias else None, other=(hidden,))
        rows += self.convolution("conv_bias" if self.conv_bias else None)
        for name, spread in {**NEW_DECAY, "skip": (1.0, 1.0)}.items():
            rows.append(Row(weight=f"ssm_{name}", param=name, split=self.numbers, spread=spread))
        rows.append(Row(weight="ssm_norm", param="norm", split=self.values, spread=(1.0, 1.0)))
        return rows + projection_back("ssm_out", "out", self.values, hidden, bias=self.bias)

    def module(self, config: ModelConfig, layer: int, state: ParallelState) -> LayerModule:
        from megalite.model.layers.mamba import Mamba

        return Mamba(self, config, layer, state)
