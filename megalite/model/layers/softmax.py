"""The module of softmax attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn

from megalite.core.layers import Residual, RMSNorm
from megalite.core.linear import ColumnParallelLinear, RowParallelLinear
from megalite.core.parallel_state import ParallelState
from megalite.model.attention import AttentionContext, Heads
from megalite.model.config import AttentionSpec, ModelConfig
from megalite.model.kinds.softmax import SoftmaxAttention
from megalite.model.layers.base import LayerModule
from megalite.model.rope import Rotation


class Attention(LayerModule):
    """Self-attention with heads cut over tp: q, k, v projection, q/k norms, rotation, attention, output projection.

    The attention itself, and any KV cache, is the `AttentionContext`'s.
    """

    def __init__(self, kind: SoftmaxAttention, config: ModelConfig, layer: int, state: ParallelState):
        super().__init__()
        self.spec = AttentionSpec(layer=layer, scale=kind.scale, window=kind.window, softcap=kind.softcap)
        self.head_dim = kind.head_dim
        queries, keys = kind.queries, kind.keys
        self.qkv = ColumnParallelLinear(config.hidden_size, (queries, keys, keys), state, bias=kind.qkv_bias)
        self.out = RowParallelLinear(queries, config.hidden_size, state, bias=kind.out_bias)
        num_q, num_k, num_v = (outputs // kind.head_dim for outputs in self.qkv.widths)
        self.heads = num_q, num_k, num_v
        """Of this rank: queries, keys, values."""
        if kind.qk_norm is not None:
            norm = partial(RMSNorm, kind.head_dim, config.norm_eps, partial_gradient=state.tp.size > 1)
            self.q_norm, self.k_norm = norm(), norm()
        self.qk_norm = kind.qk_norm is not None
        self.rotary = config.ropes.index(kind.rope) if kind.rope is not None else None
        """Index of its rotation among the model's."""

    def update(
        self,
        x: Residual,
        norm: nn.Module | None,
        post: Callable[[Tensor], Tensor] | None,
        ctx: AttentionContext,
        rotations: Sequence[Rotation],
    ) -> None:
        qkv = self.qkv.read(x, norm).unflatten(-1, (-1, self.head_dim))  # [T, heads, D]
        norms = (self.q_norm, self.k_norm) if self.qk_norm else None
        rotation = None if self.rotary is None else rotations[self.rotary]
        attended = ctx.attend_heads(self.spec, Heads(qkv, self.heads, norms, rotation))
        self.out.write(x, attended.flatten(-2), post)
