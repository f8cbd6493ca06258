"""The inference engine of one rank: takes requests, schedules and executes steps, gives out results of earlier ones.

Lockstep: every rank of a replica calls `step` alike and makes the same plans. Step t works on cohort t mod pp, so that
with pipeline stages pp disjoint cohorts are in flight and no stage waits for another's sampling. The results of step t
enter the scheduler right before step t + pp is planned, with overlap one step later: then the host prepares a step
while the device runs the one before.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from operator import itemgetter

from torch import Tensor

from megalite.core.parallel_state import ParallelState
from megalite.core.progress import here
from megalite.errors import MegaliteError
from megalite.inference.channel import News, ReplicaChannel, StepMessage
from megalite.inference.choice import FAILURES, NO_TOKEN, TokenLogprobs
from megalite.inference.feeds import Feed
from megalite.inference.matchers import FOLLOWED
from megalite.inference.output_processor import OutputProcessor
from megalite.inference.outputs import RequestOutput, TokenDelta
from megalite.inference.request import Request, Sampled, Sequence, StepPlan
from megalite.inference.runner import Runner, StepResults
from megalite.inference.scheduler import Scheduler
from megalite.monitor.collector import Meter

log = logging.getLogger(__name__)

LOOKAHEAD = 2
"""Sequences beyond the running ones that a replica claims from a shared queue, so that a place is refilled at once."""
_HASH_BITS = 2**62 - 1


@dataclass(kw_only=True)
class Hooks:
    """What the caller of `Engine.run` wants to hear of while it goes on; only the control rank calls these."""

    on_output: Callable[[RequestOutput], None] = field(default=lambda output: None)
    """A request finished."""
    on_deltas: Callable[[list[TokenDelta]], None] = field(default=lambda deltas: None)
    """Streamed requests gained something with a step."""
    on_step: Callable[[int], None] = field(default=lambda num_tokens: None)
    """A step generated this many tokens."""
    stop_requested: Callable[[], bool] = field(default=lambda: False)
    """Asked every step: should the run leave off?"""


@dataclass(slots=True)
class Events:
    """The results that became known with a step, of its own plan or of earlier ones."""

    outputs: list[RequestOutput] = field(default_factory=list)
    """Requests that ended; on the control rank."""
    deltas: list[TokenDelta] = field(default_factory=list)
    """What streamed requests gained, in order; on the control rank."""
    started: list[str] = field(default_factory=list)
    """Ids of requests whose first tokens this step's plan computes; on the control rank."""
    num_tokens: int = 0
    """Tokens generated; on the control rank."""
    ended: bool = False
    """No more work will come, and all is done; or it was stopped. The same on every rank."""
    stopped: bool = False


@dataclass(slots=True)
class _InFlight:
    """A plan whose results are not finished."""

    plan: StepPlan
    state_hash: int
    """Hash of the scheduler that made it; 0 unless lockstep is checked."""
    results: StepResults | None
    """Results of its sampled rows; on the control rank."""


