"""The module of multi-head latent attention. T tokens, H heads, R channels of a latent vector, P of a rotated key."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megalite.core.collectives import enter_tp
from megalite.core.formats import WeightFormat
from megalite.core.layers import RMSNorm, replicated
from megalite.core.layout import width
from megalite.core.linear import Linear, RowParallelLinear
from megalite.core.parallel_state import ParallelState
from megalite.model.attention import AttentionContext
from megalite.model.config import AttentionSpec, ModelConfig
from megalite.model.kinds.latent import LatentAttention
from megalite.model.layers.base import LayerModule
from megalite.model.layers.softmax import pairs_apart
from megalite.model.rope import Rotation

LATENT_EPS = 1e-6
"""Epsilon of the norms of latent vectors, whatever the other norms have."""


class _WholeLinear(Linear):
    """A linear that is whole on every tp rank, which uses its outputs for its own heads: [T, in] -> [T, out]."""

    def __init__(
        self, in_features: int, out_features: int, state: ParallelState, format: WeightFormat | None, *, bias: bool
    ):
        super().__init__(in_features, [out_features], state, format)
        for param in self.parameters():
            param.__dict__.update(tensor_model_parallel=False, sum_gradient_over_tp=True)
        self.bias = replicated((out_features,), partial_gradient=True) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return self.format.product(x, self.stored, self.bias)


class _HeadsLinear(Linear):
    """The rows of this rank's heads, of an input that every rank has whole: [T, in] -> [T, this rank's outputs]."""

    def forward(self, x: Tensor) -> Tensor:
        return self.format.product(x, self.stored)


@dataclass(frozen=True, slots=True)
class LatentHeads:
    """See `attention.Latents`."""

    plain_q: Tensor
    """[T, H, N]: channels of queries that are not rotated."""
    turned_q: Tensor
    """[T, H, P]."""
    latent: Tensor
    """[T, R]."""
    turned_k: Tensor
    """[T, P]."""
    up: Callable[[Tensor], Tensor]
    """[T, R] -> [T, H * (N + V)]: of each head its key, then its value."""
    up_matrix: Callable[[], Tensor]
    """The matrix of `up`, [H * (N + V), R]."""

    def expanded(self) -> tuple[Tensor, Tensor, Tensor]:
        heads, plain = self.plain_q.shape[1:]
        keys_and_values = self.up(self.latent).unflatten(-1, (heads, -1))
        turned = self.turned_k[:, None].expand(-1, heads, -1)
        q = torch.cat([self.plain_q, self.turned_q], -1)
        return q, torch.cat([keys_and_values[..., :plain], turned], -1), keys_and_values[..., plain:]

    def absorbed(self) -> tuple[Tensor, Tensor]:
        keys, _ = self._by_head()
        q = torch.matmul(self.plain_q.transpose(0, 1), keys).transpose(0, 1)  # [T, H, R]
        return torch.cat([q, self.turned_q], -1), torch.cat([self.latent, self.turned_k], -1)[:, None]

    def valued(self, mixed: Tensor) -> Tensor:
        _, values = self._by_head()
        return torch.matmul(mixed.transpose(0, 1), values.mT).transpose(0, 1)

    def _by_head(self) -> tuple[Tensor, Tensor]:
        """The parts of the matrix that make keys [H, N, R] and values [H, V, R]."""
        heads, plain = self.plain_q.shape[1:]
        matrix = self.up_matrix().unflatten(0, (heads, -1))
        return matrix[:, :plain], matrix[:, plain:]


class MultiHeadLatentAttention(LayerModule):
    """Attention over latent vectors; how they are used is the `AttentionContext`'s choice.

    Whole sequences have keys and values made of them (training); over a cache the maps of keys and values are absorbed
    into queries and output, so that one vector of a token serves all heads.
    """

    def __init__(self, kind: LatentAttention, config: ModelConfig, layer: int, state: ParallelState):
        super().__init__()
        hidden = config.hidden_size
        self.state = state
        self.spec = AttentionSpec(layer=layer, scale=kind.scale, values=kind.rank)
        self.rank, self.plain_dim, self.rope_dim = kind.rank, kind.plain_dim, kind.rope_dim
        tp = state.tp.size, state.tp.rank
        self.heads = width(kind.values, *tp) // kind.value_dim
        source = hidden
        self.q_down: _WholeLinear | None = None
        if kind.query_rank is not None:
            source = kind.query_rank
            self.q_down = _WholeLinear(hidden, source, state, config.format(layer, "q_down"), bias=kind.bias)
            self.q_norm = RMSNorm(source, LATENT_EPS, partial_gradient=True)
        queries = config.format(layer, kind.queries_name)
        self.q_up = _HeadsLinear(source, [width(kind.queries, *tp)], state, queries)
        self.kv_down = _WholeLinear(hidden, kind.latent_dim, state, config.format(layer, "kv_down"), bias=kind.bias)
        self.kv_norm = RMSNorm(kind.rank, LATENT_EPS, partial_gradient=True)
        self.kv_up = _HeadsLinear(kind.rank, [width(kind.expanded, *tp)], state, config.format(layer, "kv_up"))
        out = config.format(layer, "attn_out")
        self.out = RowParallelLinear(kind.values, hidden, state, bias=kind.bias, format=out)
        self.rotary = config.ropes.index(kind.rope)
        self.interleaved = kind.rope.interleaved

    def forward(self, x: Tensor, ctx: AttentionContext, rotations: Sequence[Rotation]) -> Tensor:
        """[T, hidden] -> [T, this rank's values]."""
        return ctx.attend_latent(self.spec, self._heads(x, rotations[self.rotary])).flatten(-2)

    def _heads(self, x: Tensor, rotation: Rotation) -> LatentHeads:
        """The queries and latent keys of tokens [T, hidden]."""
        x = enter_tp(x, self.state)
        source = x if self.q_down is None else self.q_norm(self.q_down(x))
        q = self.q_up(source).unflatten(-1, (self.heads, self.plain_dim + self.rope_dim))
        latent, key = self.kv_down(x).split((self.rank, self.rope_dim), -1)
        plain_q, turned_q = q.split((self.plain_dim, self.rope_dim), -1)
        turned = torch.cat([turned_q, key[:, None]], 1)  # [T, H + 1, P]
        if self.interleaved:
            turned = pairs_apart(turned, self.rope_dim)
        turned_q, turned_k = rotation(turned).split((self.heads, 1), 1)
        up_matrix = partial(self.kv_up.format.matrix, self.kv_up.stored)
        return LatentHeads(plain_q, turned_q, self.kv_norm(latent.contiguous()), turned_k[:, 0], self.kv_up, up_matrix)
