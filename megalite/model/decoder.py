"""The one model definition: a decoder built from parallel layers, for training and generation, in any layout.

    token ids --embed--> x --> [ x + attn(norm(x)), x + mlp(norm(x)) ] per layer --> hidden --norm, head--> logits
                first stage              this stage's layers                           last stage

Families differ in `ModelConfig` fields; each choice is made once, in a constructor. Parameter names carry global layer
indices on every stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalite.core.elementwise import gated, rotate
from megalite.core.layers import (
    ColumnParallelLinear,
    LayerNorm,
    RMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
    replicated,
)
from megalite.core.layout import Even, KVHeads, QueryHeads
from megalite.core.moe import MixtureOfExperts
from megalite.core.parallel_state import ParallelState
from megalite.model.attention import AttentionContext
from megalite.model.config import ModelConfig, Rope, RopeScaling

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


def make_norm(config: ModelConfig, state: ParallelState) -> nn.Module:
    """The family's norm over the hidden dimension."""
    partial_gradient = state.sequence_parallel
    if config.norm == "layer":
        return LayerNorm(config.hidden_size, config.norm_eps, partial_gradient=partial_gradient)
    zero_centred = config.norm == "rms_zero_centred"
    return RMSNorm(config.hidden_size, config.norm_eps, zero_centred=zero_centred, partial_gradient=partial_gradient)


def rope_frequencies(rope: Rope, max_length: int) -> tuple[Tensor, float]:
    """Angle per position of each rotated channel pair (float32 [rotary_dim / 2]) and the factor on cos and sin."""
    exponent = torch.arange(0, rope.rotary_dim, 2, dtype=torch.float32) / rope.rotary_dim
    frequencies = 1.0 / rope.theta**exponent
    scaling = rope.scaling
    if scaling is None:
        return frequencies, 1.0
    return _SCALINGS[scaling.kind](frequencies, rope, scaling, max_length)


def _linear(frequencies: Tensor, rope: Rope, scaling: RopeScaling, max_length: int) -> tuple[Tensor, float]:
    return frequencies / scaling.factor, 1.0


def _llama3(frequencies: Tensor, rope: Rope, scaling: RopeScaling, max_length: int) -> tuple[Tensor, float]:
    """Long wavelengths are stretched, short ones kept, those between blended (Llama 3.1 model card)."""
    turns = scaling.original_max_position * frequencies / (2 * math.pi)  # rotations over the original context
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor), 1.0


