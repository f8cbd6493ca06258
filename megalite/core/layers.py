"""Layers whose weights are cut over tp. Each takes the `Split`s that the weight table uses too, so both agree.

Parameters carry two marks that training reads: `tensor_model_parallel` (this is a slice; DeepSpeed counts it once per
tp rank in the gradient norm) and `sum_gradient_over_tp` (every tp rank holds the whole and has part of its gradient).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalite.core.collectives import enter_tp, leave_tp
from megalite.core.functional import rms_norm
from megalite.core.layout import Even, Split, width
from megalite.core.parallel_state import ParallelState


def replicated(shape: tuple[int, ...], *, partial_gradient: bool) -> nn.Parameter:
    """A parameter that every tp rank holds whole; `partial_gradient`: a rank's backward sees only part of its use."""
    param = nn.Parameter(torch.empty(shape))
    param.tensor_model_parallel = False
    param.sum_gradient_over_tp = partial_gradient
    return param


def sharded(shape: tuple[int, ...]) -> nn.Parameter:
    """A parameter of which this tp rank holds a slice."""
    param = nn.Parameter(torch.empty(shape))
    param.tensor_model_parallel = True
    param.sum_gradient_over_tp = False
    return param


def store_by_input(module: nn.Module) -> None:
    """Lay the weights of a module's linears out in memory input by input; shapes, names and values stay.

    For matrix products on a CPU in float32: measured 1.4 times as fast for one token and 1.6 times for two, never
    slower for many. One weight is copied at a time. A weight that an embedding shares stays as it is.
    """
    shared = {id(part.weight) for part in module.modules() if isinstance(part, VocabParallelEmbedding)}
    for part in module.modules():
        if isinstance(part, ColumnParallelLinear | RowParallelLinear) and id(part.weight) not in shared:
            part.weight.data = part.weight.data.t().contiguous().t()


Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Of input, weight and bias, as `F.linear`."""


class ColumnParallelLinear(nn.Module):
    """y = x W^T + b with the outputs cut over tp; several matrices that share their input are stacked in one weight.

    [T, in_features] -> [T, sum(widths)], this rank's slice of each split in order.
    """

    def __init__(self, in_features: int, splits: Sequence[Split], state: ParallelState, *, bias: bool):
        super().__init__()
        self.state = state
        self.widths = [width(split, state.tp.size, state.tp.rank) for split in splits]
        self.weight = sharded((sum(self.widths), in_features))
        self.bias = sharded((sum(self.widths),)) if bias else None

    def forward(self, x: Tensor, product: Product = F.linear) -> Tensor:
        """`product`: what is made of the whole x, weight and bias; it may use the weight in another way."""
        return product(enter_tp(x, self.state), self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """y = x W^T + b with the inputs cut over tp: [T, this rank's slice] -> [T, out_features], summed over tp.

    The bias is whole on every rank and added once, after the sum.
    """

    def __init__(self, split: Split, out_features: int, state: ParallelState, *, bias: bool):
        super().__init__()
        self.state = state
        self.weight = sharded((out_features, width(split, state.tp.size, state.tp.rank)))
        self.bias = replicated((out_features,), partial_gradient=state.sequence_parallel) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = leave_tp(F.linear(x, self.weight), self.state)
        return y if self.bias is None else y + self.bias


class VocabParallelEmbedding(nn.Module):
    """Token ids [T] -> [T, dim] with the rows of the table cut over tp; a rank adds zero for ids it does not hold."""

    def __init__(self, vocab_size: int, dim: int, state: ParallelState):
        super().__init__()
        self.state = state
        self.start, self.end = Even(vocab_size).range(state.tp.size, state.tp.rank)
        self.weight = sharded((self.end - self.start, dim))

    def forward(self, token_ids: Tensor) -> Tensor:
        if self.state.tp.size == 1:
            return F.embedding(token_ids, self.weight)
        if self.start == self.end:  # more ranks than rows
            return leave_tp(self.weight.new_zeros(token_ids.shape[0], self.weight.shape[1]), self.state)
        mine = (token_ids >= self.start) & (token_ids < self.end)
        local = torch.where(mine, token_ids - self.start, 0)
        return leave_tp(F.embedding(local, self.weight) * mine.unsqueeze(-1), self.state)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (arXiv 1910.07467), or * (1 + weight) when `zero_centred`."""

    def __init__(self, dim: int, eps: float, *, zero_centred: bool = False, partial_gradient: bool = False):
        super().__init__()
        self.eps = eps
        self.zero_centred = zero_centred
        self.weight = replicated((dim,), partial_gradient=partial_gradient)

    def forward(self, x: Tensor) -> Tensor:
        if self.zero_centred:
            # float32 throughout: 1 + weight loses the weight's low bits in bfloat16
            return rms_norm(x.float(), 1.0 + self.weight.float(), self.eps).type_as(x)
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.Module):
    """(x - mean) / std * weight + bias over the last dimension (arXiv 1607.06450)."""

    def __init__(self, dim: int, eps: float, *, partial_gradient: bool = False):
        super().__init__()
        self.eps = eps
        self.weight = replicated((dim,), partial_gradient=partial_gradient)
        self.bias = replicated((dim,), partial_gradient=partial_gradient)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
