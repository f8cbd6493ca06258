"""The module of softmax attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalite.core.collectives import sum_over
from megalite.core.functional import rms_norm
from megalite.core.layers import Residual, RMSNorm, sharded
from megalite.core.layout import KVHeads, QueryHeads, width
from megalite.core.linear import ColumnParallelLinear, RowParallelLinear
from megalite.core.parallel_state import ParallelState
from megalite.errors import CheckpointError
from megalite.model.attention import AttentionContext, Heads
from megalite.model.config import AttentionSpec, ModelConfig
from megalite.model.kinds.softmax import CACHE_SCALES, SoftmaxAttention
from megalite.model.layers.base import LayerModule, Norms
from megalite.model.rope import Rotation


class Attention(LayerModule):
    """Self-attention with heads cut over tp: q, k, v projection, q/k norms, rotation, attention, output projection.

    The attention itself, and any KV cache, is the `AttentionContext`'s.
    """

    def __init__(self, kind: SoftmaxAttention, config: ModelConfig, layer: int, state: ParallelState):
        super().__init__()
        self.spec = AttentionSpec(
            layer=layer, scale=kind.scale, window=kind.window, softcap=kind.softcap, chunk=kind.chunk
        )
        self.head_dim = kind.head_dim
        queries, keys = kind.queries, kind.keys
        splits, formats = (kind.asked, keys, keys), (config.format(layer, "q"), config.format(layer, "attn_out"))
        self.qkv = ColumnParallelLinear(config.hidden_size, splits, state, bias=kind.qkv_bias, format=formats[0])
        self.out = RowParallelLinear(queries, config.hidden_size, state, bias=kind.out_bias, format=formats[1])
        num_k = self.qkv.widths[1] // kind.head_dim
        num_q, num_v = width(queries, state.tp.size, state.tp.rank) // kind.head_dim, num_k
        self.heads = num_q, num_k, num_v
        """Numbers of query, key and value heads of this rank."""
        self.gated = kind.gated
        self.norms: tuple[RMSNorm, RMSNorm] | None = None
        """Norms of query and key heads, where the context applies them."""
        self.q_norm: nn.Module
        self.k_norm: nn.Module
        if kind.qk_norm == "width":
            wide = partial(WidthNorm, eps=config.norm_eps, state=state)
            self.q_norm, self.k_norm = wide(queries), wide(keys)
        elif kind.qk_norm == "layer_by_head":
            self.q_norm, self.k_norm = (HeadsNorm(count, kind.head_dim, config.norm_eps) for count in (num_q, num_k))
        elif kind.qk_norm in ("head", "head_after_rope"):
            marks = {"zero_centred": config.zero_centred, "partial_gradient": state.tp.size > 1}
            norm = partial(RMSNorm, kind.head_dim, config.norm_eps, **marks)
            self.norms = norm(), norm()
            self.q_norm, self.k_norm = self.norms
        self.qk_norm = kind.qk_norm
        self.rotary = config.ropes.index(kind.rope) if kind.rope is not None else None
        """Index of its rotation among the model's."""
        self.interleaved = kind.rope.rotary_dim if kind.rope is not None and kind.rope.interleaved else 0
        """Leading channels that are rotated as pairs of neighbours."""
        self.sinks = sharded((num_q,)) if kind.sinks else None
        for name in CACHE_SCALES if kind.cache_scales else ():
            self.register_parameter(name, nn.Parameter(torch.empty(1, dtype=torch.float32), requires_grad=False))
        self.query_growth = kind.query_growth
        self.eps = config.norm_eps
        usual = kind.qk_norm in (None, "head") and not self.interleaved and kind.query_growth is None
        self.attend = self._by_context if usual else self._step_by_step

    def settle(self, quantization: str | None) -> None:
        """Take from the loaded weights what a cache in fp8 divides keys and values by."""
        found = [float(scale) for name in CACHE_SCALES if (scale := self._parameters.get(name)) is not None]
        if not found:
            return
        if not all(0 < scale < math.inf for scale in found):
            rule = f"layer {self.spec.layer}: k_scale and v_scale must be above 0, got {found[0]:g} and {found[1]:g}"
            raise CheckpointError(rule)
        self.spec = replace(self.spec, key_scale=found[0], value_scale=found[1])

    def update(self, x: Residual, norms: Norms, ctx: AttentionContext, rotations: Sequence[Rotation]) -> None:
        qkv, gate = self._gate_apart(self.qkv.read(x, norms.before).unflatten(-1, (-1, self.head_dim)))  # [T, heads, D]
        attended = self.attend(qkv, ctx, None if self.rotary is None else rotations[self.rotary])
        if gate is not None:
            attended = attended * gate.sigmoid()
        self.out.write(x, attended.flatten(-2), norms.after)

    def _gate_apart(self, qkv: Tensor) -> tuple[Tensor, Tensor | None]:
        """Queries, keys and values, and the gate of each query head."""
        if not self.gated:
            return qkv, None
        asked, rest = qkv.split((2 * self.heads[0], self.heads[1] + self.heads[2]), 1)
        q, gate = asked.unflatten(1, (self.heads[0], 2)).unbind(2)
        return torch.cat([q, rest], 1), gate

    def _by_context(self, qkv: Tensor, ctx: AttentionContext, rotation: Rotation | None) -> Tensor:
        """What the context's kernels can do themselves."""
        return ctx.attend_heads(self.spec, Heads(qkv, self.heads, self.norms, rotation, self.sinks))

    def _step_by_step(self, qkv: Tensor, ctx: AttentionContext, rotation: Rotation | None) -> Tensor:
        """One operation after the other, where no kernel joins them."""
        q, k, v = qkv.split(self.heads, 1)
        if self.qk_norm in ("head", "width", "layer_by_head"):
            q, k = self.q_norm(q), self.k_norm(k)
        if self.interleaved:  # in both alike, so that products stay
            q, k = (pairs_apart(x, self.interleaved) for x in (q, k))
        if rotation is not None:
            q, k = rotation(q), rotation(k)
        if self.qk_norm == "head_after_rope":
            q, k = self.q_norm(q), self.k_norm(k)
        elif self.qk_norm == "length_after_rope":
            q, k = (F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).type_as(x) for x in (q, k))
        if self.query_growth is not None:
            beta, length, first = self.query_growth
            growth = 1 + beta * torch.log1p(((ctx.positions + first) // length).float())
            q = q * growth.to(q.dtype)[:, None, None]
        return ctx.attend(self.spec, q, k, v, sinks=self.sinks)


def pairs_apart(x: Tensor, count: int) -> Tensor:
    """The first `count` channels of heads [T, H, D] with those of even index first."""
    turned, rest = x[..., :count], x[..., count:]
    return torch.cat([turned[..., 0::2], turned[..., 1::2], rest], -1)


class HeadsNorm(nn.Module):
    """LayerNorm without bias of each head, with weights of its own (Cohere): [T, heads, D] -> [T, heads, D]."""

    def __init__(self, heads: int, head_dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = sharded((heads * head_dim,))

    def forward(self, x: Tensor) -> Tensor:
        normed = F.layer_norm(x.float(), x.shape[-1:], eps=self.eps)
        return (self.weight.float().view(x.shape[-2:]) * normed).type_as(x)


class WidthNorm(nn.Module):
    """RMSNorm over all heads together, of which this tp rank has some: [T, heads, D] -> [T, heads, D]."""

    def __init__(self, split: QueryHeads | KVHeads, *, eps: float, state: ParallelState):
        super().__init__()
        tp = state.tp
        self.axis = tp
        self.eps = eps
        self.total = split.total
        mine = split.range(tp.size, tp.rank)
        replicated = sum(width(split, tp.size, rank) for rank in range(tp.size)) > split.total
        self.holders = sum(split.range(tp.size, rank) == mine for rank in range(tp.size)) if replicated else 1
        """Ranks that hold the same heads, each of which must count once."""
        self.weight = sharded((mine[1] - mine[0],))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(-2)
        if self.axis.size == 1:
            return rms_norm(flat, self.weight, self.eps).view_as(x)
        values = flat.float()
        squares = sum_over(values.square().sum(-1, keepdim=True) / self.holders, self.axis)
        normed = values * torch.rsqrt(squares / self.total + self.eps)
        return (normed.type_as(x) * self.weight).view_as(x)
