"""The inference engine of one rank: schedule, execute, sample, send the results, finish, again.

Lockstep: every rank of a replica calls `run` with the same feed and makes the same plans. Step t works on cohort
t mod pp; its results enter the scheduler right before step t + pp is planned, so with pipeline stages pp disjoint
cohorts are in flight and no stage waits for another's sampling.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from operator import itemgetter

import torch
from torch import Tensor

from megalite.core.parallel_state import ParallelState
from megalite.errors import MegaliteError
from megalite.inference.channel import ReplicaChannel, StepMessage
from megalite.inference.feeds import Feed
from megalite.inference.outputs import OutputProcessor, RequestOutput
from megalite.inference.request import Sampled, StepPlan
from megalite.inference.runner import Runner
from megalite.inference.sampler import Sampler
from megalite.inference.scheduler import Scheduler
from megalite.monitor.metrics import Meter

LOOKAHEAD = 2
"""Sequences beyond the running ones that a replica claims from a shared queue, so that a place is refilled at once."""
_HASH_BITS = 2**62 - 1


@dataclass(kw_only=True)
class Hooks:
    """What the caller wants to hear of while a run goes on; only the control rank calls these."""

    on_output: Callable[[RequestOutput], None] = field(default=lambda output: None)
    """A request finished."""
    on_step: Callable[[int], None] = field(default=lambda num_tokens: None)
    """A step generated this many tokens."""
    stop_requested: Callable[[], bool] = field(default=lambda: False)
    """Asked every step: should the run leave off?"""


@dataclass(frozen=True, slots=True)
class _Pending:
    """A plan that a message will answer."""

    plan: StepPlan
    state_hash: int
    """Of the scheduler that made it; 0 unless lockstep is checked."""


class Engine:
    """Generates for one replica; every rank of the replica holds one and calls it alike."""

    def __init__(
        self,
        state: ParallelState,
        runner: Runner,
        scheduler: Scheduler,
        sampler: Sampler,
        outputs: OutputProcessor,
        meter: Meter,
        *,
        check_lockstep: bool = False,
    ):
        """`check_lockstep`: compare a hash of the scheduler over the ranks in every step."""
        self.state = state
        self.runner = runner
        self.scheduler = scheduler
        self.sampler = sampler
        self.outputs = outputs
        self.meter = meter
        self.check_lockstep = check_lockstep
        self.channel = ReplicaChannel(state)
        # Of all runs; counted on the control rank.
        self.finished = 0
        """Requests."""
        self.prompt_tokens = 0
        """Of the requests taken on."""
        self.output_tokens = 0

    def run(self, feed: Feed, hooks: Hooks) -> bool:
        """Generate for what `feed` gives this replica; False if it was stopped before the end.

        Finished outputs go to `hooks.on_output` on the control rank. Whatever happens, nothing unfinished is left: an
        engine of one rank can be used again even after an exception.
        """
        try:
            return self._run(feed, hooks)
        except BaseException:
            self.channel.sent.clear()
            self._drop()
            raise

    def renew(self) -> None:
        """Forget every cached prefix: the weights have changed. Between runs."""
        self.scheduler.reset_cache()

    def sleep(self) -> None:
        """Give the KV cache's memory back until `wake`, and forget what it held. Between runs."""
        self.scheduler.reset_cache()
        self.runner.sleep()

    def wake(self) -> None:
        """Be ready to run again."""
        self.runner.wake()

    def _run(self, feed: Feed, hooks: Hooks) -> bool:
        depth = self.state.pp.size
        pending: deque[_Pending | None] = deque([None] * depth)  # what the messages on their way answer
        if self.state.is_control:
            for _ in range(depth):
                self._send(None, (), feed, hooks)
        step = 0
        while True:
            message = self._receive(pending.popleft(), hooks)
            if message.stop:
                break
            for request in feed.requests[slice(*message.arrivals)]:
                self.prompt_tokens += len(request.prompt_token_ids)
                self.scheduler.add(request)
                if self.state.is_control:
                    self.outputs.add(request)
            if message.exhausted and not self.scheduler.has_work():
                break
            with self.meter.phase("scheduling"):
                plan = self.scheduler.schedule(step % depth)
            made = _Pending(plan, self.scheduler.state_hash() & _HASH_BITS if self.check_lockstep else 0)
            pending.append(made)
            if self.state.is_control:
                self.outputs.scheduled(plan)
                logits = self.runner.execute(plan, partial(self._record_prompts, plan))
                self._send(made, self._sample(plan, logits, hooks), feed, hooks)
            else:
                self.runner.execute(plan)
            step += 1
            decoded = sum(row.count for row in plan.rows if row.count == 1)
            self.meter.step(prefill_tokens=plan.num_tokens - decoded, decode_tokens=decoded)
        for left in pending:
            self._receive(left, hooks)
        self.runner.close()
        if message.stop:
            self._drop()
        return not message.stop

    def _drop(self) -> None:
        """Forget what is unfinished."""
        for sequence in self.scheduler.clear():
            self.sampler.forget(sequence)
        self.outputs.clear()

    def _receive(self, pending: _Pending | None, hooks: Hooks) -> StepMessage:
        """Take the next message and finish the plan that it answers."""
        with self.meter.phase("waiting"):
            message = self.channel.receive(len(pending.plan.sampled) if pending else 0)
        if pending is None:
            return message
        if message.state_hash != pending.state_hash:
            raise MegaliteError(
                f"the scheduler of rank {self.state.rank} differs from that of its control rank "
                f"{self.state.control_rank} at step {pending.plan.step}; this is a bug, please report it"
            )
        finished = self.scheduler.finish(pending.plan, message.results)
        if self.state.is_control:
            for sequence in finished:
                self.sampler.forget(sequence)
                output = self.outputs.finish(sequence)
                if output is not None:
                    self.finished += 1
                    hooks.on_output(output)
        return message

    def _send(self, pending: _Pending | None, results: tuple[Sampled, ...], feed: Feed, hooks: Hooks) -> None:
        """Send the message that answers `pending`, and take on work; control rank only."""
        stop = hooks.stop_requested()
        room = self.scheduler.max_num_seqs + LOOKAHEAD - self.scheduler.num_running - self.scheduler.num_waiting
        arrivals = (0, 0) if stop else feed.take(room - self.channel.num_arriving)
        message = StepMessage(
            results=results,
            arrivals=arrivals,
            arriving=feed.sequences(*arrivals),
            exhausted=feed.exhausted,
            stop=stop,
            state_hash=pending.state_hash if pending else 0,
        )
        self.channel.send(message)

    def _sample(self, plan: StepPlan, logits: Tensor | None, hooks: Hooks) -> tuple[Sampled, ...]:
        """Sample a plan's rows and record what was sampled; control rank only."""
        if logits is None:
            return ()
        with self.meter.phase("sampling"), torch.inference_mode():
            rows = plan.sampled
            sampled = self.sampler.sample(logits, rows)
            results = tuple(
                Sampled(token_id, self.outputs.append(row.sequence, token_id, logprob, top))
                for row, token_id, logprob, top in zip(
                    rows, sampled.token_ids, sampled.logprobs, sampled.top_logprobs, strict=True
                )
            )
        self.output_tokens += len(results)
        hooks.on_step(len(results))
        return results

    def _record_prompts(self, plan: StepPlan, first: int, logits: Tensor) -> None:
        """Log-probabilities of prompt tokens from `logits` [C, vocab] of the plan's prompt rows `first` and on: those
        at position p score token p + 1."""
        places = [(row, position) for row in plan.rows for position in range(*row.prompt_logits)]
        begin = 0
        with self.meter.phase("sampling"):
            for row, group in groupby(places[first : first + len(logits)], key=itemgetter(0)):
                positions = [position for _, position in group]
                request, end = row.sequence.request, begin + len(positions)
                next_ids = request.prompt_token_ids[positions[0] + 1 : positions[-1] + 2]
                count = request.params.prompt_logprobs or 0
                scores = self.sampler.prompt_logprobs(logits[begin:end], next_ids, count, request_id=request.id)
                self.outputs.append_prompt(row.sequence, positions[0], scores)
                begin = end
