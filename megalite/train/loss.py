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
from megalite.kernels import jit
from megalite.kernels.device import device_memory
from megalite.kernels.loss import softmax_gradient_, softmax_statistics
from megalite.train.micro_batch import MicroBatch

BLOCK = 1 << 25
"""Logits in memory at once, in float32: 128 MiB, and a copy or two while they are worked on."""
SHARE = 32
"""The part of a GPU's memory that logits in two bytes may take instead: there is never a second copy of them."""
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
    block at a time, forward by rows and backward by columns, so [T, V] exists in no precision unless it is one block;
    then it is kept for the backward pass, which else makes the logits again. Over the axis only T numbers travel
    (Megatron-LM, arXiv 1909.08053, section 3).
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
        softmax = (_Fused if has_kernels(hidden) else _Plain)(temperature, softcap, hidden)
        local = targets - first_row
        lse = hidden.new_full(targets.shape, -torch.inf, dtype=torch.float32)
        """Log of the sum of exponentials over this rank's columns."""
        chosen, made = torch.zeros_like(lse), None
        for rows in softmax.blocks(len(hidden), width) if width else ():
            lse[rows], chosen[rows], made = softmax.statistics(F.linear(hidden[rows], weight), local[rows])
        peak = all_reduce_max(lse.clone(), axis)
        share = lse - peak - all_reduce_sum((lse - peak).exp(), axis).log()
        """Log of this rank's share of the probability."""
        # One block is kept for the backward pass: smaller than what is kept of most layers.
        kept = made if made is not None and len(made) == len(targets) else None
        ctx.save_for_backward(hidden, weight, local, lse, share, kept)
        ctx.softmax = softmax
        mine = (local >= 0) & (local < width)
        return all_reduce_sum(torch.where(mine, chosen + share, 0.0), axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, local, lse, share, kept = ctx.saved_tensors
        softmax: _Plain | _Fused = ctx.softmax
        into_hidden: Tensor | None = None
        into_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        blocks = [slice(0, len(weight))] if kept is not None else softmax.blocks(len(weight), len(hidden))
        for block in blocks:
            part, place = weight[block], local - block.start
            if kept is not None:
                grads = softmax.gradient_of_kept(kept, place, lse, share, grad)
            else:
                grads = softmax.gradient(F.linear(hidden, part), place, lse - share, grad)
            product = grads @ part
            into_hidden = product if into_hidden is None else into_hidden.float() + product
            if into_weight is not None:
                torch.mm(grads.t(), hidden, out=into_weight[block])
        into_hidden = torch.zeros_like(hidden) if into_hidden is None else into_hidden.to(hidden.dtype)
        return into_hidden, into_weight, None, None, None, None, None


class _Plain:
    """A softmax over a block of logits [R, C], and its gradient, in operations of PyTorch.

    With p the softmax, the gradient of a row's logits is (onehot(target) - p) grad / temperature. `local`: columns of
    the targets, int64 [R], of which some are outside of the block; `grad`: of their log-probabilities, float32 [R].
    """

    def __init__(self, temperature: float, softcap: float | None, hidden: Tensor):
        self.temperature = temperature
        self.softcap = softcap
        self.dtype = hidden.dtype
        self.numbers = BLOCK

    def blocks(self, count: int, width: int) -> list[slice]:
        """`count` rows of `width` numbers, in blocks of `numbers` or of LEAST_ROWS rows."""
        size = max(LEAST_ROWS, self.numbers // max(width, 1))
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]

    def statistics(self, scores: Tensor, local: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log of the sum of exponentials; log-probability of each target; what to keep for `gradient_of_kept`."""
        scores = self._changed(scores)
        logs = scores.log_softmax(1, dtype=torch.float32)
        highest, place = scores.max(1)
        lse = highest.float() - logs.gather(1, place[:, None])[:, 0]
        chosen = logs.gather(1, local.clamp(0, scores.shape[1] - 1)[:, None])[:, 0]
        return lse, chosen, logs if self.softcap is None else None

    def gradient(self, scores: Tensor, local: Tensor, lse: Tensor, grad: Tensor) -> Tensor:
        """Gradient of the logits; `lse`: over the whole vocabulary, float32 [R]."""
        changed = self._changed(scores)
        into = self._without_slope((changed - lse[:, None]).exp_(), local)
        if self.softcap is not None:  # d (cap tanh(z / cap)) / dz, from the capped logits
            into.mul_(1 - (changed * (self.temperature / self.softcap)).square_())
        return self._sloped(into, grad)

    def gradient_of_kept(self, logs: Tensor, local: Tensor, lse: Tensor, share: Tensor, grad: Tensor) -> Tensor:
        return self._sloped(self._without_slope((logs + share[:, None]).exp_(), local), grad)

    def _without_slope(self, probabilities: Tensor, local: Tensor) -> Tensor:
        width = probabilities.shape[1]
        here = (local >= 0) & (local < width)
        return probabilities.scatter_add_(1, local.clamp(0, width - 1)[:, None], -here[:, None].float())

    def _sloped(self, into: Tensor, grad: Tensor) -> Tensor:
        slope = (-grad / self.temperature)[:, None]
        return torch.mul(into, slope, out=torch.empty_like(into, dtype=self.dtype))

    def _changed(self, scores: Tensor) -> Tensor:
        """After softcap and temperature: in the model's dtype, as in generation, or float32 once changed."""
        if self.softcap is not None:
            scores = scores.float().div_(self.softcap).tanh_().mul_(self.softcap)
        return scores if self.temperature == 1 else scores.float() / self.temperature


class _Fused(_Plain):
    """`_Plain` by kernels that read the logits once and put the gradient in their place."""

    def __init__(self, temperature: float, softcap: float | None, hidden: Tensor):
        super().__init__(temperature, softcap, hidden)
        if hidden.is_cuda and hidden.itemsize == 2:
            self.numbers = max(BLOCK, device_memory(hidden.device) // (SHARE * hidden.itemsize))

    def statistics(self, scores: Tensor, local: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return *softmax_statistics(scores, local, temperature=self.temperature, softcap=self.softcap), scores

    def gradient(self, scores: Tensor, local: Tensor, lse: Tensor, grad: Tensor) -> Tensor:
        return softmax_gradient_(
            scores, local, lse, grad.contiguous(), temperature=self.temperature, softcap=self.softcap
        )

    def gradient_of_kept(self, scores: Tensor, local: Tensor, lse: Tensor, share: Tensor, grad: Tensor) -> Tensor:
        return self.gradient(scores, local, lse - share, grad)


def has_kernels(x: Tensor) -> bool:
    """Whether Triton's kernels can be used on `x`."""
    return x.is_cuda and jit.triton is not None
