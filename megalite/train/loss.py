"""Log-probabilities over a vocabulary that is cut over tp and never whole in memory; and the losses over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalite.core.collectives import all_reduce_max, all_reduce_sum
from megalite.core.parallel_state import Axis
from megalite.train.micro_batch import MicroBatch

BLOCK = 1 << 25
"""Logits in memory at once, in float32: 128 MiB, and a copy or two while they are worked on."""
LEAST_ROWS = 128
"""Rows (or columns) of a block even where they are long: fewer would leave a GPU idle."""


@dataclass(frozen=True, kw_only=True)
class TokenLoss:
    """A loss before it is summed; the trainer takes the mean over all tokens of a step, weighted by `batch.weights`."""

    loss: Tensor
    """float32 [T]."""
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """What is reported besides, averaged alike: float32 [T] each, without gradient."""


class Loss(Protocol):
    """What a training step minimises."""

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The names of its metrics, the same for every batch."""

    def __call__(self, logprobs: Tensor, batch: MicroBatch) -> TokenLoss:
        """`logprobs`: of each target, by the full distribution at the batch's temperature: float32 [T]."""


class NextToken:
    """The negative log-likelihood of each target."""

    metric_names: tuple[str, ...] = ()

    def __call__(self, logprobs: Tensor, batch: MicroBatch) -> TokenLoss:
        return TokenLoss(loss=-logprobs)


NEXT_TOKEN = NextToken()


def target_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    axis: Axis,
    first_row: int,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Log-probability of each target by softmax(logits / temperature), the same on every rank of the axis: float32 [T].

    `hidden` [T, D] is what the head is applied to; `weight` [V / tp, D] are this rank's rows of the head, from row
    `first_row` of the vocabulary on; `targets` int64 [T] are ids of the whole vocabulary. Logits are made of the two a
    block at a time, forward by rows and backward by columns, so [T, V] exists in no precision unless it is one block.
    Over the axis only T numbers travel (Megatron-LM, arXiv 1909.08053, section 3).
    """
    apply: Callable[..., Tensor] = _TargetLogprobs.apply
    return apply(hidden, weight, targets, axis, first_row, temperature, softcap)


class _TargetLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        axis: Axis,
        first_row: int,
        temperature: float,
        softcap: float | None,
    ) -> Tensor:
        width = weight.shape[0]
        local = targets - first_row
        mine = (local >= 0) & (local < width)
        lse = hidden.new_full(targets.shape, -torch.inf, dtype=torch.float32)
        """Log of the sum of exponentials over this rank's columns."""
        chosen, logs = torch.zeros_like(lse), None
        for rows in _blocks(hidden.shape[0], width) if width else ():
            scores = _scores(hidden[rows], weight, temperature, softcap)
            logs = scores.log_softmax(1, dtype=torch.float32)
            highest, place = scores.max(1)
            lse[rows] = highest.float() - logs.gather(1, place[:, None])[:, 0]
            chosen[rows] = logs.gather(1, local[rows].clamp(0, width - 1)[:, None])[:, 0]
        peak = all_reduce_max(lse.clone(), axis)
        share = lse - peak - all_reduce_sum((lse - peak).exp(), axis).log()
        """Log of this rank's share of the probability."""
        # One block without a cap is kept for the backward pass: smaller than what is kept of most layers.
        kept = logs if logs is not None and len(logs) == len(targets) and softcap is None else None
        ctx.save_for_backward(hidden, weight, local, lse, share, kept)
        ctx.temperature, ctx.softcap = temperature, softcap
        return all_reduce_sum(torch.where(mine, chosen + share, 0.0), axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """With p the softmax, the gradient of a row's logits is (onehot(target) - p) grad / temperature."""
        hidden, weight, local, lse, share, kept = ctx.saved_tensors
        into_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        into_weight = torch.empty_like(weight)
        grad = (-grad / ctx.temperature)[:, None]
        columns = [slice(0, weight.shape[0])] if kept is not None else _blocks(weight.shape[0], hidden.shape[0])
        for block in columns:
            part, scores = weight[block], None
            if kept is not None:
                probabilities = (kept + share[:, None]).exp_()
            else:
                scores = _scores(hidden, part, ctx.temperature, ctx.softcap)
                probabilities = (scores - (lse - share)[:, None]).exp_()
            place = local - block.start
            here = (place >= 0) & (place < len(part))
            probabilities.scatter_add_(1, place.clamp(0, len(part) - 1)[:, None], -here[:, None].float())
            if ctx.softcap is not None:  # d (cap tanh(z / cap)) / dz, from the capped logits
                probabilities.mul_(1 - (scores * (ctx.temperature / ctx.softcap)).square_())
            grads = torch.mul(probabilities, grad, out=torch.empty_like(probabilities, dtype=weight.dtype))
            into_hidden += grads @ part
            torch.mm(grads.t(), hidden, out=into_weight[block])
        return into_hidden.to(hidden.dtype), into_weight, None, None, None, None, None


def _scores(hidden: Tensor, weight: Tensor, temperature: float, softcap: float | None) -> Tensor:
    """Logits over the temperature: in the numbers of the model, as generation has them, or float32 once changed."""
    scores = F.linear(hidden, weight)
    if softcap is not None:
        scores = scores.float().div_(softcap).tanh_().mul_(softcap)
    return scores if temperature == 1 else scores.float() / temperature


def _blocks(count: int, width: int) -> list[slice]:
    """`count` rows of `width` numbers, in blocks of BLOCK numbers or LEAST_ROWS rows."""
    size = max(LEAST_ROWS, BLOCK // max(width, 1))
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
