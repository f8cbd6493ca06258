"""What the control rank of a replica tells the others each step, and where new work comes from.

Every rank of a replica runs the same scheduler. All it cannot know by itself travels in one small broadcast a step: the
sampled token ids, which stop strings completed, how much new work the replica took on, whether to stop.
"""

from __future__ import annotations

import secrets
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
import torch.distributed as dist

from megalite.core.parallel_state import Axis, ParallelState
from megalite.errors import ConfigError, Problem
from megalite.inference.request import Request, Sampled

_STOP, _EXHAUSTED = 1, 2
BACKLOG = 1 << 12
"""Sequences beyond those with room that a replica takes from its own share at once: not all, as each takes memory."""


@dataclass(frozen=True, slots=True)
class Message:
    """One step's news. Everything in it is a number; nothing received is ever run."""

    results: tuple[Sampled, ...] = ()
    """For the sampled rows of the plan that this message answers, in order."""
    arrivals: tuple[int, int] = (0, 0)
    """Half-open range of places in the feed's order: the requests that the replica takes on now."""
    arriving: int = 0
    """Sequences of these; known on the control rank only."""
    exhausted: bool = False
    """No more arrivals will follow."""
    stop: bool = False
    """Leave off now; unfinished requests are dropped."""
    state_hash: int = 0
    """Of the control rank's scheduler when it had made the plan that this message answers; debug mode only."""


