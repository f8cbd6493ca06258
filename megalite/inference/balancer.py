"""Which replica gets a request: a policy over outstanding tokens and cached prefixes, for servers and for batch jobs.

Pure: no clock, no I/O, no torch here; the same calls give the same answers. Who routes tells what happens (`assign`,
`started`, `gained`, `finished`, `lost`, `joined`, `speed`) and does what comes back (`assign`, `lost`, `moves`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from megalite.inference.blocks import block_keys
from megalite.inference.prefix_index import PrefixIndex

Policy = Literal["round_robin", "least_tokens", "prefix"]

IMBALANCE = 0.25
"""What the load of a replica that has a prefix may exceed the least load by, beside the tokens that the prefix saves: a
share of the mean load."""


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
    keys: list[bytes]
    """Of the full blocks of its prompt."""
    known: int
    """Leading ones of them that its replica had when it came."""
    length: int
    """Prompt tokens."""
    prefill: int
    """Those to compute: without the known blocks."""
    predicted: int
    """Output tokens expected, of all samples."""
    limit: int
    """Output tokens at most, of all samples."""
    gained: int = 0
    """Output tokens so far."""

    @property
    def tokens(self) -> int:
        """Outstanding: its prefill, which is running KV later, and its output, so far or expected."""
        return self.prefill + max(self.predicted, self.gained)


@dataclass(slots=True)
class _Replica:
    """What is known of a replica."""

    name: int
    slot: int
    tokens: int = 0
    """Outstanding ones of its requests."""
    speed: float = 0.0
    """Tokens per second; 0: not measured."""
    jobs: dict[str, _Job] = field(default_factory=dict)
    """In the order in which they came."""
    queued: dict[str, _Job] = field(default_factory=dict)
    """Those of them that have not started."""


class LoadBalancer:
    """Assigns requests to replicas; its load in tokens for its speed is what makes a replica wanted or not.

    - `round_robin`: each in turn. No moves.
    - `least_tokens`: the one with the least load, the request included.
    - `prefix`: the one that has the longest beginning of the prompt in its cache, unless its load is so much more than
      the least that the tokens saved don't make up for it; then as `least_tokens`.

    The load of a request is its queued prefill or running KV, without what was found in the cache, plus its output, so
    far or predicted: `max_tokens`, times the share of their limits that finished requests of such limits used.

    Events of a request that isn't on the books, because it ended or its replica was lost, change nothing.
    """

    def __init__(
        self,
        replicas: Iterable[int] = (),
        policy: Policy = "prefix",
        *,
        block_size: int = 16,
        num_blocks: int = 1 << 14,
    ):
        """`num_blocks`: KV blocks of `block_size` tokens of a replica, for those of which `joined` does not say it."""
        self.policy = policy
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.index = PrefixIndex()
        self._members: dict[int, _Replica] = {}
        self._slots: list[_Replica | None] = []
        self._loads: list[float] = []
        """Of each slot: outstanding tokens for the speed; infinite where there is no replica."""
        self._jobs: dict[str, _Job] = {}
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
        slot = self._loads.index(float("inf")) if float("inf") in self._loads else len(self._loads)
        if slot == len(self._loads):
            self._loads.append(0.0)
            self._slots.append(None)
        self._loads[slot] = 0.0
        self._members[replica] = self._slots[slot] = _Replica(replica, slot)
        self.index.add(slot, self.num_blocks if num_blocks is None else num_blocks)

    def lost(self, replica: int) -> list[str]:
        """A replica is gone, with its cache; the names of the requests that it had, in the order in which they came.

        They are off the books: assign them anew.
        """
        gone = self._members.pop(replica)
        self._loads[gone.slot], self._slots[gone.slot] = float("inf"), None
        self.index.remove(gone.slot)
        for name in gone.jobs:
            del self._jobs[name]
        return list(gone.jobs)

    def speed(self, replica: int, tokens_per_second: float) -> None:
        """What a replica was measured to do with as much work as it can take at once; > 0."""
        self._members[replica].speed = tokens_per_second
        for member in self._members.values():
            self._weigh(member)

    def outstanding(self, replica: int) -> int:
        """Tokens: queued prefill, running KV and predicted output."""
        return self._members[replica].tokens

    # ---- requests

    def assign(self, request: Work) -> int:
        """The replica that is to run a request; LookupError: there is none."""
        if not self._members:
            raise LookupError("no replica")
        length = len(request.prompt_token_ids)
        keys: list[bytes] = []
        if self.policy == "prefix":
            keys = block_keys(b"", request.prompt_token_ids[: length - length % self.block_size], self.block_size)
        limit = request.num_samples * request.max_tokens
        predicted = round(limit * self._used[request.max_tokens.bit_length()])
        slot, known = self._choose(keys, length + predicted)
        replica = self._slots[slot]
        assert replica is not None
        prefill = length - known * self.block_size
        self._enter(_Job(request.id, replica, keys, known, length, prefill, predicted, limit))
        return replica.name

    def started(self, name: str) -> None:
        """The first tokens of a request were scheduled."""
        if name in self._jobs:
            self._jobs[name].replica.queued.pop(name, None)

    def gained(self, name: str, tokens: int = 1) -> None:
        """A request has so many output tokens more, of all its samples."""
        job = self._jobs.get(name)
        if job is None:
            return
        before = job.tokens
        job.gained += tokens
        if job.tokens != before:
            job.replica.tokens += job.tokens - before
            self._weigh(job.replica)

    def finished(self, name: str) -> None:
        """A request ended, or was given up."""
        job = self._jobs.get(name)
        if job is None:
            return
        ran = name not in job.replica.queued
        self._leave(job)
        if ran and job.limit:
            bucket = job.limit.bit_length()
            self._used[bucket] += (min(1.0, job.gained / job.limit) - self._used[bucket]) / 16

    def moves(self) -> list[Move]:
        """Requests that have not started and are to go from replicas that fall behind to others, at once.

        The books say already that they went; `finished` if one can't be moved after all.
        """
        return []

    # ---- inside

    def _choose(self, keys: list[bytes], tokens: int) -> tuple[int, int]:
        """The slot for a request of so many tokens, and how many leading blocks of its prompt are known there."""
        if self.policy == "round_robin":
            names = sorted(self._members)
            self._turn += 1
            return self._members[names[(self._turn - 1) % len(names)]].slot, 0
        least = self._loads.index(min(self._loads))
        if not keys:
            return least, 0
        holders, known = self.index.match(keys)
        if not known or holders >> least & 1:
            return least, known
        best = min(_bits(holders), key=self._loads.__getitem__)
        mean = sum(member.tokens for member in self._members.values()) / len(self._members)
        if self._loads[best] - self._loads[least] > known * self.block_size + IMBALANCE * mean:
            return least, self.index.known(least, keys)
        return best, known

    def _weigh(self, replica: _Replica) -> None:
        """Its load: outstanding tokens, over its speed in terms of the mean of those measured."""
        speeds = [member.speed for member in self._members.values() if member.speed]
        mean = sum(speeds) / len(speeds) if speeds else 1.0
        self._loads[replica.slot] = replica.tokens / ((replica.speed or mean) / mean)

    def _enter(self, job: _Job) -> None:
        replica = job.replica
        self._jobs[job.name] = replica.jobs[job.name] = replica.queued[job.name] = job
        replica.tokens += job.tokens
        self._weigh(replica)
        self.index.use(replica.slot, job.keys)

    def _leave(self, job: _Job) -> None:
        replica = job.replica
        del self._jobs[job.name], replica.jobs[job.name]
        replica.queued.pop(job.name, None)
        replica.tokens -= job.tokens
        self._weigh(replica)


def _bits(mask: int) -> Iterable[int]:
    """The numbers of the bits that are set, ascending."""
    while mask:
        yield (mask & -mask).bit_length() - 1
        mask &= mask - 1