class Engine:
    """Generates for one replica; every rank of the replica holds one and calls it alike."""

    def __init__(
        self,
        state: ParallelState,
        runner: Runner,
        scheduler: Scheduler,
        outputs: OutputProcessor,
        meter: Meter,
        *,
        overlap: bool = False,
        check_lockstep: bool = False,
    ):
        """`overlap`: see the module. `check_lockstep`: compare a hash of the scheduler over the ranks in every step."""
        self.state = state
        self.runner = runner
        self.scheduler = scheduler
        self.outputs = outputs
        self.meter = meter
        self.overlap = int(overlap)
        self.check_lockstep = check_lockstep
        self.channel = ReplicaChannel(state)
        self._begin()
        self.finished = 0
        """Finished requests of all runs; counted on the control rank, as are the next."""
        self.prompt_tokens = 0
        """Prompt tokens of the requests taken on."""
        self.output_tokens = 0

    # ---- what callers use

    def run(self, feed: Feed, hooks: Hooks) -> bool:
        """Generate for what `feed` gives this replica; False if it was stopped before the end.

        Finished outputs go to `hooks.on_output` on the control rank. Whatever happens, nothing unfinished is left: an
        engine of one rank can be used again even after an exception.
        """
        events = Events()
        try:
            while not events.ended:
                events = self.step(partial(self.next_news, feed, hooks.stop_requested), feed.requests)
                if events.num_tokens:
                    hooks.on_step(events.num_tokens)
                if events.deltas:
                    hooks.on_deltas(events.deltas)
                for output in events.outputs:
                    hooks.on_output(output)
        except BaseException:
            self.abandon()
            raise
        return not events.stopped

    def abandon(self) -> None:
        """Forget what runs, after an exception in the middle of a run; the next step begins anew."""
        self._drop()
        self._begin()

    def step(self, news: Callable[[int], News] = lambda room: News(), known: tuple[Request, ...] = ()) -> Events:
        """One step: start the next plan and give out what came of an earlier one.

        Collective over the replica. `news` is asked on the control rank for what comes from outside, given how many
        more sequences have room; it reaches the scheduler pp steps later. `known`: the requests of which
        `News.arrivals` names a range. After `Events.ended` the next step begins anew.
        """
        events = Events()
        here.step = ("step", self._step)
        if self._step >= self.state.pp.size:
            heard = self._receive(events, known)
            if heard.stop or (heard.exhausted and not self.scheduler.has_work()):
                self._end(stopped=heard.stop)
                events.ended, events.stopped = True, heard.stop
                return events
        with self.meter.phase("scheduling", on_device=False):
            plan = self.scheduler.schedule(self._step % self.state.pp.size)
        started = _InFlight(plan, self.scheduler.state_hash() & _HASH_BITS if self.check_lockstep else 0, None)
        self._unfinished.append(started)
        if self.state.is_control:
            events.started = self.outputs.scheduled(plan)
        started.results = self.runner.execute(plan, partial(self._record_prompts, plan))
        if self.state.is_control:
            self._unread.append(started)
            self._send(events, news, known)
        self._step += 1
        decoded = sum(row.count for row in plan.rows if row.count == 1)
        self.meter.step(
            prefill_tokens=plan.num_tokens - decoded,
            decode_tokens=decoded,
            running=self.scheduler.num_running,
            queued=self.scheduler.num_waiting,
        )
        return events

    @property
    def busy(self) -> bool:
        """Requests are on their way, wait or run; known on the control rank."""
        return self.scheduler.has_work() or self.channel.num_arriving > 0

    def warm_up(self, sequences: int | None = None, *, for_any: bool = False) -> None:
        """Compile and capture what decoding needs, for up to that many sequences at once; else it happens on the way.

        `for_any`: what any request may ask for is compiled too; see `Runner.warm_up`. Collective over the replica. On a
        CPU there is nothing to do.
        """
        began = time.monotonic()
        most = self.scheduler.max_num_seqs if sequences is None else min(sequences, self.scheduler.max_num_seqs)
        self.runner.warm_up(-(-most // self.state.pp.size), for_any=for_any)
        log.info(
            "%s were made ready in %.1f s",
            "steps, and what requests may ask for," if for_any else "decode steps",
            time.monotonic() - began,
        )

    def renew(self) -> None:
        """Forget every cached prefix, as the weights have changed. Call it between runs."""
        self.scheduler.reset_cache()

    def sleep(self) -> None:
        """Give the KV cache's memory back until `wake`, and forget what it held. Call it between runs."""
        self.scheduler.reset_cache()
        self.runner.sleep()

    def wake(self) -> None:
        """Be ready to run again."""
        self.runner.wake()

    @staticmethod
    def next_news(feed: Feed, stop_requested: Callable[[], bool], room: int) -> News:
        """What a run takes on, for `step`: nothing more once it is to stop."""
        if stop_requested():
            return News(stop=True)
        return News(arrivals=feed.take(room), exhausted=feed.exhausted)

    # ---- inside a step

    def _receive(self, events: Events, known: tuple[Request, ...]) -> News:
        """Take the next message: finish the plan that it answers, and add and give up requests."""
        answered = self._unfinished.popleft()
        with self.meter.phase("waiting", "news", "replica", on_device=False):
            message = self.channel.receive(len(answered.plan.sampled) if answered else 0)
        if answered is not None:
            self._finish(answered, message, events)
        news = message.news
        for request in known[slice(*news.arrivals)]:
            self._add(request, events)
        for request in news.requests:
            try:
                self._add(request, events)
            except MegaliteError as error:  # on every rank alike
                if self.state.is_control:
                    events.outputs.append(self.outputs.refuse(request, str(error)))
        for name in news.aborts:
            self._give_out(self.scheduler.abort(name), events)
        return news

    def _add(self, request: Request, events: Events) -> None:
        """Take a request on. MegaliteError: it can't run; nothing has changed then."""
        sequences = self.scheduler.add(request)
        for sequence in sequences:
            if sequence.finish_reason is None and self.runner.sampler.matchers.is_complete(sequence):
                self.scheduler.stop(sequence)
        self.prompt_tokens += len(request.prompt_token_ids)
        if not self.state.is_control:
            return
        if (output := self.outputs.add(request)) is not None:
            events.outputs.append(output)
        self._give_out((sequence for sequence in sequences if sequence.finish_reason is not None), events)

    def _finish(self, answered: _InFlight, message: StepMessage, events: Events) -> None:
        if message.state_hash != answered.state_hash:
            raise MegaliteError(
                f"the scheduler of rank {self.state.rank} differs from that of its control rank "
                f"{self.state.control_rank} at step {answered.plan.step}; this is a bug, please report it"
            )
        self._give_out(self.scheduler.finish(answered.plan, message.results), events)

    def _give_out(self, ended: Iterable[Sequence], events: Events) -> None:
        """Results of sequences that ended; on the control rank."""
        if not self.state.is_control:
            return
        for sequence in ended:
            output = self.outputs.finish(sequence, events.deltas)
            if output is not None:
                self.finished += 1
                events.outputs.append(output)

    def _send(self, events: Events, news: Callable[[int], News], known: tuple[Request, ...]) -> None:
        """Send this step's message: the results of the oldest plan that are due, and news. Control rank only."""
        answered = self._unread.popleft() if len(self._unread) > self.overlap else None
        results = self._read(answered, events) if answered is not None else ()
        taken = self.scheduler.num_running + self.scheduler.num_waiting + self.channel.num_arriving
        heard = news(self.scheduler.max_num_seqs + LOOKAHEAD - taken)
        arriving = sum(request.num_samples for request in (*known[slice(*heard.arrivals)], *heard.requests))
        self.channel.send(StepMessage(results, heard, arriving, answered.state_hash if answered is not None else 0))

    def _read(self, answered: _InFlight, events: Events) -> tuple[Sampled, ...]:
        """Take a plan's results from the device and record what was sampled; control rank only."""
        if answered.results is None:
            return ()
        with self.meter.phase("compute", "results", on_device=False):
            sampled = answered.results.wait()
        results, now = [], time.monotonic()
        with self.meter.phase("sampling", "outputs", on_device=False):
            outcomes = self.runner.sampler.matchers.follow(answered.plan.sampled, sampled.token_ids)
            columns = (sampled.token_ids, sampled.logprobs, sampled.top_logprobs)
            for place, (row, token_id, logprob, top) in enumerate(zip(answered.plan.sampled, *columns, strict=True)):
                sequence, stopped = row.sequence, False
                outcome = outcomes.get(place, FOLLOWED) if outcomes else FOLLOWED
                if outcome.problem is not None:
                    token_id = NO_TOKEN
                if sequence.finish_reason is not None:  # sampled in vain
                    pass
                elif outcome.in_vain:
                    stopped = True
                elif token_id < 0:
                    self.outputs.fail(sequence, outcome.problem or FAILURES[token_id])
                else:
                    stopped = self.outputs.append(sequence, token_id, logprob, top, events.deltas, now)
                    stopped |= outcome.finished
                    events.num_tokens += 1
                results.append(Sampled(token_id, stopped))
        self.output_tokens += events.num_tokens
        return tuple(results)

    def _record_prompts(self, plan: StepPlan, first: int, logits: Tensor) -> None:
        """Log-probabilities of prompt tokens from `logits` [C, vocab] of the plan's prompt rows `first` and on: those
        at position p score token p + 1."""
        if not self.state.is_control:
            return
        places = [(row, position) for row in plan.rows for position in range(*row.prompt_logits)]
        begin = 0
        with self.meter.phase("sampling"):
            for row, group in groupby(places[first : first + len(logits)], key=itemgetter(0)):
                positions = [position for _, position in group]
                request, end = row.sequence.request, begin + len(positions)
                next_ids = request.prompt_token_ids[positions[0] + 1 : positions[-1] + 2]
                count = request.params.prompt_logprobs or 0
                scores: list[TokenLogprobs] | list[None] = [None] * len(positions)
                try:
                    scores = self.runner.sampler.prompt_logprobs(logits[begin:end], next_ids, count)
                except MegaliteError as error:
                    self.outputs.fail(row.sequence, str(error))
                self.outputs.append_prompt(row.sequence, positions[0], scores)
                begin = end

    def _end(self, *, stopped: bool) -> None:
        """Leave off: take the messages that are on their way, so that the next run begins anew."""
        for _ in range(self.state.pp.size - 1):
            self._receive(Events(), ())
        self.runner.close()
        if stopped:
            self._drop()
        else:
            self.scheduler.forget_plans()
        self._begin()

    def _begin(self) -> None:
        """Start anew, with nothing on its way."""
        self.channel.sent.clear()
        self._step = 0
        self._unread: deque[_InFlight] = deque()  # control rank: the results are still on the device
        self._unfinished: deque[_InFlight | None] = deque([None] * self.overlap)  # None: a message that answers no plan

    def _drop(self) -> None:
        """Forget what is unfinished."""
        self.scheduler.clear()
        self.outputs.clear()
