"""The model definition: one decoder-only transformer for all families, for training and generation, in any layout.

    token ids --embed--> x --> x + sublayer(norm(x)), for each of each layer --> hidden --norm, head--> logits
                first stage              this stage's layers                           last stage

Families differ in `ModelConfig` and in the kinds of which it makes a layer (`kinds/`); each choice is made once, in a
constructor. Parameter names carry global layer indices on every stage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalite.core.functional import by_kernels
from megalite.core.layers import Beside, LayerNorm, Residual, RMSNorm, VocabParallelEmbedding, replicated
from megalite.core.layout import width
from megalite.core.linear import ColumnParallelLinear
from megalite.core.parallel_state import ParallelState
from megalite.core.progress import here
from megalite.model.attention import AttentionContext
from megalite.model.config import ModelConfig
from megalite.model.layers.base import LayerModule, Norms
from megalite.model.rope import Rotary, Rotation


def make_norm(config: ModelConfig, state: ParallelState) -> RMSNorm | LayerNorm:
    """The family's norm over the hidden dimension."""
    size, marks = (config.hidden_size, config.norm_eps), {"partial_gradient": state.sequence_parallel}
    if config.norm.startswith("layer"):
        bias = config.norm != "layer_without_bias"
        return LayerNorm(*size, bias=bias, zero_centred=config.zero_centred, **marks)
    return RMSNorm(*size, zero_centred=config.zero_centred, **marks)


class Block(nn.Module):
    """One layer on the residual stream: its sublayers one after the other, or beside each other, as the config says."""

    def __init__(self, config: ModelConfig, layer: int, state: ParallelState):
        super().__init__()
        self._groups: list[list[tuple[LayerModule, Norms]]] = []
        """Sublayers of a group read the same stream."""
        for part in config.layers[layer].sublayers:
            norm = self._norm(part.norm, config, state)
            module = part.kind.module(config, layer, state)
            self.add_module(part.name, module)
            post = _scaled(self._norm(part.post_norm, config, state), part.scale)
            if not part.beside:
                self._groups.append([])
            self._groups[-1].append((module, Norms(norm, post)))

    def _norm(self, name: str | None, config: ModelConfig, state: ParallelState) -> nn.Module | None:
        """The norm of that name; the first call makes it."""
        if name is not None and name not in self._modules:
            self.add_module(name, make_norm(config, state))
        return None if name is None else self._modules[name]

    def forward(self, x: Residual, ctx: AttentionContext, rotations: Sequence[Rotation]) -> None:
        for group in self._groups:
            stream = x if len(group) == 1 else Beside(x)
            for module, norms in group:
                module.update(stream, norms, ctx, rotations)

    def whole(self, x: Tensor, ctx: AttentionContext, rotations: Sequence[Rotation]) -> Tensor:
        """The layer by itself: [T, hidden] -> [T, hidden] ([T/tp, hidden] under sequence parallelism)."""
        stream = Residual(x)
        self(stream, ctx, rotations)
        return stream.total()


def _scaled(norm: nn.Module | None, scale: float) -> Callable[[Tensor], Tensor] | None:
    """scale * norm(x); None: x itself."""
    if scale == 1.0:
        return norm
    return (lambda x: x * scale) if norm is None else (lambda x: norm(x) * scale)


BlockCall = Callable[[Tensor, AttentionContext, Sequence[Rotation]], Tensor]
"""`Block.whole`, or a function that wraps it."""
StreamCall = Callable[[Residual, AttentionContext, Sequence[Rotation]], None]
"""The forward of a block."""


def _on_stream(call: BlockCall) -> StreamCall:
    """A block's function of tensors as one of the residual stream."""

    def forward(x: Residual, ctx: AttentionContext, rotations: Sequence[Rotation]) -> None:
        x.x = call(x.total(), ctx, rotations)

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
        self.head: ColumnParallelLinear | None = None
        if state.is_last_stage:
            marks: dict[str, Any] = {"bias": config.head_bias, "format": config.format("last", "lm_head")}
            self.head = ColumnParallelLinear(config.hidden_size, (config.head_vocab,), state, **marks)
        if config.tie_embeddings and self.embed is not None and self.head is not None:
            self.head.weight = self.embed.tokens.weight
        self._blocks = [
            [(layer, cast(Block, self.layers[str(layer)])) for layer in chunk]
            for chunk in state.layout.chunks(state.pp.rank, costs)
        ]
        self._chunks: list[list[tuple[int, StreamCall]]] = [list(blocks) for blocks in self._blocks]
        self._rotaries = [Rotary(rope, config.max_position_embeddings) for rope in config.ropes]

    def forward(self, x: Tensor, ctx: AttentionContext, chunk: int = 0) -> Tensor:
        """Run one chunk of layers on hidden states [T, hidden] ([T/tp, hidden] under sequence parallelism).

        For the model's first chunk `x` is token ids, int64 [T]. Returns hidden states.
        """
        if self.embed is not None and chunk == 0:
            x = self.embed(x, ctx.positions)
        elif by_kernels(x):
            x = x.clone()  # they add to the stream in place
        rotations = [rotary(ctx.positions, ctx.lengths, x.dtype) for rotary in self._rotaries]
        stream = Residual(x)
        for layer, block in self._chunks[chunk]:
            here.layer = layer
            block(stream, ctx, rotations)
        here.layer = None
        return stream.total()

    def wrap_blocks(self, wrap: Callable[[BlockCall], BlockCall]) -> None:
        """Replace the call of each block by `wrap` of it; parameters and their names stay."""
        self._chunks = [[(layer, _on_stream(wrap(block.whole))) for layer, block in chunk] for chunk in self._blocks]

    def is_end(self, chunk: int) -> bool:
        """Whether this chunk of this stage is the model's last one, after which `logits` comes."""
        return self.head is not None and chunk == len(self._chunks) - 1

    def normed(self, hidden: Tensor, rows: Tensor | None = None) -> Tensor:
        """Last stage: the head's input, for all hidden states or those at `rows`, times `logit_scale`."""
        assert self.norm is not None
        out: Tensor = self.norm(hidden, rows)
        return out if self.config.logit_scale == 1.0 else out * self.config.logit_scale

    def logits(self, hidden: Tensor, rows: Tensor | None = None) -> Tensor:
        """Last stage: hidden states [T, hidden] -> logits of this tp rank's part of the vocabulary, [R, vocab/tp].

        `rows`, int64 [R]: the tokens whose logits are wanted; None: all.
        """
        assert self.head is not None and self.norm is not None
        logits: Tensor
        if rows is None and self.config.logit_scale == 1.0:
            logits = self.head.read(Residual(hidden), self.norm)
        else:
            logits = self.head(self.normed(hidden, rows))
        cap = self.config.final_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    @property
    def some_weight(self) -> nn.Parameter:
        """A parameter in the model's dtype, so none of the codes and scales of quantized weights."""
        return next(param for param in self.parameters() if hasattr(param, "tensor_model_parallel"))

    @property
    def vocab_widths(self) -> list[int]:
        """Columns of `logits` on each tp rank."""
        return [width(self.config.head_vocab, self.state.tp.size, rank) for rank in range(self.state.tp.size)]
