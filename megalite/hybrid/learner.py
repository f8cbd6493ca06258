"""The training side of a hybrid job on one rank: what is made of rewarded samples, and of the task's own responses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from megalite.config.schema import HybridSection
from megalite.core.collectives import all_reduce_sum
from megalite.errors import MegaliteError
from megalite.hybrid.algorithms import (
    Agreement,
    PolicyLoss,
    agreement,
    best_of_group,
    group_advantages,
    importance_weights,
)
from megalite.hybrid.rollout import Rollout
from megalite.train.data.examples import Encoded
from megalite.train.data.packing import pack
from megalite.train.loss import NEXT_TOKEN, Loss
from megalite.train.micro_batch import MicroBatch, blank, from_sequences
from megalite.train.trainer import Trainer

Logprobs = Callable[[Sequence[MicroBatch]], list[Tensor]]
"""Log-probabilities of the targets of this replica's micro batches, on every rank of it."""


@dataclass(frozen=True, kw_only=True)
class UpdateResult:
    """What an iteration came to."""

    advantages: list[float]
    """Of each rollout; for rejection sampling 1 if it was learnt from, else 0."""
    trainer_logprobs: list[tuple[float, ...]]
    """Of each rollout's tokens, before the update."""
    agreement: Agreement
    metrics: dict[str, float]
    """Means over the iteration's updates: `loss`, those of the loss, `gradient_norm`; empty if there was none."""


