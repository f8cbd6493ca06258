"""The model definition: one decoder-only transformer for all families, for training and generation, in any layout.

    token ids --embed--> x --> [ x + attn(norm(x)), x + mlp(norm(x)) ] per layer --> hidden --norm, head--> logits
                first stage              this stage's layers                           last stage

Families differ in `ModelConfig` fields; each choice is made once, in a constructor. Parameter names carry global layer
indices on every stage.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalite.core.functional import ACTIVATIONS, by_kernels
from megalite.core.layers import LayerNorm, Residual, RMSNorm, VocabParallelEmbedding, replicated
from megalite.core.layout import Even, KVHeads, QueryHeads, width
from megalite.core.linear import ColumnParallelLinear, RowParallelLinear
from megalite.core.moe import MixtureOfExperts
from megalite.core.parallel_state import ParallelState
from megalite.model.attention import AttentionContext, Heads
from megalite.model.config import ModelConfig
from megalite.model.rope import Rotary, Rotation


def make_norm(config: ModelConfig, state: ParallelState) -> RMSNorm | LayerNorm:
    """The family's norm over the hidden dimension."""
    partial_gradient = state.sequence_parallel
    if config.norm == "layer":
        return LayerNorm(config.hidden_size, config.norm_eps, partial_gradient=partial_gradient)
    zero_centred = config.norm == "rms_zero_centred"
    return RMSNorm(config.hidden_size, config.norm_eps, zero_centred=zero_centred, partial_gradient=partial_gradient)


