"""What is learnt from rewarded samples: advantages, importance weights, and the loss of a policy update.

Group-relative policy optimisation (GRPO) is from arXiv 2402.03300; the mean over all tokens of an update, rather than
over each sample first, is from DAPO (arXiv 2503.14476), as is the clip range of two sides.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from megalite.train.loss import TokenLoss
from megalite.train.micro_batch import MicroBatch

T = TypeVar("T")

DEVIATION_FLOOR = 1e-6
"""Keeps a group of nearly equal rewards from being divided by nothing."""
EQUAL = 1e-9
"""Rewards that differ by less, absolutely or of their size, are equal: what is left is rounding."""


def chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Parts of `size` items, one after another; the last may be shorter."""
    return (items[at : at + size] for at in range(0, len(items), size))


def group_advantages(rewards: Sequence[float], *, divide: bool) -> list[float]:
    """How much better each sample is than the mean of its group; with `divide`, in standard deviations of the group.

    In a group of equals they are exactly 0: Adam makes a whole step of any other number, however small.
    """
    if math.isclose(min(rewards), max(rewards), rel_tol=EQUAL, abs_tol=EQUAL):
        return [0.0] * len(rewards)
    mean = statistics.fmean(rewards)
    deviation = statistics.pstdev(rewards) + DEVIATION_FLOOR if divide else 1.0
    return [(reward - mean) / deviation for reward in rewards]


def best_of_group(rewards: Sequence[float], *, above: float) -> int | None:
    """Place of the best sample, the first of equals; None if no reward is above `above`."""
    best = max(range(len(rewards)), key=lambda place: (rewards[place], -place))
    return best if rewards[best] > above else None


def importance_weights(
    trainer: Sequence[float], sampler: Sequence[float], *, kind: Literal["off", "token", "sequence"], limit: float
) -> list[float]:
    """Weight of each token of a sample: its probability by the trainer over that by the sampler, at most `limit`.

    Truncated importance sampling: it corrects for samples drawn by other weights, or by the same in lower precision.
    `sequence` gives every token the ratio of the whole sample.
    """
    if kind == "off":
        return [1.0] * len(trainer)
    differences = [ours - theirs for ours, theirs in zip(trainer, sampler, strict=True)]
    if kind == "sequence":
        differences = [math.fsum(differences)] * len(differences)
    ceiling = math.log(limit)
    return [math.exp(min(difference, ceiling)) for difference in differences]


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far sampler and trainer agree on the log-probabilities of the same tokens."""

    largest: float = 0.0
    """Largest absolute difference."""
    mean: float = 0.0
    share_off: float = 0.0
    """Share of the tokens whose probabilities differ by more than 1%."""


def agreement(trainer: Sequence[Sequence[float]], sampler: Sequence[Sequence[float]]) -> Agreement:
    """The agreement over the tokens of all samples."""
    differences = [
        abs(ours - theirs)
        for one, other in zip(trainer, sampler, strict=True)
        for ours, theirs in zip(one, other, strict=True)
    ]
    if not differences:
        return Agreement()
    off = [math.expm1(difference) > 0.01 for difference in differences]
    return Agreement(max(differences), statistics.fmean(differences), statistics.fmean(off))


@dataclass(frozen=True)
class PolicyLoss:
    """The clipped surrogate of GRPO, with a penalty for leaving a reference model where `kl_coefficient` > 0.

    A micro batch brings `advantage`, `importance`, `old` (log-probabilities by the trainer when the samples were taken
    over) and, with the penalty, `reference`.
    """

    clip_low: float
    clip_high: float
    kl_coefficient: float = 0.0
    metric_names = ("clipped", "kl")

    def __call__(self, logprobs: Tensor, batch: MicroBatch) -> TokenLoss:
        values = batch.values
        ratio = (logprobs - values["old"]).exp()
        bounded = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        surrogate = torch.minimum(ratio * values["advantage"], bounded * values["advantage"])
        loss = -values["importance"] * surrogate
        kl = torch.zeros_like(loss)
        if self.kl_coefficient > 0:
            behind = values["reference"] - logprobs
            kl = behind.exp() - behind - 1  # the estimator k3: unbiased, and never negative (Schulman 2020)
            loss = loss + self.kl_coefficient * kl
        clipped = (surrogate < ratio * values["advantage"]).float()
        return TokenLoss(loss=loss, metrics={"clipped": clipped, "kl": kl.detach()})
