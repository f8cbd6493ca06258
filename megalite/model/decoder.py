"""The model definition: one decoder-only transformer for all families, for training and generation, in any layout.

    token ids --embed--> x --> [ x + attn(norm(x)), x + mlp(norm(x)) ] per layer --> hidden --norm, head--> logits
                first stage              this stage's layers                           last stage

Families differ in `ModelConfig` fields; each choice is made once, in a constructor. Parameter names carry global layer
indices on every stage.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalite.core.functional import ACTIVATIONS, gated
from megalite.core.layers import (
    ColumnParallelLinear,
    LayerNorm,
    RMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
    replicated,
)
from megalite.core.layout import Even, KVHeads, QueryHeads, width
from megalite.core.moe import MixtureOfExperts
from megalite.core.parallel_state import ParallelState
from megalite.model.attention import AttentionContext
from megalite.model.config import ModelConfig
from megalite.model.rope import Rotary, Rotation


def make_norm(config: ModelConfig, state: ParallelState) -> nn.Module:
    """The family's norm over the hidden dimension."""
    partial_gradient = state.sequence_parallel
    if config.norm == "layer":
        return LayerNorm(config.hidden_size, config.norm_eps, partial_gradient=partial_gradient)
    zero_centred = config.norm == "rms_zero_centred"
    return RMSNorm(config.hidden_size, config.norm_eps, zero_centred=zero_centred, partial_gradient=partial_gradient)


class Attention(nn.Module):
    """Self-attention with heads cut over tp: q, k, v projection, q/k norms, rotation, attention, output projection.

    The attention itself, and any KV cache, is the `AttentionContext`'s. [T, hidden] -> [T, hidden] ([T/tp, hidden]
    under sequence parallelism).
    """

    def __init__(self, config: ModelConfig, layer: int, state: ParallelState):
        super().__init__()
        self.spec = config.attention[layer]
        self.head_dim = config.head_dim
        queries = QueryHeads(config.num_heads, config.num_kv_heads, config.head_dim)
        keys = KVHeads(config.num_kv_heads, config.head_dim)
        self.qkv = ColumnParallelLinear(config.hidden_size, (queries, keys, keys), state, bias=config.qkv_bias)
        self.out = RowParallelLinear(queries, config.hidden_size, state, bias=config.attention_out_bias)
        self.heads = [outputs // config.head_dim for outputs in self.qkv.widths]  # local query, key, value heads
        if config.qk_norm:
            norm = partial(RMSNorm, config.head_dim, config.norm_eps, partial_gradient=state.tp.size > 1)
            self.q_norm, self.k_norm = norm(), norm()
        self.qk_norm = config.qk_norm

    def forward(self, x: Tensor, ctx: AttentionContext, rotation: Rotation | None) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim))  # [T, heads, D]
        num_q, num_k, num_v = self.heads
        qk, v = qkv.split((num_q + num_k, num_v), 1)
        if self.qk_norm:
            q, k = qk.split((num_q, num_k), 1)
            qk = torch.cat([self.q_norm(q), self.k_norm(k)], 1)
        if rotation is not None:
            qk = rotation(qk)
        q, k = qk.split((num_q, num_k), 1)
        out: Tensor = self.out(ctx.attend(self.spec, q, k, v).flatten(-2))
        return out