class Attention(nn.Module):
    """Self-attention with heads cut over tp: q, k, v projection, q/k norms, rotation, attention, output projection.

    The attention itself, and any KV cache, is the `AttentionContext`'s.
    """

    def __init__(self, config: ModelConfig, layer: int, state: ParallelState):
        super().__init__()
        self.spec = config.attention[layer]
        self.head_dim = config.head_dim
        queries = QueryHeads(config.num_heads, config.num_kv_heads, config.head_dim)
        keys = KVHeads(config.num_kv_heads, config.head_dim)
        self.qkv = ColumnParallelLinear(config.hidden_size, (queries, keys, keys), state, bias=config.qkv_bias)
        self.out = RowParallelLinear(queries, config.hidden_size, state, bias=config.attention_out_bias)
        num_q, num_k, num_v = (outputs // config.head_dim for outputs in self.qkv.widths)
        self.heads = num_q, num_k, num_v
        """Of this rank: queries, keys, values."""
        if config.qk_norm:
            norm = partial(RMSNorm, config.head_dim, config.norm_eps, partial_gradient=state.tp.size > 1)
            self.q_norm, self.k_norm = norm(), norm()
        self.qk_norm = config.qk_norm

    def update(
        self, x: Residual, norm: nn.Module, post: nn.Module | None, ctx: AttentionContext, rotation: Rotation | None
    ) -> None:
        """Read `norm` of the residual stream, and add to it, through `post` if there is one."""
        qkv = self.qkv.read(x, norm).unflatten(-1, (-1, self.head_dim))  # [T, heads, D]
        norms = (self.q_norm, self.k_norm) if self.qk_norm else None
        attended = ctx.attend_heads(self.spec, Heads(qkv, self.heads, norms, rotation))
        self.out.write(x, attended.flatten(-2), post)


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

    def update(self, x: Residual, norm: nn.Module, post: nn.Module | None) -> None:
        """Read `norm` of the residual stream, and add to it, through `post` if there is one."""
        if self.gated:
            hidden = self.up.read(x, norm, gate=self.activation)
        else:
            hidden = ACTIVATIONS[self.activation](self.up.read(x, norm))
        self.down.write(x, hidden, post)


def make_mlp(config: ModelConfig, layer: int, state: ParallelState) -> MLP | MixtureOfExperts:
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
    """One transformer layer on the residual stream: x + attn(norm(x)), then x + mlp(norm(x)).

    Families with post norms add the norm of each output in its place.
    """

    def __init__(self, config: ModelConfig, layer: int, state: ParallelState):
        super().__init__()
        self.attn_norm = make_norm(config, state)
        self.attn = Attention(config, layer, state)
        self.post_attn_norm = make_norm(config, state) if config.post_norms else None
        self.mlp_norm = make_norm(config, state)
        self.mlp = make_mlp(config, layer, state)
        self.post_mlp_norm = make_norm(config, state) if config.post_norms else None

    def forward(self, x: Residual, ctx: AttentionContext, rotation: Rotation | None) -> None:
        self.attn.update(x, self.attn_norm, self.post_attn_norm, ctx, rotation)
        self.mlp.update(x, self.mlp_norm, self.post_mlp_norm)

    def whole(self, x: Tensor, ctx: AttentionContext, rotation: Rotation | None) -> Tensor:
        """The layer by itself: [T, hidden] -> [T, hidden] ([T/tp, hidden] under sequence parallelism)."""
        stream = Residual(x)
        self(stream, ctx, rotation)
        return stream.total()


BlockCall = Callable[[Tensor, AttentionContext, Rotation | None], Tensor]
"""`Block.whole`, or a function that wraps it."""
StreamCall = Callable[[Residual, AttentionContext, Rotation | None], None]
"""The forward of a block."""


def _on_stream(call: BlockCall) -> StreamCall:
    """A block's function of tensors as one of the residual stream."""

    def forward(x: Residual, ctx: AttentionContext, rotation: Rotation | None) -> None:
        x.x = call(x.total(), ctx, rotation)

    return forward


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
        self._blocks = [
            [cast(Block, self.layers[str(layer)]) for layer in chunk]
            for chunk in state.layout.chunks(state.pp.rank, costs)
        ]
        self._chunks: list[list[StreamCall]] = [list(blocks) for blocks in self._blocks]
        self._rotary = Rotary(config.rope, config.max_position_embeddings) if config.rope is not None else None

    def forward(self, x: Tensor, ctx: AttentionContext, chunk: int = 0) -> Tensor:
        """Run one chunk of layers on hidden states [T, hidden] ([T/tp, hidden] under sequence parallelism).

        For the model's first chunk `x` is token ids, int64 [T]. Returns hidden states.
        """
        if self.embed is not None and chunk == 0:
            x = self.embed(x, ctx.positions)
        elif by_kernels(x):
            x = x.clone()  # they add to the stream in place
        rotation = self._rotary(ctx.positions, ctx.lengths, x.dtype) if self._rotary is not None else None
        stream = Residual(x)
        for block in self._chunks[chunk]:
            block(stream, ctx, rotation)
        return stream.total()

    def wrap_blocks(self, wrap: Callable[[BlockCall], BlockCall]) -> None:
        """Replace the call of each block by `wrap` of it; parameters and their names stay."""
        self._chunks = [[_on_stream(wrap(block.whole)) for block in chunk] for chunk in self._blocks]

    def is_end(self, chunk: int) -> bool:
        """Whether this chunk of this stage is the model's last one, after which `logits` comes."""
        return self.head is not None and chunk == len(self._chunks) - 1

    def logits(self, hidden: Tensor, rows: Tensor | None = None) -> Tensor:
        """Last stage: hidden states [T, hidden] -> logits of this tp rank's part of the vocabulary, [R, vocab/tp].

        `rows`, int64 [R]: the tokens whose logits are wanted; None: all.
        """
        assert self.head is not None and self.norm is not None
        logits: Tensor
        if rows is None:
            logits = self.head.read(Residual(hidden), self.norm)
        else:
            logits = self.head(self.norm(hidden, rows))
        cap = self.config.final_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    @property
    def vocab_widths(self) -> list[int]:
        """Columns of `logits` on each tp rank."""
        return [width(Even(self.config.vocab_size), self.state.tp.size, rank) for rank in range(self.state.tp.size)]
