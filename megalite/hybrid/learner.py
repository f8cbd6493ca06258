"""The training side of a hybrid job on one rank: updates from scored samples, and from the task's own responses."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

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
    chunks,
    group_advantages,
    importance_weights,
)
from megalite.hybrid.rollout import Rollout, ScoredRollout
from megalite.rewards.pool import Scored
from megalite.train.data.examples import Encoded
from megalite.train.data.packing import pack
from megalite.train.loss import NEXT_TOKEN, Loss
from megalite.train.micro_batch import MicroBatch, blank, from_sequences
from megalite.train.trainer import Trainer

Logprobs = Callable[[Sequence[MicroBatch]], list[Tensor]]
"""Log-probabilities of the targets of this replica's micro batches, on every rank of it."""
Values = Callable[[int], dict[str, list[float]]]
"""By the index of a rollout: what a loss needs of each of its sampled tokens, by name."""


@dataclass(frozen=True, kw_only=True)
class UpdateResult:
    """Results of an iteration's updates."""

    scored: list[ScoredRollout]
    """Results of each rollout; log-probabilities are those before the updates."""
    agreement: Agreement
    metrics: dict[str, float]
    """Means over the updates: `loss`, those of the loss, `gradient_norm`; empty if there was none."""


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
        """Take one step on responses; returns loss and gradient norm."""
        packs = self._packs(range(len(examples)), [len(example.ids) for example in examples])
        batches = [
            from_sequences(
                [examples[index].ids for index in packed],
                [list(map(float, examples[index].loss_mask[1:])) for index in packed],
            )
            if packed
            else blank(self.trainer.state.tp.size)
            for packed in packs
        ]
        return self._step(batches, NEXT_TOKEN)

    def learn(self, rollouts: Sequence[Rollout], scored: Sequence[Scored]) -> UpdateResult:
        """The updates of one iteration; `scored` are the rewards of the rollouts, group after group."""
        section, lengths = self.section, [len(rollout.tokens) for rollout in rollouts]
        updates = list(chunks(range(len(rollouts)), len(rollouts) // section.updates_per_step))
        packs = [self._packs(update, lengths) for update in updates]
        old = self._score(self.trainer.logprobs, rollouts, packs)
        advantages = self._advantages([one.reward for one in scored])
        loss: Loss = NEXT_TOKEN
        values: Values = _no_values
        temperature = 1.0
        if section.algorithm == "grpo":
            loss = PolicyLoss(section.clip_low, section.clip_high, section.kl_coefficient)
            reference = None if self.reference is None else self._score(self.reference, rollouts, packs)
            values, temperature = self._policy_values(rollouts, advantages, old, reference), self.temperature
        metrics = []
        for update, mine in zip(updates, packs, strict=True):
            kept = [index for index in update if advantages[index]]
            if not kept:
                continue  # every sample is as good as its group: nothing to learn, and Adam makes steps of rounding
            if section.algorithm == "rejection":
                mine = self._packs(kept, lengths)
            metrics.append(self._step([self._batch(rollouts, packed, values, temperature) for packed in mine], loss))
        return UpdateResult(
            scored=[
                ScoredRollout(reward=one.reward, failure=one.failure, advantage=advantage, trainer_logprobs=logprobs)
                for one, advantage, logprobs in zip(scored, advantages, old, strict=True)
            ],
            agreement=agreement(old, [rollout.logprobs for rollout in rollouts]),
            metrics={name: statistics.fmean(row[name] for row in metrics) for name in (metrics[0] if metrics else ())},
        )

    def _advantages(self, rewards: Sequence[float]) -> list[float]:
        """Advantage of each rollout in its group; for rejection sampling 1 if it is learnt from, else 0."""
        section = self.section
        groups = chunks(rewards, section.samples_per_prompt)
        if section.algorithm == "grpo":
            return [one for group in groups for one in group_advantages(group, divide=section.divide_by_deviation)]
        bests = ((best_of_group(group, above=section.keep_above), len(group)) for group in groups)
        return [float(place == best) for best, size in bests for place in range(size)]

    def _policy_values(
        self,
        rollouts: Sequence[Rollout],
        advantages: Sequence[float],
        old: Sequence[tuple[float, ...]],
        reference: Sequence[tuple[float, ...]] | None,
    ) -> Values:
        """What the policy loss needs of each rollout."""
        kind, limit = self.section.importance_correction, self.section.importance_limit

        def values(index: int) -> dict[str, list[float]]:
            sampled = rollouts[index].logprobs
            found = {
                "advantage": [advantages[index]] * len(sampled),
                "old": list(old[index]),
                "importance": importance_weights(old[index], sampled, kind=kind, limit=limit),
            }
            return found if reference is None else found | {"reference": list(reference[index])}

        return values

    # ---- common

    def _packs(self, indices: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
        """This replica's share of `indices`, a list for each micro batch; `lengths`: tokens by index."""
        dp = self.trainer.state.dp
        mine = pack([lengths[index] - 1 for index in indices], self.capacity, dp.size)[dp.rank]
        return [[indices[place] for place in packed] for packed in mine]

    def _batch(
        self, rollouts: Sequence[Rollout], packed: Sequence[int], values: Values, temperature: float
    ) -> MicroBatch:
        """The rollouts at `packed`; their own tokens count, and have `values`."""
        if not packed:
            empty = blank(self.trainer.state.tp.size)
            return replace(empty, values={name: torch.zeros(empty.num_tokens) for name in values(0)})
        prompts = [[0.0] * (len(rollouts[index].prompt_token_ids) - 1) for index in packed]
        found = [values(index) for index in packed]
        batch = from_sequences(
            [rollouts[index].tokens for index in packed],
            [given + [1.0] * len(rollouts[index].token_ids) for given, index in zip(prompts, packed, strict=True)],
            {name: [given + one[name] for given, one in zip(prompts, found, strict=True)] for name in found[0]},
        )
        return replace(batch, temperature=temperature)

    def _score(
        self, logprobs: Logprobs, rollouts: Sequence[Rollout], packs: Sequence[Sequence[Sequence[int]]]
    ) -> list[tuple[float, ...]]:
        """Log-probabilities of the sampled tokens of all rollouts, of which this replica computes those in `packs`."""
        mine = [packed for update in packs for packed in update]
        starts = [0, *accumulate(len(rollout.token_ids) for rollout in rollouts)]
        found = torch.zeros(starts[-1], device=self.trainer.device)
        scores = logprobs([self._batch(rollouts, packed, _no_values, self.temperature) for packed in mine])
        for packed, batch in zip(mine, scores, strict=True):
            end = 0
            for index in packed:
                end += len(rollouts[index].tokens) - 1
                found[starts[index] : starts[index + 1]] = batch[end - len(rollouts[index].token_ids) : end]
        values = all_reduce_sum(found, self.trainer.state.dp).tolist()  # others have zeros where this one has values
        return [tuple(values[lo:hi]) for lo, hi in pairwise(starts)]

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


def _no_values(index: int) -> dict[str, list[float]]:
    return {}
