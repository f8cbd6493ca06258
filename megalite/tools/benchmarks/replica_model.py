"""A replica as simulated for `bench balance`: steps that take time, rows, KV blocks, a prefix cache. No torch here.

A step computes one token of every decoding sequence and a chunk of the prompts that wait, first come, first served. A
sequence is admitted when there is a row and the blocks of its prompt and all its output, so none is preempted. Steps in
which nothing joins or ends are summed up in closed form, so a simulated token costs nothing.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import inf, sqrt

BLOCK = 16
"""Tokens."""


@dataclass(frozen=True, slots=True)
class SimRequest:
    """A request with what only the simulation knows; for the balancer a `Work`."""

    index: int
    arrival: float
    """Seconds."""
    parts: tuple[tuple[int, int], ...]
    """Whole blocks of the prompt that others may share: a number that stands for the content from the start up to here,
    and the blocks."""
    tail: int
    """Prompt tokens after them, which are its own; at least one."""
    output: int
    """Tokens until it ends."""
    max_tokens: int
    num_samples: int = 1

    @property
    def id(self) -> str:
        return str(self.index)

    @property
    def prompt(self) -> int:
        """Prompt tokens."""
        return sum(blocks for _, blocks in self.parts) * BLOCK + self.tail

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        """Ids that are equal where the content is; below 2 ** 62."""
        ids: list[int] = []
        for content, blocks in self.parts:
            ids += range(content << 20, (content << 20) + blocks * BLOCK)
        first = (1 << 60) + (self.index << 24)
        return (*ids, *range(first, first + self.tail))


@dataclass(frozen=True)
class Machine:
    """What a replica is; times in seconds. As measured for the 8B shape on one H100, see docs/performance.md."""

    step: float = 5.3e-3
    """A step without anything in it: the weights are read."""
    prefill: float = 23.6e-6
    """More for each prompt token."""
    row: float = 6e-6
    """More for each decoding sequence."""
    kv: float = 55e-9
    """More for each token of the contexts of decoding sequences."""
    rows: int = 64
    """Sequences at once at most."""
    tokens: int = 8192
    """In a step at most."""
    blocks: int = 1 << 14
    """KV blocks."""


class PrefixCache:
    """Blocks of a replica: held by sequences, or free with content that can be found; least recently used go first."""

    def __init__(self, blocks: int):
        self.blocks = blocks
        self.held = 0
        """Blocks held by sequences."""
        self.free = 0
        """Blocks that are free and have content."""
        self._holders: dict[int, int] = {}
        self._free: OrderedDict[int, int] = OrderedDict()  # content, blocks; the least recently used first
        self._private = 0

    def hold(self, parts: Sequence[tuple[int, int]], private: int) -> int | None:
        """Hold a sequence's shared parts and so many blocks of its own; tokens that were found, None: no room."""
        found = 0
        for content, _ in parts:
            if content not in self._holders and content not in self._free:
                break
            found += 1
        need = private + sum(blocks for content, blocks in parts if content not in self._holders)
        if self.held + need > self.blocks:
            return None
        for content, blocks in parts:
            if content not in self._holders:
                self.free -= self._free.pop(content, 0)
                self._holders[content] = 0
                self.held += blocks
            self._holders[content] += 1
        self.held += private
        while self.held + self.free > self.blocks:
            _, blocks = self._free.popitem(last=False)
            self.free -= blocks
        return sum(blocks for _, blocks in parts[:found]) * BLOCK

    def release(self, parts: Sequence[tuple[int, int]], private: int) -> None:
        self._private -= 1
        self._free[self._private] = private
        self.held -= private
        self.free += private
        for content, blocks in reversed(parts):
            self._holders[content] -= 1
            if not self._holders[content]:
                del self._holders[content]
                self._free[content] = blocks
                self.held -= blocks
                self.free += blocks


