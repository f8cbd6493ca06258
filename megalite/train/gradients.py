"""Gradients that are whole only when they are summed over ranks: over tp, and over the two ends of the pipeline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megalite.core.collectives import all_reduce_sum
from megalite.core.layout import Split, Whole, width
from megalite.core.parallel_state import Axis, ParallelState
from megalite.model.decoder import Decoder
from megalite.weights.table import Weights, pieces


@dataclass(frozen=True, slots=True)
class SharedRows:
    """Rows of a local parameter that other tp ranks hold too: rows lo..hi of `total`, from `start` on in it."""

    start: int
    lo: int
    hi: int
    total: int
    holders: tuple[int, ...]
    """tp ranks that hold each of the rows lo..hi."""

    @property
    def local(self) -> slice:
        return slice(self.start, self.start + self.hi - self.lo)


def is_shared(split: Split, tp: int) -> bool:
    """Whether several of `tp` ranks hold the same rows of a cut matrix: of key and value heads, where they are few."""
    return not isinstance(split, Whole) and sum(width(split, tp, rank) for rank in range(tp)) > split.total


def shared_rows(config: Weights, state: ParallelState) -> dict[str, list[SharedRows]]:
    """The replicated key and value rows by parameter; empty unless there are more tp ranks than KV heads."""
    shared: dict[str, list[SharedRows]] = {}
    tp = state.tp
    layers = state.layout.layers(state.pp.rank, config.layer_costs())
    for piece in pieces(config):
        if piece.stage not in layers or not is_shared(piece.split, tp.size):
            continue
        holders = [0] * piece.split.total
        for rank in range(tp.size):
            for row in range(*piece.split.range(tp.size, rank)):
                holders[row] += 1
        lo, hi = piece.split.range(tp.size, tp.rank)
        start = piece.local_start(tp.size, tp.rank)
        assert piece.dim == 0 and start is not None, "replicated parts are rows, and no expert's"
        rows = SharedRows(start, lo, hi, piece.split.total, tuple(holders[lo:hi]))
        shared.setdefault(piece.param, []).append(rows)
    return shared


class PartialGradients:
    """The gradients of which each tp rank's backward pass has a part, made whole: of norms, and of shared rows.

    Rows that h tp ranks hold get the whole gradient divided by sqrt(h). DeepSpeed adds the square of every tp rank's
    slice to the global gradient norm: so h copies count as one. Adam does not see a constant factor on a row's gradient
    (but for eps), so the update is that of the whole gradient.
    """

    def __init__(self, decoder: Decoder, table: Weights, *, once_a_step: bool):
        """`table`: of the weights that train. `once_a_step`: `complete` does it; else hooks do in every backward pass,
        before DeepSpeed cuts gradients.

        Every tp rank runs the same backward graph, so the hooks' collectives meet in the same order.
        """
        self.tp = decoder.state.tp
        self.holders: dict[str, Tensor] = {}
        """By parameter that has shared rows: how many tp ranks hold each row, float32 [rows]."""
        self.partial: list[nn.Parameter] = []
        self.shared: list[tuple[nn.Parameter, Callable[[Tensor], Tensor]]] = []
        if self.tp.size == 1:
            return
        shared = shared_rows(table, decoder.state)
        for name, param in decoder.named_parameters():
            if not param.requires_grad:
                continue
            if getattr(param, "sum_gradient_over_tp", False):
                self.partial.append(param)
            if name in shared:
                holders = self.holders[name] = torch.ones(param.shape[0], device=param.device)
                for rows in shared[name]:
                    holders[rows.local] = torch.tensor(rows.holders, device=param.device, dtype=torch.float32)
                self.shared.append((param, _sum_shared_rows(shared[name], holders.rsqrt(), self.tp)))
        if not once_a_step:
            for param in self.partial:
                param.register_hook(lambda grad: all_reduce_sum(grad.contiguous().clone(), self.tp))
            for param, summed in self.shared:
                param.register_hook(summed)
            self.partial, self.shared = [], []

    def complete(self, gradient_of: Callable[[nn.Parameter], Tensor | None]) -> None:
        """Sum what a step's backward passes have accumulated. Collective over tp."""
        gradients = [grad for grad in map(gradient_of, self.partial) if grad is not None]
        if gradients:
            whole = all_reduce_sum(torch.cat([grad.flatten() for grad in gradients]), self.tp)
            parts = whole.split([grad.numel() for grad in gradients])
            torch._foreach_copy_(gradients, [part.view_as(grad) for part, grad in zip(parts, gradients, strict=True)])
        for param, summed in self.shared:
            grad = gradient_of(param)
            if grad is not None:
                grad.copy_(summed(grad))


def _sum_shared_rows(shared: list[SharedRows], scale: Tensor, tp: Axis) -> Callable[[Tensor], Tensor]:
    """Sums rows over their holders, and multiplies every row by its scale [rows]."""

    def hook(grad: Tensor) -> Tensor:
        buffers = [grad.new_zeros(rows.total, *grad.shape[1:]) for rows in shared]
        for rows, buffer in zip(shared, buffers, strict=True):
            buffer[rows.lo : rows.hi] = grad[rows.local]
        summed = all_reduce_sum(torch.cat(buffers), tp).split([rows.total for rows in shared])
        grad = grad.clone()
        for rows, total in zip(shared, summed, strict=True):
            grad[rows.local] = total[rows.lo : rows.hi]
        return grad * scale.to(grad.dtype).view(-1, *[1] * (grad.ndim - 1))

    return hook


class TiedEmbedding:
    """A tied embedding's two copies, the table on the first stage and the head on the last, kept the same to the bit.

    Without a copy on this rank, with one parameter that is both, or where it is frozen, there is nothing to do.
    """

    def __init__(self, decoder: Decoder):
        """Collective over the run the first time for a layout: it makes communicators."""
        state = decoder.state
        self.param: nn.Parameter | None = None
        if not decoder.config.tie_embeddings or state.pp.size == 1:
            return
        self.axis, self.dp = state.pipeline_ends(), state.dp
        if decoder.embed is not None:
            self.param = decoder.embed.tokens.weight
        elif decoder.head is not None:
            weight: Any = decoder.head.weight
            weight.ds_pipe_replicated = True  # DeepSpeed counts the other copy in the gradient norm
            self.param = weight
        if self.param is not None and not self.param.requires_grad:
            self.param = None

    def complete_gradient(self, gradient_of: Callable[[nn.Parameter], Tensor | None]) -> None:
        """Sum what both copies have accumulated, before DeepSpeed takes the mean over dp. Collective over the replicas.

        The sum is over dp too, and only the first replica keeps it: DeepSpeed then adds zeros to it, which is exact in
        whatever order it adds and wherever in its buffers a copy lies. So both copies are updated by equal numbers.
        """
        if self.param is None or self.axis is None:
            return
        gradient = gradient_of(self.param)
        assert gradient is not None, "both ends of a pipeline run every micro batch"
        all_reduce_sum(gradient, self.axis)
        if not self.dp.is_first:
            gradient.zero_()
