"""Cross-entropy over a vocabulary that is cut over tp: no rank ever holds a whole row of logits. And the losses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megalite.core.collectives import all_reduce_sum
from megalite.core.parallel_state import Axis
from megalite.train.batch import MicroBatch


@dataclass(frozen=True, kw_only=True)
class TokenLoss:
    """A loss before it is summed; the trainer takes the mean over all tokens of a step, weighted by `batch.weights`."""

    loss: Tensor
    """float32 [T]."""
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """What is reported besides, averaged alike: float32 [T] each, without gradient."""


class Loss(Protocol):
    """What a training step minimises. The names of its metrics are the same for every batch."""

    metric_names: tuple[str, ...]

    def __call__(self, logprobs: Tensor, batch: MicroBatch) -> TokenLoss:
        """`logprobs`: of each target, by the full distribution: float32 [T]."""


class NextToken:
    """The negative log-likelihood of each target."""

    metric_names = ()

    def __call__(self, logprobs: Tensor, batch: MicroBatch) -> TokenLoss:
        return TokenLoss(loss=-logprobs)


NEXT_TOKEN = NextToken()


def cross_entropy(logits: Tensor, targets: Tensor, first_row: int, axis: Axis) -> Tensor:
    """Negative log-likelihood of each target in float32, the same on every rank of the axis: [T].

    `logits` [T, V / tp] are those of vocabulary rows first_row..first_row + V / tp - 1; `targets` int64 [T] are ids of
    the whole vocabulary. Megatron-LM (arXiv 1909.08053, section 3): the maximum, the sum of exponentials and the
    target's logit are reduced over the axis, so T numbers travel instead of T x V.
    """
    if axis.size == 1:
        return F.cross_entropy(logits.float(), targets, reduction="none")
    return _CrossEntropy.apply(logits, targets, first_row, axis)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, first_row: int, axis: Axis) -> Tensor:
        width = logits.shape[1]
        scores = logits.float()
        peak = scores.amax(1)
        if axis.size > 1:
            dist.all_reduce(peak, dist.ReduceOp.MAX, group=axis.group)
        scores = scores - peak[:, None]
        local = targets - first_row
        mine = (local >= 0) & (local < width)
        local = local.clamp(0, width - 1)[:, None]
        chosen = scores.gather(1, local)[:, 0] * mine
        exps = scores.exp_()
        total, chosen = all_reduce_sum(torch.stack([exps.sum(1), chosen]), axis)
        ctx.save_for_backward(exps, total, local, mine)
        ctx.dtype = logits.dtype
        return total.log() - chosen

    @staticmethod
    def backward(ctx, grad: Tensor):
        exps, total, local, mine = ctx.saved_tensors
        grads = exps * (grad / total)[:, None]  # softmax, of which the target's entry is less one
        grads.scatter_add_(1, local, -(grad * mine)[:, None])
        return grads.to(ctx.dtype), None, None, None
