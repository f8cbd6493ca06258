"""Replicas under `LoadBalancer`, or with the shares of a batch job, simulated on one clock. No torch here."""

from __future__ import annotations

import heapq
import statistics
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

from megalite.inference.balancer import LoadBalancer, Policy
from megalite.inference.feeds import Feed
from megalite.tools.benchmarks.replica_model import Happened, Machine, Run, SimReplica, SimRequest

TICK = 0.5
"""Seconds between what a server does at times: say what was gained and how fast replicas are, and ask for moves."""


@dataclass
class Result:
    """What came of a simulation; times in seconds."""

    makespan: float = 0.0
    found: int = 0
    """Prompt tokens found in caches."""
    first: list[float] = field(default_factory=list)
    """Times to first token."""
    assigning: array[float] = field(default_factory=lambda: array("d"))
    """CPU time of each `assign` here."""
    ending: array[float] = field(default_factory=lambda: array("d"))
    """CPU time of the `finished` of each request here."""
    losing: float = 0.0
    """CPU time here until the requests of lost replicas were assigned anew."""
    replayed: int = 0
    moved: int = 0

    @property
    def router(self) -> float:
        """CPU time of a request in the balancer: medians."""
        return statistics.median(self.assigning) + statistics.median(self.ending) if self.ending else 0.0

    def first_token(self, share: float) -> float:
        """A quantile of the times to first token."""
        ordered = sorted(self.first)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A request as the balancer sees it, with its prompt made before time is taken."""

    id: str
    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    num_samples: int = 1


class Simulation:
    """Replicas and their balancer, as a server has them."""

    def __init__(self, machine: Machine, speeds: Sequence[float], policy: Policy):
        self.replicas = [SimReplica(machine, speed) for speed in speeds]
        self.balancer = LoadBalancer(range(len(speeds)), policy, num_blocks=machine.blocks)
        self.result = Result()
        self._events: list[tuple[float, int]] = []
        self._runs: dict[str, Run] = {}
        self._told: dict[str, int] = {}
        self._measured = [(0, 0.0)] * len(speeds)
        self._ticked = 0.0

    def run(self, requests: Sequence[SimRequest], *, losing: int = 0) -> Result:
        """Requests in the order of their arrivals; with the middle one, the last `losing` replicas are lost."""
        for place, request in enumerate(requests):
            self._until(request.arrival)
            if losing and place == len(requests) // 2:
                self._lose(range(len(self.replicas) - losing, len(self.replicas)), request.arrival)
            self._assign(Run(request), request.arrival)
        self._until(inf)
        assert not self._runs and len(self.result.first) == len(requests), "a request was not finished"
        self.result.found = sum(replica.found for replica in self.replicas)
        return self.result

    def _until(self, moment: float) -> None:
        """Everything that happens up to a moment."""
        while self._events and self._events[0][0] <= moment:
            now, number = heapq.heappop(self._events)
            if self.replicas[number].busy_until != now:
                continue  # it was cut short
            happened = Happened()
            self.replicas[number].happen(happened)
            self._tell(happened, now)
            self._expect(number)
            if now >= self._ticked + TICK:
                self._ticked = now
                self._tick(now)

    def _expect(self, number: int) -> None:
        if self.replicas[number].busy_until < inf:
            heapq.heappush(self._events, (self.replicas[number].busy_until, number))

    def _assign(self, run: Run, now: float) -> float:
        """Give a request to a replica; the CPU time that it took to know which."""
        request = run.request
        prompt = _Prompt(request.id, request.prompt_token_ids, request.max_tokens)
        self._runs[request.id] = run
        began = time.thread_time()
        number = self.balancer.assign(prompt)
        seconds = time.thread_time() - began
        self.result.assigning.append(seconds)
        self._add(run, number, now)
        return seconds

    def _add(self, run: Run, number: int, now: float) -> None:
        happened = Happened()
        self.replicas[number].add(run, now, happened)
        self._expect(number)
        self._tell(happened, now)

    def _tell(self, happened: Happened, now: float) -> None:
        for run in happened.started:
            self.balancer.started(run.request.id)
        for run in happened.first:
            self.result.first.append(now - run.request.arrival)
        for run in happened.ended:
            name = run.request.id
            self.balancer.gained(name, run.request.output - self._told.pop(name, 0))
            began = time.thread_time()
            self.balancer.finished(name)
            self.result.ending.append(time.thread_time() - began)
            del self._runs[name]
            self.result.makespan = max(self.result.makespan, now)

    def _tick(self, now: float) -> None:
        for replica in self.replicas:
            for run, tokens in replica.progress(now):
                more = tokens - self._told.get(run.request.id, 0)
                if more > 0:
                    self._told[run.request.id] = tokens
                    self.balancer.gained(run.request.id, more)
        for number, replica in enumerate(self.replicas):
            steps, busy = self._measured[number]
            if replica.busy > busy:
                self.balancer.speed(number, (replica.steps - steps) / (replica.busy - busy))
                self._measured[number] = replica.steps, replica.busy
        moves = self.balancer.moves()
        self.result.moved += len(moves)
        for move in moves:
            run = self._runs[move.name]
            self.replicas[move.source].take_back(run)
            self._add(run, move.target, now)

    def _lose(self, numbers: Sequence[int], now: float) -> None:
        """Replicas are gone at once; their requests go on elsewhere, after the tokens that they had."""
        names: list[str] = []
        for number in numbers:
            for run, tokens in self.replicas[number].progress(now):
                run.given = tokens
            self.replicas[number].busy_until = inf
            began = time.thread_time()
            names += self.balancer.lost(number)
            self.result.losing += time.thread_time() - began
        for number in reversed(numbers):
            del self.replicas[number], self._measured[number]
        self._events = [event for event in self._events if event[1] not in numbers]
        heapq.heapify(self._events)
        self.result.replayed = len(names)
        for name in names:
            self.result.losing += self._assign(self._runs[name], now)


class MemoryStore:
    """A run's store, as far as a queue needs one."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes:
        if self._values.get(key, "") == expected:
            self._values[key] = desired
        return self._values.get(key, expected).encode()


def run_batch(machine: Machine, speeds: Sequence[float], feeds: Sequence[Feed]) -> Result:
    """A batch job of `SimRequest`s: every replica takes from its feed as it has room."""
    replicas = [SimReplica(machine, speed) for speed in speeds]
    taken: set[str] = set()
    result = Result()

    def fill(number: int, now: float) -> None:
        replica, feed = replicas[number], feeds[number]
        room = machine.rows + 2 - replica.num_running - len(replica.waiting)
        for request in feed.requests[slice(*feed.take(room))]:
            assert isinstance(request, SimRequest) and request.id not in taken, "a request was given out twice"
            taken.add(request.id)
            replica.add(Run(request), now, Happened())

    for number in range(len(replicas)):
        fill(number, 0.0)
    while True:
        number = min(range(len(replicas)), key=lambda number: replicas[number].busy_until)
        now = replicas[number].busy_until
        if now == inf:
            break
        happened = Happened()
        replicas[number].happen(happened)
        result.first += [now] * len(happened.first)
        result.makespan = now
        fill(number, now)
    result.found = sum(replica.found for replica in replicas)
    return result
