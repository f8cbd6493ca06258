"""Cross-entropy over a vocabulary that is cut over tp: no rank ever holds a whole row of logits."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.core.collectives import all_reduce_sum
from megalite.core.parallel_state import Axis


def cross_entropy(logits: Tensor, targets: Tensor, first_row: int, axis: Axis) -> Tensor:
    """Negative log-likelihood of each target in float32, the same on every rank of the axis: [T].

    `logits` [T, V / tp] are those of vocabulary rows first_row..first_row + V / tp - 1; `targets` int64 [T] are ids of
    the whole vocabulary. Megatron-LM (arXiv 1909.08053, section 3): the maximum, the sum of exponentials and the
    target's logit are reduced over the axis, so T numbers travel instead of T x V.
    """
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
