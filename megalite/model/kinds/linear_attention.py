"""What the kinds of linear attention share; importable without torch.

Projections, a short convolution over time, linear attention, and a projection back. The cache keeps a state of each
sequence, whose size does not depend on its length.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, ClassVar

from megalite.core.layout import Split, width
from megalite.model.kinds.base import CacheSpec, LayerKind, Row, stacked

LINEAR_CHUNK = 64
"""Most tokens that linear attention computes as one product."""
NEW_DECAY = {"time_shift": (-4.6, -4.6), "log_decay": (0.0, math.log(16))}
"""`Row.spread` of the heads in a new model. A state keeps 0.99 to 0.86 of itself with each token, as the middle ones of
Mamba-2 do (arXiv 2405.21060)."""


class LinearAttention(LayerKind):
    """A kind with a state of each head, a matrix [S, P] that maps keys to values; see `model.linear_attention`."""

    taps: int
    """Length of the convolution, in tokens."""
    flops_per_element: ClassVar[int]
    """Operations of a token for each element of a state, forward."""

    @property
    @abstractmethod
    def projected(self) -> tuple[tuple[str, Split], ...]:
        """The projections of the residual stream: (name, split) of each."""

    @property
    @abstractmethod
    def convolved(self) -> tuple[tuple[str, Split], ...]:
        """The projections that go through the convolution: (name, split) of each."""

    @property
    @abstractmethod
    def values(self) -> Split:
        """The split of the heads' outputs."""

    @property
    @abstractmethod
    def numbers(self) -> Split:
        """The split of vectors with one number for each head."""

    @property
    @abstractmethod
    def state(self) -> tuple[int, int]:
        """The shape (S, P) of a head's state."""

    @property
    @abstractmethod
    def kept_by_head(self) -> int:
        """Numbers of a token in float32 that the backward pass needs of each head."""

    def convolution(self, biases: str | None = None) -> list[Row]:
        """Rows of the convolution; `biases`: the parameter of its biases."""
        stored = (sum(split.total for _, split in self.convolved), 1, self.taps)
        more: dict[str, Any] = {"other": (self.taps,), "stored": stored, "std": self.taps**-0.5}
        return stacked("taps", self.convolved, biases, linear=False, **more)

    def parameters(self, hidden: int) -> int:
        mapped = sum(split.total for _, split in self.projected) + self.values.total
        return hidden * mapped + self.taps * sum(split.total for _, split in self.convolved)

    def cache(self, tp: int, tp_rank: int) -> CacheSpec:
        return CacheSpec.state(self.taps, self._channels(tp, tp_rank), width(self.numbers, tp, tp_rank), *self.state)

    def _channels(self, tp: int, tp_rank: int) -> int:
        return sum(width(split, tp, tp_rank) for _, split in self.convolved)

    def attended(self, length: int) -> int:
        return 1

    @property
    def flops_per_key(self) -> int:
        return self.flops_per_element * self.numbers.total * math.prod(self.state)

    def widest(self, tp: int, tp_rank: int) -> int:
        return 2 * self.kept(tp, tp_rank)

    def kept(self, tp: int, tp_rank: int) -> int:
        """Numbers in float32, which most are, count twice."""
        return 4 * self._channels(tp, tp_rank) + 2 * width(self.numbers, tp, tp_rank) * self.kept_by_head
