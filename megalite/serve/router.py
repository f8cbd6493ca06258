"""From the API's requests to replicas: what is taken on, who gets it, and what happens when one is lost. Torch-free.

All of it runs in one event loop and waits for nothing; a request's own reader waits in its `Stream`.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import msgspec

from megalite.config.schema import ServerSection
from megalite.errors import ConfigError, Problem
from megalite.inference.balancer import LoadBalancer
from megalite.inference.io.inputs import PromptLimits
from megalite.inference.outputs import RequestOutput
from megalite.inference.request import Request
from megalite.serve.errors import Draining, NoReplica, Overloaded
from megalite.serve.messages import Abort, Hello, Step, Submit, ToReplica
from megalite.serve.rates import Speed, Turnover
from megalite.serve.streams import Job, Stream, Turn

__all__ = ["Metrics", "ReplicaState", "ReplicaView", "Router", "Stream"]

ReplicaState = Literal["starting", "ready", "lost", "restarting", "ended"]
"""starting, restarting: it has not said Hello (again); lost: its end was noticed, and what is left of it is being
removed; ended: it will not be started again."""

MOST_FRUITLESS = 2
"""Replicas that may be lost in a row while they had a request, without its gaining anything: one more, and the request
is taken for the cause. The last times it runs beside no other suspect, so that it takes none of them along."""
MOST_LOSSES = 8
"""Replicas that may be lost at all while they had a request."""
READY_WITHIN = 10.0
"""Seconds since the last step of a replica that is at work, for `ready`."""
SUSPENDED = 2.0
"""Seconds between two ticks after which this process has been suspended itself, perhaps with its replicas."""
COUNTED_EVERY = 16
"""Tokens of a streamed request after which the balancer hears of them, and at its end."""
RETRY_AFTER = 5.0
"""Seconds after which a client may try again where nothing better is known."""


class Metrics(Protocol):
    """What the router tells; `metrics.ServeMetrics` is one."""

    def replica_state(self, replica: int, state: ReplicaState) -> None: ...
    def replica_step(self, replica: int, message: Step) -> None: ...
    def rejected(self, reason: str) -> None: ...
    def replayed(self, count: int = 1) -> None: ...


@dataclass(slots=True)
class ReplicaView:
    """One replica as the page and the metrics show it."""

    replica: int
    state: ReplicaState
    restarts: int
    """Times that it was started again."""
    requests: int
    """Given to it, and not ended."""
    tokens: int
    """Prompt and output tokens that it has yet to compute, as the balancer counts them."""
    hello: Hello | None
    """The replica's last Hello."""
    step: Step | None
    """The last one that it sent; None since it was lost."""


@dataclass(slots=True)
class _Replica:
    """What the router knows of a replica."""

    state: ReplicaState = "starting"
    restarts: int = 0
    hello: Hello | None = None
    send: Callable[[Sequence[ToReplica]], None] = lambda _: None
    step: Step | None = None
    jobs: dict[str, Job] = field(default_factory=dict)
    """The requests that the replica has."""
    moved: float = 0.0
    """When it last finished a step, or had nothing to do."""
    speed: Speed = field(default_factory=Speed)