class Learner:
    """Updates by one trainer. Every method is collective over the training layout, with the same arguments."""

    def __init__(
        self,
        trainer: Trainer,
        section: HybridSection,
        *,
        micro_batch_tokens: int,
        temperature: float = 1.0,
        reference: Logprobs | None = None,
    ):
        """`temperature`: at which the rollouts are drawn, and so that of the policy whose log-probabilities count.

        `reference`: the model that the run began with, where the loss measures the distance from it.
        """
        self.trainer = trainer
        self.section = section
        self.capacity = micro_batch_tokens
        self.temperature = temperature
        self.reference = reference

    def supervise(self, examples: Sequence[Encoded]) -> dict[str, float]:
        """One step on responses; loss and gradient norm."""
        [mine] = self._plan([[len(example.ids) - 1 for example in examples]])
        batches = [
            from_sequences(
                [examples[index].ids for index in packed],
                [list(map(float, examples[index].loss_mask[1:])) for index in packed],
            )
            if packed
            else blank(self._tp)
            for packed in mine
        ]
        return self._step(batches, NEXT_TOKEN)

    def learn(self, groups: Sequence[Sequence[Rollout]], rewards: Sequence[float]) -> UpdateResult:
        """The updates of one iteration; `rewards` of the rollouts, group after group."""
        rollouts = list(chain.from_iterable(groups))
        each = list(_split(range(len(rollouts)), self.section.updates_per_step))
        plans = self._plan([[len(rollouts[index].tokens) - 1 for index in update] for update in each])
        mine = [
            [[update[place] for place in packed] for packed in plan] for update, plan in zip(each, plans, strict=True)
        ]
        trainer_logprobs = self._score(self.trainer.logprobs, rollouts, list(chain.from_iterable(mine)))
        found = agreement(trainer_logprobs, [rollout.logprobs for rollout in rollouts])
        if self.section.algorithm == "grpo":
            size = len(groups[0])
            advantages = [
                advantage
                for group in _chunks(rewards, size)
                for advantage in group_advantages(group, divide=self.section.divide_by_deviation)
            ]
            metrics = self._update_policy(rollouts, mine, each, advantages, trainer_logprobs)
        else:
            advantages = self._chosen(groups, rewards)
            metrics = self._imitate(rollouts, each, advantages)
        return UpdateResult(
            advantages=advantages, trainer_logprobs=trainer_logprobs, agreement=found, metrics=_means(metrics)
        )

    # ---- the two algorithms

    def _update_policy(
        self,
        rollouts: Sequence[Rollout],
        mine: list[list[list[int]]],
        each: list[Sequence[int]],
        advantages: Sequence[float],
        old: Sequence[tuple[float, ...]],
    ) -> list[dict[str, float]]:
        section = self.section
        loss = PolicyLoss(clip_low=section.clip_low, clip_high=section.clip_high, kl_coefficient=section.kl_coefficient)
        reference = None
        if self.reference is not None:
            reference = self._score(self.reference, rollouts, list(chain.from_iterable(mine)))

        def per_token(index: int) -> dict[str, list[float]]:
            count = len(rollouts[index].token_ids)
            found = {
                "advantage": [advantages[index]] * count,
                "old": list(old[index]),
                "importance": importance_weights(
                    old[index],
                    rollouts[index].logprobs,
                    kind=section.importance_correction,
                    limit=section.importance_limit,
                ),
            }
            return found | ({"reference": list(reference[index])} if reference is not None else {})

        metrics = []
        for update, packs in zip(each, mine, strict=True):
            if not any(advantages[index] for index in update):
                continue  # every sample is as good as its group: nothing to learn, and Adam makes steps of rounding
            metrics.append(self._step([self._batch(rollouts, packed, per_token) for packed in packs], loss))
        return metrics

    def _chosen(self, groups: Sequence[Sequence[Rollout]], rewards: Sequence[float]) -> list[float]:
        chosen = []
        for group in _chunks(rewards, len(groups[0])):
            best = best_of_group(group, above=self.section.keep_above)
            chosen += [float(place == best) for place in range(len(group))]
        return chosen

    def _imitate(
        self, rollouts: Sequence[Rollout], each: list[Sequence[int]], chosen: Sequence[float]
    ) -> list[dict[str, float]]:
        metrics = []
        for update in each:
            kept = [index for index in update if chosen[index]]
            if not kept:
                continue
            [packs] = self._plan([[len(rollouts[index].tokens) - 1 for index in kept]])
            batches = [
                replace(self._batch(rollouts, [kept[place] for place in packed], lambda index: {}), temperature=1.0)
                for packed in packs
            ]
            metrics.append(self._step(batches, NEXT_TOKEN))
        return metrics

    # ---- common

    @property
    def _tp(self) -> int:
        return self.trainer.state.tp.size

    def _plan(self, updates: list[list[int]]) -> list[list[list[int]]]:
        """This replica's micro batches of each update, from its sequences' lengths."""
        dp = self.trainer.state.dp
        return [pack(lengths, self.capacity, dp.size)[dp.rank] for lengths in updates]

    def _batch(
        self, rollouts: Sequence[Rollout], packed: Sequence[int], per_token: Callable[[int], dict[str, list[float]]]
    ) -> MicroBatch:
        """The rollouts at `packed`, at their temperature; their own tokens count and have the values of `per_token`."""
        if not packed:
            names = per_token(0)
            empty = blank(self._tp)
            return replace(empty, values={name: torch.zeros(empty.num_tokens) for name in names})
        given = {index: [0.0] * (len(rollouts[index].prompt_token_ids) - 1) for index in packed}
        values = {index: per_token(index) for index in packed}
        batch = from_sequences(
            [rollouts[index].tokens for index in packed],
            [given[index] + [1.0] * len(rollouts[index].token_ids) for index in packed],
            {name: [given[index] + values[index][name] for index in packed] for name in values[packed[0]]},
        )
        return replace(batch, temperature=self.temperature)

    def _score(
        self, logprobs: Logprobs, rollouts: Sequence[Rollout], packs: Sequence[Sequence[int]]
    ) -> list[tuple[float, ...]]:
        """Log-probabilities of the sampled tokens of all rollouts, of which this replica computes those in `packs`."""
        starts = [0]
        for rollout in rollouts:
            starts.append(starts[-1] + len(rollout.token_ids))
        found = torch.zeros(starts[-1], device=self.trainer.device)
        scores = logprobs([self._batch(rollouts, packed, lambda index: {}) for packed in packs])
        for packed, batch in zip(packs, scores, strict=True):
            offset = 0
            for index in packed:
                offset += len(rollouts[index].tokens) - 1
                count = len(rollouts[index].token_ids)
                found[starts[index] : starts[index + 1]] = batch[offset - count : offset]
        values = all_reduce_sum(found, self.trainer.state.dp).tolist()  # others have zeros where this one has values
        return [tuple(values[lo:hi]) for lo, hi in zip(starts, starts[1:], strict=False)]

    def _step(self, batches: Sequence[MicroBatch], loss: Loss) -> dict[str, float]:
        report = self.trainer.step(batches, loss)
        values = {**self.trainer.read(report), "gradient_norm": self.trainer.gradient_norm}
        wrong = next((name for name, value in values.items() if not math.isfinite(value)), None)
        if wrong is not None:
            raise MegaliteError(
                f"optimizer step {self.trainer.steps_done}: {wrong} is {values[wrong]:g}. Lower "
                f"optimizer.learning_rate (now {self.trainer.section.learning_rate:g}); run again, the job goes on "
                "from its last checkpoint."
            )
        return values


def _split(items: Sequence[int], parts: int) -> Iterator[Sequence[int]]:
    size = len(items) // parts
    return (items[at : at + size] for at in range(0, size * parts, size))


def _chunks(items: Sequence[float], size: int) -> Iterator[Sequence[float]]:
    return (items[at : at + size] for at in range(0, len(items), size))


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: math.fsum(row[name] for row in rows) / len(rows) for name in (rows[0] if rows else ())}