def _yarn(frequencies: Tensor, rope: Rope, scaling: RopeScaling, max_length: int) -> tuple[Tensor, float]:
    """YaRN, arXiv 2309.00071: a ramp over channels between kept and stretched, and a warmer softmax."""

    def channel(rotations: float) -> float:
        wavelength = scaling.original_max_position / (rotations * 2 * math.pi)
        return rope.rotary_dim * math.log(wavelength) / (2 * math.log(rope.theta))

    low = max(math.floor(channel(scaling.beta_fast)), 0)
    high = min(math.ceil(channel(scaling.beta_slow)), rope.rotary_dim - 1)
    ramp = (torch.arange(rope.rotary_dim // 2, dtype=torch.float32) - low) / max(high - low, 1e-3)
    kept = 1 - ramp.clamp(0, 1)
    factor = scaling.attention_factor
    if factor is None:
        factor = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return frequencies * (kept + (1 - kept) / scaling.factor), factor


def _longrope(frequencies: Tensor, rope: Rope, scaling: RopeScaling, max_length: int) -> tuple[Tensor, float]:
    """LongRoPE, arXiv 2402.13753. The longest length the engine serves chooses the divisors, once for all requests."""
    divisors = scaling.long_factor if max_length > scaling.original_max_position else scaling.short_factor
    factor = scaling.attention_factor
    if factor is None:
        stretch = scaling.factor
        factor = math.sqrt(1 + math.log(stretch) / math.log(scaling.original_max_position)) if stretch > 1 else 1.0
    return frequencies / torch.tensor(divisors), factor


_SCALINGS = {"linear": _linear, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope}


class Rotation:
    """Rotates heads by their token's angle: the cos and sin of one forward pass, shared by its layers."""

    def __init__(self, frequencies: Tensor, factor: float, positions: Tensor, dtype: torch.dtype):
        angles = positions[:, None].float() * frequencies  # [T, rotary / 2]
        self.cos = (angles.cos() * factor).to(dtype)[:, None]
        self.sin = (angles.sin() * factor).to(dtype)[:, None]

    def __call__(self, x: Tensor) -> Tensor:
        """[T, H, D] -> [T, H, D]; channels beyond the rotated ones pass through."""
        return rotate(x, self.cos, self.sin)


class Attention(nn.Module):
    """Self-attention with heads cut over tp; how to attend is the context's."""

    def __init__(self, config: ModelConfig, layer: int, state: ParallelState):
        super().__init__()
        self.spec = config.attention[layer]
        self.head_dim = config.head_dim
        queries = QueryHeads(config.num_heads, config.num_kv_heads, config.head_dim)
        keys = KVHeads(config.num_kv_heads, config.head_dim)
        self.qkv = ColumnParallelLinear(config.hidden_size, (queries, keys, keys), state, bias=config.qkv_bias)
        self.out = RowParallelLinear(queries, config.hidden_size, state, bias=config.attention_out_bias)
        self.heads = [width // config.head_dim for width in self.qkv.widths]  # local query, key, value heads
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
        attended = ctx.attend(self.spec, q, k, v)
        return self.out(attended.flatten(-2))


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
        return self.down(gated(hidden, self.activation) if self.gated else ACTIVATIONS[self.activation](hidden))


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
        activation=ACTIVATIONS[config.activation],
        state=state,
    )


class Block(nn.Module):
    """One layer. `post_attn_norm` and `post_mlp_norm` are identities in families that have none."""

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
        return x + self.post_mlp_norm(self.mlp(self.mlp_norm(x)))


BlockCall = Callable[[Tensor, AttentionContext, Rotation | None], Tensor]
"""A block, or what calls it."""


class Embedding(nn.Module):
    """Token ids to the first layer's input: table, learned positions and scale as the family has them."""

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
        """int64 [T], [T] -> [T or T/tp, hidden]."""
        x = self.tokens(token_ids)
        if self.scale is not None:
            x = x * torch.tensor(self.scale, dtype=x.dtype)
        if self.positions is not None:
            if self.state.sequence_parallel:
                positions = positions.chunk(self.state.tp.size)[self.state.tp.rank]
            x = x + F.embedding(positions, self.positions)
        return x


class Decoder(nn.Module):
    """The layers of this rank's pipeline stage, with the embedding on the first and the head on the last.

    They are run chunk by chunk, see `Layout`; in inference a stage has one chunk. `max_length` is the longest sequence
    it will be used for; only families with LongRoPE depend on it.
    """

    def __init__(self, config: ModelConfig, state: ParallelState, *, max_length: int | None = None):
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
        self._frequencies, self._rope_factor = (None, 1.0)
        if config.rope is not None:
            with torch.device("cpu"):
                self._frequencies, self._rope_factor = rope_frequencies(
                    config.rope, max_length or config.max_position_embeddings
                )

    def forward(self, x: Tensor, ctx: AttentionContext, chunk: int = 0) -> Tensor:
        """Token ids int64 [T] in the model's first chunk, hidden states [T or T/tp, hidden] in others -> hidden."""
        if self.embed is not None and chunk == 0:
            x = self.embed(x, ctx.positions)
        rotation = None
        if self._frequencies is not None:
            if self._frequencies.device != x.device:
                self._frequencies = self._frequencies.to(x.device)
            rotation = Rotation(self._frequencies, self._rope_factor, ctx.positions, x.dtype)
        for block in self._chunks[chunk]:
            x = block(x, ctx, rotation)
        return x

    def wrap_blocks(self, wrap: Callable[[BlockCall], BlockCall]) -> None:
        """Call each block through what `wrap` makes of it, from now on; parameters and their names stay."""
        self._chunks = [[wrap(block) for block in chunk] for chunk in self._chunks]

    def is_end(self, chunk: int) -> bool:
        """Whether the head comes after this chunk."""
        return self.head is not None and chunk == len(self._chunks) - 1

    def logits(self, hidden: Tensor) -> Tensor:
        """After the last chunk: hidden states [R, hidden] -> logits of this tp rank's vocab rows [R, vocab / tp]."""
        logits = self.head(self.norm(hidden))
        cap = self.config.final_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    @property
    def vocab_widths(self) -> list[int]:
        """Vocab rows on each tp rank."""
        split = Even(self.config.vocab_size)
        return [hi - lo for lo, hi in (split.range(self.state.tp.size, r) for r in range(self.state.tp.size))]