@dataclass(slots=True)
class Run:
    """A request on a replica."""

    request: SimRequest
    given: int = 0
    """Output tokens that it had before, on a replica that was lost."""
    prefill: int = 0
    """Prompt tokens still to compute."""
    ends: int = 0
    """The replica's count of decode steps at which it ends."""

    @property
    def private(self) -> int:
        """Blocks that it shares with nobody."""
        return -(-(self.request.tail + self.request.output) // BLOCK)


@dataclass(slots=True)
class Happened:
    """What a step or a run of steps brought."""

    started: list[Run] = field(default_factory=list)
    first: list[Run] = field(default_factory=list)
    """They got their first token here."""
    ended: list[Run] = field(default_factory=list)


class SimReplica:
    """One replica. `busy_until` is when something happens next; call `happen` then."""

    def __init__(self, machine: Machine, speed: float = 1.0):
        self.machine, self.speed = machine, speed
        self.cache = PrefixCache(machine.blocks)
        self.waiting: deque[Run] = deque()
        self.prefilling: deque[Run] = deque()
        self.decoding: list[tuple[int, int, Run]] = []  # a heap by the end
        self.context = 0
        """Tokens of the contexts of decoding sequences."""
        self.decoded = 0
        """Decode steps so far."""
        self.steps = 0
        """So far."""
        self.busy_until = inf
        self.busy = 0.0
        """Seconds so far."""
        self.found = 0
        """Prompt tokens found in the cache."""
        self._began = 0.0
        self._steps = 0
        self._chunk = 0

    @property
    def num_running(self) -> int:
        return len(self.prefilling) + len(self.decoding)

    def add(self, run: Run, now: float, happened: Happened) -> None:
        """A request arrives."""
        self.waiting.append(run)
        if self.busy_until == inf:
            self._begin(now, happened)
        elif not self._chunk and len(self.waiting) == 1 and self.num_running < self.machine.rows:
            self._steps = max(1, min(self._steps, self._steps_in(now - self._began)))  # let it in after this step
            self.busy_until = self._began + self._seconds(self._steps)

    def take_back(self, run: Run) -> None:
        """A request that waits leaves."""
        self.waiting.remove(run)

    def happen(self, happened: Happened) -> None:
        """What was going on has ended, at `busy_until`."""
        now = self.busy_until
        self.busy += now - self._began
        rows = len(self.decoding)
        self.context += rows * self._steps
        self.decoded += self._steps
        self.steps += self._steps
        while self.decoding and self.decoding[0][0] <= self.decoded:
            self._end(heapq.heappop(self.decoding)[2], happened)
        while self._chunk:
            run = self.prefilling[0]
            done = min(run.prefill, self._chunk)
            run.prefill -= done
            self._chunk -= done
            if not run.prefill:
                self.prefilling.popleft()
                if not run.given:
                    happened.first.append(run)
                self._decode(run, happened)
        self._begin(now, happened)

    def progress(self, now: float) -> list[tuple[Run, int]]:
        """Everything that it has, and the output tokens of each; whole steps count."""
        going = self.busy_until < inf and self.decoding
        steps = min(self._steps, self._steps_in(now - self._began) - 1) if going else 0
        decoding = [(run, run.request.output - (ends - self.decoded) + max(0, steps)) for ends, _, run in self.decoding]
        return [*decoding, *((run, run.given) for run in (*self.prefilling, *self.waiting))]

    # ---- inside

    def _begin(self, now: float, happened: Happened) -> None:
        machine = self.machine
        while self.waiting and self.num_running < machine.rows:
            run = self.waiting[0]
            found = self.cache.hold(run.request.parts, run.private)
            if found is None:
                break
            self.waiting.popleft()
            self.found += found
            run.prefill = run.request.prompt + run.given - found
            self.prefilling.append(run)
            happened.started.append(run)
        self._began = now
        room = machine.tokens - len(self.decoding)
        self._chunk = min(room, sum(run.prefill for run in self.prefilling)) if self.prefilling else 0
        if self._chunk:
            self._steps = 1
        elif self.decoding:
            self._steps = self.decoding[0][0] - self.decoded
        else:
            self._steps = 0
            self.busy_until = inf
            return
        self.busy_until = now + self._seconds(self._steps)

    def _seconds(self, steps: int) -> float:
        """What so many steps from here take."""
        machine, rows = self.machine, len(self.decoding)
        context = self.context + rows * (steps - 1) / 2
        each = machine.step + rows * machine.row + context * machine.kv
        return (steps * each + self._chunk * machine.prefill) / self.speed

    def _steps_in(self, seconds: float) -> int:
        """The fewest steps that take so long."""
        machine, rows = self.machine, len(self.decoding)
        a = rows * machine.kv / 2
        b = machine.step + rows * machine.row + self.context * machine.kv - a
        c = seconds * self.speed
        return int((-b + sqrt(b * b + 4 * a * c)) / (2 * a) if a else c / b) + 1

    def _decode(self, run: Run, happened: Happened) -> None:
        """Its prompt is computed and one more output token is there."""
        left = run.request.output - run.given - 1
        if left <= 0:
            self.cache.release(run.request.parts, run.private)
            happened.ended.append(run)
            return
        self.context += run.request.prompt + run.given + 1
        heapq.heappush(self.decoding, (self.decoded + left, run.request.index, run))

    def _end(self, run: Run, happened: Happened) -> None:
        self.context -= run.request.prompt + run.request.output
        self.cache.release(run.request.parts, run.private)
        happened.ended.append(run)


def least_seconds(requests: Iterable[SimRequest], machine: Machine, speeds: Sequence[float]) -> float:
    """A bound that no schedule on these replicas can beat, whatever it knows beforehand: when the last request ends.

    For every moment, what arrives from then on is done after it, so the moment plus the larger of

    - all work over all speeds: every prompt token that no earlier request shares is computed once, on some replica,
      every output token but the first is a decode with its context; and there are as many steps as the rows, the tokens
      of a step, or the KV blocks of the contexts make needed;
    - what the longest request takes alone on the fastest replica, with its shared parts in the cache.
    """
    bound = 0.0
    decodes = tokens = 0
    held = 0.0
    work = 0.0
    known: dict[int, int] = {}
    ordered = sorted(requests, key=lambda one: one.arrival)
    for one in ordered:
        for content, _ in one.parts:
            known[content] = known.get(content, 0) + 1
    for one in reversed(ordered):
        prompt, left = one.prompt, one.output - 1
        fresh = one.tail
        for content, blocks in one.parts:  # counted where it is first asked for
            known[content] -= 1
            if not known[content]:
                fresh += blocks * BLOCK
        contexts = left * (prompt + 1) + left * (left - 1) / 2
        work += fresh * machine.prefill + left * machine.row + contexts * machine.kv
        decodes += left
        tokens += left + fresh
        held += (left + 1) * -(-(one.tail + one.output) // BLOCK)
        steps = max(decodes / machine.rows, tokens / machine.tokens, held / machine.blocks)
        alone = one.tail * machine.prefill + left * machine.row + contexts * machine.kv + (left + 1) * machine.step
        bound = max(bound, one.arrival + (work + steps * machine.step) / sum(speeds), one.arrival + alone / max(speeds))
    return bound
