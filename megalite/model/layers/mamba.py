"""The module of Mamba-2. T tokens, G groups of this rank, each with R heads of P channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite.core.collectives import sum_over
from megalite.core.layers import sharded
from megalite.core.layout import width
from megalite.core.linear import ColumnParallelLinear, RowParallelLinear
from megalite.core.parallel_state import ParallelState
from megalite.model.attention import AttentionContext
from megalite.model.config import ModelConfig
from megalite.model.kinds.mamba import Mamba2
from megalite.model.layers.base import LayerModule
from megalite.model.linear_attention import Signals
from megalite.model.rope import Rotation


class Mamba(LayerModule):
    """Linear attention with decay, its heads cut over tp.

    The states, and which tokens follow which, are the context's `recurrence`.
    """

    def __init__(self, kind: Mamba2, config: ModelConfig, layer: int, state: ParallelState):
        super().__init__()
        self.layer = layer
        self.kind = kind
        self.tp = state.tp
        tp = state.tp.size, state.tp.rank
        numbers, groups = width(kind.numbers, *tp), width(kind.keys, *tp) // kind.state_dim
        self.heads = groups, numbers // groups  # G, R
        splits = [split for _, split in kind.projected]
        formats = config.format(layer, "ssm_gate"), config.format(layer, "ssm_out")
        self.inputs = ColumnParallelLinear(config.hidden_size, splits, state, bias=kind.bias, format=formats[0])
        value, *_ = self.inputs.widths
        self.convolved = sum(self.inputs.widths[1:4])
        self.taps = sharded((self.convolved, kind.taps))
        self.conv_bias = sharded((self.convolved,)) if kind.conv_bias else None
        self.time_shift, self.log_decay, self.skip = (sharded((numbers,)) for _ in range(3))
        self.norm = sharded((value,))
        self.eps = config.norm_eps
        self.out = RowParallelLinear(kind.values, config.hidden_size, state, bias=kind.bias, format=formats[1])

    def forward(self, x: Tensor, ctx: AttentionContext, rotations: Sequence[Rotation]) -> Tensor:
        """[T, hidden] -> [T, this rank's values]."""
        kind, widths = self.kind, self.inputs.widths
        gate, mixed, time = self.inputs(x).split((widths[0], self.convolved, widths[-1]), -1)
        mixed = F.silu(ctx.recurrence.convolve(self.layer, mixed, self.taps, self.conv_bias))
        values, keys, queries = mixed.split(widths[1:4], -1)
        step = F.softplus(time.float() + self.time_shift.float()).clamp(*kind.step_limit).unflatten(-1, self.heads)
        values = values.unflatten(-1, (*self.heads, kind.head_dim))
        k, q = (part.unflatten(-1, (self.heads[0], kind.state_dim)) for part in (keys, queries))
        decay = -self.log_decay.float().exp().view(self.heads) * step
        out = ctx.recurrence.mix(self.layer, Signals(q, k, step[..., None] * values, decay))
        out = out + self.skip.float().view(*self.heads, 1) * values
        return self._normed(out.flatten(1) * F.silu(gate.float())).to(x.dtype)

    def _normed(self, x: Tensor) -> Tensor:
        """RMSNorm over each group's channels, which several tp ranks may share: [T, values] -> [T, values]."""
        by_group = x.unflatten(-1, (self.heads[0], self.heads[1] * self.kind.head_dim))
        squares = by_group.square().sum(-1)  # [T, G]
        if self.tp.size > self.kind.groups:
            (group, _) = self.kind.keys.heads(self.tp.size, self.tp.rank)
            everywhere = F.pad(squares, (group, self.kind.groups - group - 1))
            squares = sum_over(everywhere, self.tp)[:, group, None]
        mean = squares * (self.kind.groups / self.kind.values.total)
        normed: Tensor = by_group * torch.rsqrt(mean + self.eps)[..., None]
        return normed.flatten(1) * self.norm.float()