class Router:
    """Takes requests on, spreads them over the replicas and gives each its stream."""

    def __init__(
        self,
        section: ServerSection,
        limits: PromptLimits,
        replicas: int,
        metrics: Metrics,
        *,
        block_size: int = 16,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`limits`: by the config alone; `block_size`: engine.block_size."""
        self.state: Literal["starting", "ready", "draining", "lost"] = "starting"
        """starting: no replica has been ready yet; ready: one has been, and one is or is being started again;
        draining: nothing new is taken; lost: no replica is left, the process is about to end."""
        self.limits = limits
        """What a prompt must fit on every replica; before the first is ready, max_model_len may be too large."""
        self.healthy = True
        """False: all replicas stall or are lost; the process is about to end itself."""
        self._section, self._own_limit, self._metrics, self._clock = section, limits.max_model_len, metrics, clock
        self._replicas = {replica: _Replica() for replica in range(replicas)}
        self._balancer = LoadBalancer(policy=section.balance, block_size=block_size)
        self._jobs: dict[str, Job] = {}
        """All that have not ended, by id."""
        self._tokens = 0
        """Their prices."""
        self._arrivals = 0
        self._waiting: dict[str, Job] = {}
        """Requests that no replica can have yet."""
        self._suspect: Job | None = None
        """The one suspect (see MOST_FRUITLESS) that may run now."""
        self._suspects: deque[Job] = deque()
        """The suspects that wait for it to end."""
        self._turnover = Turnover()
        self._turn: Turn | None = None
        self._aborting = False
        self._ticked = clock()
        self._idle = asyncio.Event()
        self._idle.set()
        for name in self._replicas:
            metrics.replica_state(name, "starting")

    # ---- for the API

    def submit(self, request: Request) -> Stream:
        """Take a request on; its id must be new.

        Overloaded, Draining, NoReplica: not now. ConfigError: never, it is larger than the queue.
        """
        return self.submit_all([request])[0]

    def submit_all(self, requests: Sequence[Request]) -> list[Stream]:
        """Take all on, or none."""
        self._turn = self._turn or Turn()
        jobs = [Job(request, self._arrivals + place, self._turn) for place, request in enumerate(requests)]
        self.admit(len(jobs), sum(job.price for job in jobs))
        for job in jobs:
            assert job.request.id not in self._jobs, "ids are unique"
            self._jobs[job.request.id] = job
            self._tokens += job.price
        self._arrivals += len(jobs)
        if jobs:
            self._idle.clear()
        for job in jobs:
            self._dispatch(job)
        return [Stream(job, self._cancel) for job in jobs]

    def admit(self, requests: int, tokens: int) -> None:
        """Raise the errors of `submit` for so many requests and tokens, samples * (prompt + max_tokens), before
        any of them is made."""
        most, most_tokens = self._section.max_queued_requests, self._section.max_queued_tokens
        for key, asked, bound in (
            ("server.max_queued_requests", requests, most),
            ("server.max_queued_tokens", tokens, most_tokens),
        ):
            if asked > bound:
                rule = f"the request is larger than the whole queue, which has room for {bound}"
                raise ConfigError(Problem(key=key, rule=rule, value=asked, fix="Ask for fewer samples or tokens."))
        if self.state == "draining":
            self._metrics.rejected("draining")
            raise Draining("the server is about to end", max(1.0, self._section.drain_timeout))
        if self.state != "ready":
            self._metrics.rejected("no_replica")
            raise NoReplica("no replica is ready", RETRY_AFTER)
        over = len(self._jobs) + requests - most, self._tokens + tokens - most_tokens
        if max(over) > 0:
            self._metrics.rejected("overloaded")
            after = self._turnover.seconds_for(*over, now=self._clock()) or RETRY_AFTER
            raise Overloaded(f"{len(self._jobs)} requests with {self._tokens} tokens are waiting or running", after)

    @property
    def ready(self) -> bool:
        """A replica is there, takes requests, and finished a step within the last seconds or has nothing to do."""
        now = self._clock()
        return self.state == "ready" and any(
            one.state == "ready" and (not one.jobs or now - one.moved < READY_WITHIN) for one in self._replicas.values()
        )

    def replicas(self) -> list[ReplicaView]:
        """The replicas, by number."""
        return [
            ReplicaView(
                replica=name,
                state=one.state,
                restarts=one.restarts,
                requests=len(one.jobs),
                tokens=self._balancer.outstanding(name) if one.state == "ready" else 0,
                hello=one.hello,
                step=one.step,
            )
            for name, one in self._replicas.items()
        ]

    # ---- told by the fleet

    def joined(self, hello: Hello, send: Callable[[Sequence[ToReplica]], None]) -> None:
        """A replica is ready; `send` takes messages to it and never waits."""
        one = self._replicas[hello.replica]
        one.hello, one.send, one.step, one.moved, one.speed = hello, send, None, self._clock(), Speed()
        self._become(hello.replica, "ready")
        self._balancer.joined(hello.replica, hello.num_kv_blocks)
        lengths = [other.hello.max_model_len for other in self._replicas.values() if other.hello is not None]
        self.limits = replace(self.limits, max_model_len=min(self._own_limit, *lengths))
        if self.state == "starting":
            self.state = "ready"
        waiting, self._waiting = self._waiting, {}
        for job in sorted(waiting.values(), key=lambda job: job.arrival):
            self._dispatch(job)

    def received(self, replica: int, step: Step) -> None:
        """A replica's message has come."""
        one = self._replicas[replica]
        if one.hello is None or one.state != "ready":
            return
        now = self._clock()
        idle = step.running == 0 and step.waiting == 0 and not one.jobs
        if idle or one.step is None or step.step > one.step.step:
            one.moved = now
        speed = one.speed.measured(step, one.hello.max_num_seqs, now)
        if speed is not None:
            self._balancer.speed(replica, speed)
        one.step = msgspec.structs.replace(step, deltas=[], outputs=[], started=[])
        self._metrics.replica_step(replica, step)
        for name in step.started:
            if name in one.jobs and not one.jobs[name].recalled:
                self._balancer.started(name)
        jobs = one.jobs
        for delta in step.deltas:
            job = jobs.get(delta.request_id)
            if job is not None:
                job.take(delta)
                job.uncounted += len(delta.token_ids)
                if job.uncounted >= COUNTED_EVERY:
                    self._count(job)
                if job is self._suspect:
                    self._acquit(job)
        for output in step.outputs:
            job = one.jobs.get(output.request_id)
            if job is not None:
                self._came_back(job, output)

    def lost(self, replica: int, *, again: bool = True) -> int:
        """A replica is gone, for good if not `again`; gives the number of requests that go on elsewhere."""
        one = self._replicas[replica]
        if one.state == "ready":
            self._balancer.lost(replica)
        one.send, one.step = lambda _: None, None
        self._become(replica, "lost" if again else "ended")
        jobs, one.jobs = one.jobs, {}
        for job in self._jobs.values():  # on their way to it: they stay where they are until they come back
            job.to = None if job.to == replica else job.to
        if all(other.state == "ended" for other in self._replicas.values()):
            self.fail_all("no replica is left")
            return 0
        replayed = [job for job in sorted(jobs.values(), key=lambda job: job.arrival) if self._survives(job)]
        for job in replayed:
            self._dispatch(job)
        self._next_suspect()
        if replayed:
            self._metrics.replayed(len(replayed))
        return len(replayed)

    def restarting(self, replica: int) -> None:
        """A replica that was lost is being started again."""
        self._replicas[replica].restarts += 1
        self._become(replica, "restarting")

    def tick(self) -> list[int]:
        """To be called about every second: moves requests that wait at slow replicas; gives the replicas that stall.

        Those have work, or have not said that they have none, and finished no step for server.stall_timeout seconds.
        """
        now = self._clock()
        if now - self._ticked > max(SUSPENDED, self._section.stall_timeout / 2):
            for one in self._replicas.values():
                one.moved = now
        self._ticked = now
        for name, source, target in self._balancer.moves():
            self._move(name, source, target)
        at_work = {name: one for name, one in self._replicas.items() if one.state == "ready"}
        stalled = [name for name, one in at_work.items() if now - one.moved > self._section.stall_timeout]
        coming = any(one.state in ("starting", "restarting", "lost") for one in self._replicas.values())
        if stalled and len(stalled) == len(at_work) and not coming:
            self.healthy = False
        return stalled

    # ---- the end

    def drain(self) -> None:
        """Take nothing new on."""
        self.state = "draining"

    async def idle(self) -> None:
        """Wait until no request is left."""
        await self._idle.wait()

    def abort_all(self) -> None:
        """End all requests with finish_reason abort; their results come from the replicas that have them."""
        self._aborting = True
        for job in list(self._jobs.values()):
            if job.at is None:
                job.finish_here("abort")
                self._leave(job)
            elif job.recalled:
                job.recalled, job.to = False, None
            else:
                self._replicas[job.at].send([Abort(job.request.id)])

    def fail_all(self, reason: str) -> None:
        """Nothing can run any more."""
        self.state, self.healthy = "lost", False
        for job in list(self._jobs.values()):
            job.fail(reason)
            self._leave(job)

    # ---- inside

    def _become(self, replica: int, state: ReplicaState) -> None:
        self._replicas[replica].state = state
        self._metrics.replica_state(replica, state)

    def _dispatch(self, job: Job) -> None:
        """Give a job that nobody has to a replica, or let it wait."""
        if self._aborting or job.has_all:
            job.finish_here("abort")
            self._leave(job)
        elif not any(one.state == "ready" for one in self._replicas.values()):
            self._waiting[job.request.id] = job
        elif job.fruitless >= MOST_FRUITLESS and self._suspect not in (None, job):
            self._suspects.append(job)
        else:
            if job.fruitless >= MOST_FRUITLESS:
                self._suspect = job
            self._submit(job, self._balancer.assign(job.request))

    def _submit(self, job: Job, replica: int) -> None:
        one = self._replicas[replica]
        if not one.jobs:
            one.moved = self._clock()
        job.at, job.to, job.recalled = replica, None, False
        one.jobs[job.request.id] = job
        one.send([Submit(job.to_submit())])

    def _came_back(self, job: Job, output: RequestOutput) -> None:
        """A replica is done with a job."""
        assert job.at is not None
        if job.recalled and any(one.finish_reason == "abort" for one in output.outputs):
            del self._replicas[job.at].jobs[job.request.id]
            target, job.at, job.to, job.recalled = job.to, None, None, False
            if target is not None:
                self._submit(job, target)
            else:
                self._dispatch(job)
            return
        self._turnover.add(job.price, now=self._clock())
        job.finish(output)
        self._leave(job)

    def _survives(self, job: Job) -> bool:
        """A job's replica was lost; False: it is the job's end."""
        if job is self._suspect:
            self._suspect = None
        job.losses += 1
        job.fruitless = 0 if job.gained else job.fruitless + 1
        job.at, job.recalled, job.to = None, False, None
        self._balancer.finished(job.request.id)  # where it was to be moved to
        if job.fruitless <= MOST_FRUITLESS and job.losses <= MOST_LOSSES:
            return True
        job.fail(f"{job.losses} replicas were lost while they ran it")
        self._leave(job)
        return False

    def _move(self, name: str, source: int, target: int) -> None:
        """Ask for a request back that another replica shall have. It may have begun meanwhile: then it goes on there.

        Only the replica's answer says what the client has had, so it is submitted to the other one after that.
        """
        job = self._jobs.get(name)
        if job is None:
            self._balancer.finished(name)
            return
        if not job.recalled:
            self._replicas[source].send([Abort(name)])
        job.recalled, job.to = True, target

    def _cancel(self, job: Job) -> None:
        if self._jobs.get(job.request.id) is not job:
            return
        if job.at is not None and not job.recalled:
            self._replicas[job.at].send([Abort(job.request.id)])
        job.give_up()
        self._leave(job)

    def _acquit(self, job: Job) -> None:
        """The suspect has gained something, or has ended: the next may run."""
        job.fruitless = 0
        self._suspect = None
        self._next_suspect()

    def _next_suspect(self) -> None:
        while self._suspects and self._suspect is None:
            following = self._suspects.popleft()
            if following.request.id in self._jobs:
                self._dispatch(following)

    def _count(self, job: Job) -> None:
        """Tell the balancer what a job has gained since the last time."""
        gained, job.uncounted = job.uncounted, 0
        self._balancer.gained(job.request.id, gained)

    def _leave(self, job: Job) -> None:
        """A job has ended, however."""
        name = job.request.id
        self._count(job)
        del self._jobs[name]
        self._tokens -= job.price
        self._waiting.pop(name, None)
        if job.at is not None:
            self._replicas[job.at].jobs.pop(name, None)
        self._balancer.finished(name)
        if job is self._suspect:
            self._acquit(job)
        if not self._jobs:
            self._idle.set()
