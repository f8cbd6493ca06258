"""Which replica gets a request: a policy over outstanding tokens and cached prefixes, for servers and for batch jobs.

Pure: no clock, no I/O, no torch here; the same calls give the same answers. The router reports events (`assign`,
`started`, `gained`, `finished`, `lost`, `joined`, `speed`) and does what is returned (`assign`, `lost`, `moves`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import compress
from math import inf
from typing import Literal, NamedTuple, Protocol

from megalite.inference.prefix_index import PrefixIndex, page_keys

Policy = Literal["round_robin", "least_tokens", "prefix"]

PAGE = 4
"""Blocks of a page of the prefix index."""
MEMORY = 16
"""About how many finished requests the average share of used limits is taken over."""
IMBALANCE = 0.25
"""See LoadBalancer.imbalance."""


_DIGITS = bytes(max(0, code - ord("0")) % 2 for code in range(256))


class Work(Protocol):
    """What is asked of a request; `inference.request.Request` has it."""

    @property
    def id(self) -> str: ...
    @property
    def prompt_token_ids(self) -> tuple[int, ...]: ...
    @property
    def num_samples(self) -> int: ...
    @property
    def max_tokens(self) -> int: ...


class Move(NamedTuple):
    """A request that has not started is to be taken back and given to another replica."""

    name: str
    source: int
    target: int


@dataclass(slots=True)
class _Job:
    """A request on the books."""

    name: str
    replica: _Replica
    keys: list[int]
    """Keys of the full pages of its prompt."""
    known: int
    """Number of leading pages that its replica had when it came."""
    prompt: int
    """Tokens of its prompt."""
    prefill: int
    """Prompt tokens to compute: without the known pages."""
    predicted: int
    """Output tokens expected, of all samples."""
    limit: int
    """Output tokens at most, of all samples."""
    bucket: int
    """Index in `_used`, of limits like its own."""
    gained: int = 0
    """Output tokens so far."""

    @property
    def tokens(self) -> int:
        """Outstanding tokens: its prefill, which is running KV later, and its output, so far or expected."""
        return self.prefill + max(self.predicted, self.gained)


@dataclass(slots=True)
class _Replica:
    """What is known of a replica."""

    name: int
    slot: int
    tokens: int = 0
    """Outstanding tokens of its requests."""
    jobs: dict[str, _Job] = field(default_factory=dict)
    """Its requests, in the order in which they came."""
    queued: dict[str, _Job] = field(default_factory=dict)
    """Its requests that have not started."""


class LoadBalancer:
    """Assigns requests to replicas by their loads: outstanding tokens over measured speed.

    - `round_robin`: each in turn, whatever its load. No moves.
    - `least_tokens`: the one with the least load.
    - `prefix`: the one that has the longest beginning of the prompt in its cache, unless its load exceeds the least so
      far that the tokens saved don't make up for it; then the one with the least load.

    Outstanding are the queued prefill or running KV of a request, without what was found in the cache, and its output,
    so far or predicted: `max_tokens`, times the share of such limits that requests used which have finished.

    Events of a request that isn't on the books, because it ended or its replica was lost, change nothing.
    """

    def __init__(
        self,
        replicas: Iterable[int] = (),
        policy: Policy = "prefix",
        *,
        block_size: int = 16,
        num_blocks: int = 1 << 14,
        imbalance: float = IMBALANCE,
    ):
        """`num_blocks`: KV blocks of `block_size` tokens of a replica, for those of which `joined` does not say it.

        `imbalance`: what loads may differ by, without a reason to even them out, as a share of the mean load.
        """
        self.policy = policy
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.imbalance = imbalance
        self.index = PrefixIndex()
        self._page = PAGE * block_size
        self._members: dict[int, _Replica] = {}
        self._slots: list[_Replica | None] = []
        self._loads: list[float] = []
        """Load of each slot: outstanding tokens over the speed; infinite where there is no replica."""
        self._speeds: list[float] = []
        """Measured speed of each slot; 0: not measured, or no replica."""
        self._mean_speed = 1.0
        """Mean of the measured speeds, which stands for the others; 1 if there is none."""
        self._jobs: dict[str, _Job] = {}
        self._tokens = 0
        """Outstanding tokens of all replicas."""
        self._turn = 0
        self._used = [1.0] * 64
        """Share of their limit that finished requests used, by the limit's number of bits."""
        for replica in replicas:
            self.joined(replica)

    # ---- replicas

    def joined(self, replica: int, num_blocks: int | None = None) -> None:
        """A replica is ready, with an empty cache of that many KV blocks."""
        if replica in self._members:
            raise ValueError(f"replica {replica} has joined already")
        slot = self._slots.index(None) if None in self._slots else len(self._slots)
        member = self._members[replica] = _Replica(replica, slot)
        self._slots[slot : slot + 1], self._loads[slot : slot + 1], self._speeds[slot : slot + 1] = (
            [member],
            [0.0],
            [0.0],
        )
        self.index.add(slot, (self.num_blocks if num_blocks is None else num_blocks) // PAGE)

    def lost(self, replica: int) -> list[str]:
        """A replica is gone, with its cache; the names of the requests that it had, in the order in which they came.

        They count for no replica any more: assign them anew.
        """
        gone = self._members.pop(replica)
        self._tokens -= gone.tokens
        self._slots[gone.slot], self._loads[gone.slot], self._speeds[gone.slot] = None, inf, 0.0
        self._average_speeds()
        self.index.remove(gone.slot)
        for name in gone.jobs:
            del self._jobs[name]
        return list(gone.jobs)

    def speed(self, replica: int, rate: float) -> None:
        """What a replica was measured to do, > 0; of the same kind for all. Averaged over some calls.

        Steps a second while it has something to do, or tokens a second at full load. Tokens at any load would mislead:
        they are the fewer, the fewer requests it is given.
        """
        member = self._members[replica]
        before = self._speeds[member.slot]
        self._speeds[member.slot] += (rate - before) / (MEMORY if before else 1)
        self._weigh(member, 0)
        self._average_speeds()

    def outstanding(self, replica: int) -> int:
        """Tokens: queued prefill, running KV and predicted output."""
        return self._members[replica].tokens

    # ---- requests

    def assign(self, request: Work) -> int:
        """The replica that is to run a request; LookupError: there is none."""
        if not self._members:
            raise LookupError("no replica")
        keys = page_keys(request.prompt_token_ids, self._page) if self.policy == "prefix" else []
        prompt, limit = len(request.prompt_token_ids), request.num_samples * request.max_tokens
        bucket = request.max_tokens.bit_length()
        slot, known = self._choose(keys)
        replica = self._slots[slot]
        assert replica is not None
        predicted = round(limit * self._used[bucket])
        self._enter(_Job(request.id, replica, keys, 0, prompt, prompt, predicted, limit, bucket), replica, known)
        return replica.name

    def started(self, name: str) -> None:
        """The first tokens of a request were scheduled."""
        if name in self._jobs:
            self._jobs[name].replica.queued.pop(name, None)

    def gained(self, name: str, tokens: int = 1) -> None:
        """All samples of a request together have this many further output tokens."""
        job = self._jobs.get(name)
        if job is not None:
            more = max(0, job.gained + tokens - max(job.predicted, job.gained))
            job.gained += tokens
            if more:
                self._weigh(job.replica, more)

    def finished(self, name: str) -> None:
        """A request ended, or was given up."""
        job = self._jobs.get(name)
        if job is None:
            return
        ran = name not in job.replica.queued
        self._leave(job)
        if ran and job.limit:
            others = (job.prompt + job.gained) // self._page - len(job.keys)
            self.index.use(job.replica.slot, job.keys, others if job.keys else 0)
            self._used[job.bucket] += (min(1.0, job.gained / job.limit) - self._used[job.bucket]) / MEMORY

    def moves(self) -> list[Move]:
        """Requests that have not started and are to go, at once, from replicas that fall behind to others.

        They count for their new replicas already. No request starts later for it: its new replica has less to do with
        it than the old one has without it.
        """
        made: list[Move] = []
        if self.policy == "round_robin" or len(self._members) < 2:
            return made
        mean = self._mean_speed
        slack = self.imbalance * self._tokens / len(self._members) / mean
        for source in sorted(self._members.values(), key=lambda member: -self._loads[member.slot]):
            for job in reversed(list(source.queued.values())):
                least = self._loads.index(min(self._loads))
                target = self._slots[least]
                assert target is not None
                known = self.index.known(least, job.keys)
                cost = job.prompt - known * self._page + job.predicted
                before = self._loads[source.slot] - job.tokens / (self._speeds[source.slot] or mean)
                if before <= self._loads[least] + cost / (self._speeds[least] or mean) + slack:
                    break
                self._leave(job)
                self._enter(job, target, known)
                made.append(Move(job.name, source.name, target.name))
        return made

    # ---- inside

    def _choose(self, keys: list[int]) -> tuple[int, int]:
        """The slot for a request, and how many leading pages of its prompt are known there."""
        if self.policy == "round_robin":
            while self._slots[self._turn % len(self._slots)] is None:
                self._turn += 1
            self._turn += 1
            return (self._turn - 1) % len(self._slots), 0
        least = self._loads.index(min(self._loads))
        holders, known = self.index.match(keys)
        if not known or holders >> least & 1:
            return least, known
        _, best = min(compress(zip(self._loads, range(len(self._loads)), strict=True), _bits(holders)))
        slack = known * self._page + self.imbalance * self._tokens / len(self._members)
        if self._loads[best] - self._loads[least] > slack / self._mean_speed:
            return least, self.index.known(least, keys)
        return best, known

    def _weigh(self, replica: _Replica, more: int) -> None:
        """Add `more` to the outstanding tokens of a replica."""
        replica.tokens += more
        self._tokens += more
        self._loads[replica.slot] = replica.tokens / (self._speeds[replica.slot] or self._mean_speed)

    def _average_speeds(self) -> None:
        """Update what follows from the speeds."""
        zeros = self._speeds.count(0.0)
        measured = len(self._speeds) - zeros
        self._mean_speed = sum(self._speeds) / measured if measured else 1.0
        if zeros > self._slots.count(None):
            for member in self._members.values():
                if not self._speeds[member.slot]:
                    self._weigh(member, 0)

    def _enter(self, job: _Job, replica: _Replica, known: int) -> None:
        """Put a request, which has not started, on the books of a replica."""
        job.replica, job.known, job.prefill = replica, known, job.prompt - known * self._page
        self._jobs[job.name] = replica.jobs[job.name] = replica.queued[job.name] = job
        self._weigh(replica, job.tokens)
        if job.keys:
            self.index.use(replica.slot, job.keys)

    def _leave(self, job: _Job) -> None:
        """Take a request off the books; what it would have computed is not in the cache."""
        replica = job.replica
        del self._jobs[job.name], replica.jobs[job.name]
        if replica.queued.pop(job.name, None) is not None:
            self.index.drop(replica.slot, job.keys[job.known :])
        self._weigh(replica, -job.tokens)


def _bits(mask: int) -> bytes:
    """A byte for each bit up to the highest one, the lowest first: 0 or 1."""
    return format(mask, "b").encode().translate(_DIGITS)[::-1]