class ReplicaChannel:
    """Messages from the control rank to every rank of its replica (itself included), in order.

    A broadcast is started when a message is sent and completed when it is received, up to `pp` steps later, so the
    control rank never waits for a slower stage.
    """

    def __init__(self, state: ParallelState):
        self.state = state
        self.sent: deque[tuple[Message, dist.Work | None, torch.Tensor | None]] = deque()

    def send(self, message: Message) -> None:
        """Control rank only."""
        work = buffer = None
        if self.state.replica.size > 1:
            flags = _STOP * message.stop | _EXHAUSTED * message.exhausted
            tokens = [result.token_id * 2 + result.stopped for result in message.results]
            buffer = torch.tensor([flags, *message.arrivals, message.state_hash, *tokens])
            work = dist.broadcast(buffer, self.state.rank, group=self.state.replica.group, async_op=True)
        self.sent.append((message, work, buffer))

    @property
    def num_arriving(self) -> int:
        """Sequences that messages on their way announce; known on the control rank."""
        return sum(message.arriving for message, _, _ in self.sent)

    def receive(self, num_results: int) -> Message:
        """The next message; `num_results` is the number of sampled rows in the plan it answers."""
        if self.state.is_control:
            message, work, _ = self.sent.popleft()
            if work is not None:
                work.wait()
            return message
        buffer = torch.empty(4 + num_results, dtype=torch.int64)
        dist.broadcast(buffer, self.state.control_rank, group=self.state.replica.group)
        flags, lo, hi, state_hash, *tokens = buffer.tolist()
        results = tuple(Sampled(token // 2, bool(token % 2)) for token in tokens)
        exhausted, stop = bool(flags & _EXHAUSTED), bool(flags & _STOP)
        return Message(results, (lo, hi), exhausted=exhausted, stop=stop, state_hash=state_hash)


class Feed(Protocol):
    """Where a replica's requests come from. `order` is the same on every rank; `take` is asked on the control rank."""

    order: Sequence[int]
    """Indices into the run's requests, in the order in which they are handed out."""

    def take(self, room: int) -> tuple[int, int]:
        """Claim places of `order` for this replica whose samples fill `room` sequences; an empty range if there are
        none left, or no room. A request is claimed whole, so the first may take more than the room.
        """

    def sequences(self, start: int, end: int) -> int:
        """Of the requests at these places."""

    @property
    def exhausted(self) -> bool:
        """Nothing is left to take."""


class Share:
    """Synchronous data parallelism: the replica's share is fixed before the start."""

    def __init__(self, order: Sequence[int], samples: Sequence[int]):
        """`samples`: sequences of the request at each place of `order`."""
        self.order = order
        self.taken = 0
        self._before = _sums(samples)

    def take(self, room: int) -> tuple[int, int]:
        start, self.taken = self.taken, _end(self._before, self.taken, room + BACKLOG)
        return start, self.taken

    def sequences(self, start: int, end: int) -> int:
        return self._before[end] - self._before[start]

    @property
    def exhausted(self) -> bool:
        return self.taken == len(self.order)


class SharedQueue:
    """Asynchronous data parallelism: replicas take places from one counter in the run's store as they have room.

    A claim is at most half of an even share of the sequences that are left, so that early claims are large, late ones
    small, and the replicas end together (guided self-scheduling, Polychronopoulos and Kuck 1987).
    """

    def __init__(self, order: Sequence[int], samples: Sequence[int], store: dist.Store, key: str, replicas: int):
        """`samples`: sequences of the request at each place of `order`."""
        self.order = order
        self.store = store
        self.key = key
        self.replicas = replicas
        self.next = 0
        """Places known to be taken, by any replica."""
        self._before = _sums(samples)
        self._seen = ""
        """What the store holds, as far as is known: the places taken and who took the last ones."""
        self._name = secrets.token_hex(8)

    def take(self, room: int) -> tuple[int, int]:
        """What fits is known only where the claim begins, so a claim fails if another replica was faster."""
        while room > 0 and not self.exhausted:
            left = self._before[-1] - self._before[self.next]
            start, end = self.next, _end(self._before, self.next, min(room, max(1, left // (2 * self.replicas))))
            claim = f"{end} {self._name}"
            self._seen = self.store.compare_set(self.key, self._seen, claim).decode()
            self.next = int(self._seen.split()[0])
            if self._seen == claim:
                return start, end
        return 0, 0

    def sequences(self, start: int, end: int) -> int:
        return self._before[end] - self._before[start]

    @property
    def exhausted(self) -> bool:
        return self.next >= len(self.order)


def _sums(samples: Sequence[int]) -> list[int]:
    """Sequences before each place, and of all."""
    return list(accumulate(samples, initial=0))


def _end(before: Sequence[int], start: int, room: int) -> int:
    """The end of as many places from `start` as fit into `room` sequences, at least one; none without room."""
    if room <= 0 or start == len(before) - 1:
        return start
    return max(start + 1, bisect_right(before, before[start] + room) - 1)


def predicted_tokens(request: Request) -> int:
    """Tokens a request costs if every sample runs to its limit."""
    return len(request.prompt_token_ids) + request.num_samples * request.max_tokens


def deal(requests: Sequence[Request], replicas: int) -> list[list[int]]:
    """Split requests over replicas by predicted tokens: longest first, each to the least loaded (Graham 1969).

    Within a share the input order is kept, so that results appear about in that order.
    """
    shares: list[list[int]] = [[] for _ in range(replicas)]
    load = [0] * replicas
    longest_first = sorted(range(len(requests)), key=lambda index: (-predicted_tokens(requests[index]), index))
    for index in longest_first:
        target = min(range(replicas), key=lambda replica: (load[replica], replica))
        shares[target].append(index)
        load[target] += predicted_tokens(requests[index])
    return [sorted(share) for share in shares]


def broadcast_bytes(data: bytes | None, source: int, axis: Axis | None = None) -> bytes:
    """Give every rank of `axis` (None: of the run) what global rank `source` has; the others pass None."""
    if not dist.is_initialized() or (axis is not None and axis.size == 1):
        assert data is not None
        return data
    group = axis.group if axis is not None else None
    size = torch.tensor([0 if data is None else len(data)])
    dist.broadcast(size, source, group=group)
    buffer = torch.empty(int(size), dtype=torch.uint8)
    if data:
        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    if buffer.numel():
        dist.broadcast(buffer, source, group=group)
    return buffer.numpy().tobytes()


def compare_ranks(digest: bytes, what: str, axis: Axis | None = None) -> None:
    """ConfigError on every rank of `axis` (None: of the run), naming those that differ, unless all digests are equal.

    Collective. `digest`: 32 bytes made of what this rank was given; `what` names that in the message.
    """
    if not dist.is_initialized() or (axis is not None and axis.size == 1):
        return
    ranks = axis.ranks if axis is not None else range(dist.get_world_size())
    mine = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
    each = [torch.empty_like(mine) for _ in ranks]
    dist.all_gather(each, mine, group=axis.group if axis is not None else None)
    different = [rank for rank, other in zip(ranks, each, strict=True) if not torch.equal(other, each[0])]
    if different:
        names = ", ".join(map(str, different))
        who = f"rank {names} has" if len(different) == 1 else f"ranks {names} have"
        fix = "Every rank must be given the same; a file must be the same on every host."
        raise ConfigError(Problem(key=what, rule=f"{who} others than rank {ranks[0]}", fix=fix))


class Ranks:
    """The ranks of a layout when they are given work, see `inputs.Together`; `what` names the work in messages."""

    def __init__(self, state: ParallelState, what: str):
        self.state = state
        self.what = what

    def once(self, make: Callable[[], bytes]) -> bytes:
        """`make` is called on the control rank."""
        return broadcast_bytes(make() if self.state.is_control else None, self.state.control_rank, self.state.replica)

    def compare(self, digest: bytes) -> None:
        compare_ranks(digest, self.what, self.state.world)