class MLP(nn.Module):
    """down(act(gate) * up), or down(act(up)), with the intermediate width cut over tp."""

    def __init__(self, config: ModelConfig, state: ParallelState):
        super().__init__()
        inner = Even(config.intermediate_size)
        self.gated = config.gated_mlp
        self.activation = config.activation
        splits = (inner, inner) if self.gated else (inner,)
        self.up = ColumnParallelLinear(config.hidden_size, splits, state, bias=config.mlp_bias)
        self.down = RowParallelLinear(inner, config.hidden_size, state, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        hidden = gated(hidden, self.activation) if self.gated else ACTIVATIONS[self.activation](hidden)
        out: Tensor = self.down(hidden)
        return out


def make_mlp(config: ModelConfig, layer: int, state: ParallelState) -> nn.Module:
    """Dense or mixture of experts, as the config says for this layer."""
    moe = config.moe[layer]
    if moe is None:
        return MLP(config, state)
    return MixtureOfExperts(
        config.hidden_size,
        moe.intermediate_size,
        num_experts=moe.num_experts,
        top_k=moe.top_k,
        normalize_top_k=moe.normalize_top_k,
        activation=config.activation,
        state=state,
    )


class Block(nn.Module):
    """One transformer layer, x + attn(norm(x)) then x + mlp(norm(x)): [T, hidden] -> [T, hidden].

    Under sequence parallelism both are [T/tp, hidden]. The post norms are identities in families that have none.
    """

    def __init__(self, config: ModelConfig, layer: int, state: ParallelState):
        super().__init__()
        self.attn_norm = make_norm(config, state)
        self.attn = Attention(config, layer, state)
        self.post_attn_norm = make_norm(config, state) if config.post_norms else nn.Identity()
        self.mlp_norm = make_norm(config, state)
        self.mlp = make_mlp(config, layer, state)
        self.post_mlp_norm = make_norm(config, state) if config.post_norms else nn.Identity()

    def forward(self, x: Tensor, ctx: AttentionContext, rotation: Rotation | None) -> Tensor:
        x = x + self.post_attn_norm(self.attn(self.attn_norm(x), ctx, rotation))
        x = x + self.post_mlp_norm(self.mlp(self.mlp_norm(x)))
        return x


BlockCall = Callable[[Tensor, AttentionContext, Rotation | None], Tensor]
"""The forward of a block, or a function that wraps it."""


class Embedding(nn.Module):
    """Token ids to the first layer's input: embedding table, scale and learned positions, as the family has them."""

    def __init__(self, config: ModelConfig, state: ParallelState):
        super().__init__()
        self.state = state
        self.tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, state)
        self.scale = config.embedding_scale
        shape = (config.max_position_embeddings, config.hidden_size)
        self.positions = (
            replicated(shape, partial_gradient=state.sequence_parallel) if config.learned_positions else None
        )

    def forward(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """Token ids and positions, int64 [T] each -> [T, hidden], under sequence parallelism [T/tp, hidden]."""
        x: Tensor = self.tokens(token_ids)
        if self.scale is not None:
            x = x * torch.tensor(self.scale, dtype=x.dtype)
        if self.positions is not None:
            if self.state.sequence_parallel:
                positions = positions.chunk(self.state.tp.size)[self.state.tp.rank]
            x = x + F.embedding(positions, self.positions)
        return x


class Decoder(nn.Module):
    """A decoder-only transformer: the part of it that this rank's pipeline stage holds, cut over tp.

    The first stage has the embedding too, the last the final norm and the head. Sequences are packed: T tokens in one
    dimension, and an `AttentionContext` says which belong together. `forward` runs one chunk of layers (see `Layout`;
    in inference a stage has one), `logits` comes after the model's last chunk and may be given fewer rows. Parameters
    are uninitialised until weights are loaded.
    """

    def __init__(self, config: ModelConfig, state: ParallelState):
        super().__init__()
        self.config = config
        self.state = state
        costs = config.layer_costs()
        self.layer_range = state.layout.layers(state.pp.rank, costs)
        self.embed = Embedding(config, state) if state.is_first_stage else None
        self.layers = nn.ModuleDict({str(layer): Block(config, layer, state) for layer in self.layer_range})
        self.norm = make_norm(config, state) if state.is_last_stage else None
        self.head = (
            ColumnParallelLinear(config.hidden_size, (Even(config.vocab_size),), state, bias=False)
            if state.is_last_stage
            else None
        )
        if config.tie_embeddings and self.embed is not None and self.head is not None:
            self.head.weight = self.embed.tokens.weight
        self._chunks: list[list[BlockCall]] = [
            [self.layers[str(layer)] for layer in chunk] for chunk in state.layout.chunks(state.pp.rank, costs)
        ]
        self._rotary = Rotary(config.rope) if config.rope is not None else None

    def forward(self, x: Tensor, ctx: AttentionContext, chunk: int = 0) -> Tensor:
        """Run one chunk of layers on hidden states [T, hidden] ([T/tp, hidden] under sequence parallelism).

        For the model's first chunk `x` is token ids, int64 [T]. Returns hidden states.
        """
        if self.embed is not None and chunk == 0:
            x = self.embed(x, ctx.positions)
        rotation = self._rotary(ctx.positions, ctx.lengths, x.dtype) if self._rotary is not None else None
        for block in self._chunks[chunk]:
            x = block(x, ctx, rotation)
        return x

    def wrap_blocks(self, wrap: Callable[[BlockCall], BlockCall]) -> None:
        """Replace the call of each block by `wrap` of it; parameters and their names stay."""
        self._chunks = [[wrap(block) for block in chunk] for chunk in self._chunks]

    def is_end(self, chunk: int) -> bool:
        """Whether this chunk of this stage is the model's last one, after which `logits` comes."""
        return self.head is not None and chunk == len(self._chunks) - 1

    def logits(self, hidden: Tensor) -> Tensor:
        """Last stage: hidden states [R, hidden] -> logits of this tp rank's part of the vocabulary, [R, vocab/tp]."""
        assert self.head is not None and self.norm is not None
        logits: Tensor = self.head(self.norm(hidden))
        cap = self.config.final_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    @property
    def vocab_widths(self) -> list[int]:
        """Columns of `logits` on each tp rank."""
        return [width(Even(self.config.vocab_size), self.state.tp.size, rank) for rank in range(self.state.tp.size)]
