"""The module of the gated delta net. T tokens, G key heads of this rank, each with R value heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite.core.layers import replicated, sharded
from megalite.core.layout import Split, width
from megalite.core.linear import ColumnParallelLinear, RowParallelLinear
from megalite.core.parallel_state import ParallelState
from megalite.model.attention import AttentionContext
from megalite.model.config import ModelConfig
from megalite.model.kinds.delta import GatedDelta
from megalite.model.layers.base import LayerModule
from megalite.model.linear_attention import Signals
from megalite.model.rope import Rotation

UNIT_EPS = 1e-6
"""Added to the squared length of queries and keys, which are scaled to length 1."""


class GatedDeltaNet(LayerModule):
    """Linear attention by the gated delta rule with heads cut over tp.

    The states, and which tokens follow which, are the context's `recurrence`.
    """

    def __init__(self, kind: GatedDelta, config: ModelConfig, layer: int, state: ParallelState):
        super().__init__()
        self.layer = layer
        self.kind = kind
        tp = state.tp.size, state.tp.rank
        self.heads = width(kind.by_head(1), *tp), kind.group  # G, R
        self.key_width, self.value_width = width(kind.keys, *tp), width(kind.values, *tp)

        def projected(parts: Sequence[tuple[str, Split]]) -> ColumnParallelLinear:
            splits, format = [split for _, split in parts], config.format(layer, parts[0][0])
            return ColumnParallelLinear(config.hidden_size, splits, state, bias=False, format=format)

        self.inputs, self.rates = projected(kind.inputs), projected(kind.rates)
        self.taps = sharded((2 * self.key_width + self.value_width, kind.taps))
        numbers = self.heads[0] * self.heads[1]
        self.time_shift, self.log_decay = sharded((numbers,)), sharded((numbers,))
        self.norm = replicated((kind.value_dim,), partial_gradient=state.tp.size > 1)
        self.eps = config.norm_eps
        out = config.format(layer, "delta_out")
        self.out = RowParallelLinear(kind.values, config.hidden_size, state, bias=False, format=out)

    def forward(self, x: Tensor, ctx: AttentionContext, rotations: Sequence[Rotation]) -> Tensor:
        """[T, hidden] -> [T, this rank's values]."""
        mixed, gate = self._parts(self.inputs(x))
        rate, time = self._rates(self.rates(x))
        recurrence = ctx.recurrence
        mixed = F.silu(recurrence.convolve(self.layer, mixed, self.taps, None))
        q, k, v = mixed.split((self.key_width, self.key_width, self.value_width), -1)
        q, k = (unit.unflatten(-1, (self.heads[0], self.kind.key_dim)) for unit in (q, k))
        decay = -self.log_decay.float().exp() * F.softplus(time.float() + self.time_shift.float())
        signals = Signals(
            _unit(q) * self.kind.key_dim**-0.5,
            _unit(k),
            v.unflatten(-1, (*self.heads, self.kind.value_dim)),
            decay.unflatten(-1, self.heads),
            rate.float().sigmoid().unflatten(-1, self.heads),
        )
        out = recurrence.mix(self.layer, signals).flatten(1)
        return self._gated(out, gate).to(x.dtype)

    def _parts(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        """What is convolved [T, queries + keys + values], and the gate [T, values]."""
        convolved = 2 * self.key_width + self.value_width
        if not self.kind.fused:
            mixed, gate = projected.split((convolved, self.value_width), -1)
            return mixed, gate
        key, value = self.kind.key_dim, self.kind.group * self.kind.value_dim
        by_head = projected.unflatten(-1, (self.heads[0], 2 * key + 2 * value))
        q, k, v, gate = (part.flatten(1) for part in by_head.split((key, key, value, value), -1))
        return torch.cat([q, k, v], -1), gate

    def _rates(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        """Rates and time steps, [T, G R] each, before their activations."""
        if not self.kind.fused:
            rate, time = projected.chunk(2, -1)
            return rate, time
        rate, time = projected.unflatten(-1, (self.heads[0], 2, self.heads[1])).unbind(2)
        return rate.flatten(1), time.flatten(1)

    def _gated(self, out: Tensor, gate: Tensor) -> Tensor:
        """The norm of each value head, times its gate: [T, values] both."""
        heads = out.unflatten(-1, (self.heads[0] * self.heads[1], self.kind.value_dim))
        normed = F.rms_norm(heads, heads.shape[-1:], self.norm.float(), self.eps).flatten(1)
        return normed * F.silu(gate.float())


def _unit(x: Tensor) -> Tensor:
    """x scaled to length 1 along the last dimension."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + UNIT_EPS)
