"""Where the requests of a replica come from: a share dealt out before the run, or a queue of all replicas."""

from __future__ import annotations

import secrets
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Protocol

from megalite.inference.request import Request

BACKLOG = 1 << 12
"""Sequences beyond those with room that a replica takes from its own share at once: not all, as each takes memory."""


class Feed:
    """The requests that a replica may take on, in the order in which they are handed out.

    This one is the replica's alone (synchronous data parallelism). `requests` is the same on every rank of the replica;
    `take` and `exhausted` are asked on its control rank.
    """

    def __init__(self, requests: Iterable[Request]):
        self.requests = tuple(requests)
        self.taken = 0
        """Requests handed out, as far as is known."""
        self._before = list(accumulate((request.num_samples for request in self.requests), initial=0))

    def take(self, room: int) -> tuple[int, int]:
        """Half-open range of the requests that the replica takes on now: as many as fit into `room` sequences.

        Empty if nothing is left or there is no room. A request is taken whole, so the first may need more than that.
        """
        start, self.taken = self.taken, self._end(room + BACKLOG)
        return start, self.taken

    def sequences(self, start: int, end: int) -> int:
        """Sequences of the requests in a range."""
        return self._before[end] - self._before[start]

    @property
    def exhausted(self) -> bool:
        """Nothing is left to take."""
        return self.taken == len(self.requests)

    def _end(self, room: int) -> int:
        """The end of the requests after the taken ones that fit into `room` sequences, at least one; none without."""
        if room <= 0 or self.exhausted:
            return self.taken
        return max(self.taken + 1, bisect_right(self._before, self._before[self.taken] + room) - 1)


class Store(Protocol):
    """What a queue needs of the run's store (torch.distributed's)."""

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes:
        """Set the key to `desired` if it holds `expected`, "" where it holds nothing; what it holds then."""


class SharedQueue(Feed):
    """Asynchronous data parallelism: replicas take requests from one counter in the run's store as they have room.

    A claim is at most half of an even share of the sequences that are left, so that early claims are large, late ones
    small, and the replicas end together (guided self-scheduling, Polychronopoulos and Kuck 1987).
    """

    def __init__(self, requests: Iterable[Request], store: Store, key: str, replicas: int):
        super().__init__(requests)
        self._store, self._key, self._replicas = store, key, replicas
        self._name = secrets.token_hex(8)
        self._seen = ""
        """What the store holds, as far as is known: the requests taken by all replicas and who took the last ones."""

    def take(self, room: int) -> tuple[int, int]:
        # What fits is known only where the claim begins, so a claim fails if another replica was faster.
        while room > 0 and not self.exhausted:
            left = self.sequences(self.taken, len(self.requests))
            start, end = self.taken, self._end(min(room, max(1, left // (2 * self._replicas))))
            claim = f"{end} {self._name}"
            self._seen = self._store.compare_set(self._key, self._seen, claim).decode()
            self.taken = int(self._seen.split()[0])
            if self._seen == claim:
                return start, end
        return 0, 0


def predicted_tokens(request: Request) -> int:
    """Tokens a request costs if every sample runs to its limit."""
    return len(request.prompt_token_ids) + request.num_samples * request.max_tokens


def deal(requests: Sequence[Request], replicas: int) -> list[list[Request]]:
    """Split requests over replicas by predicted tokens: longest first, each to the least loaded (Graham 1969).

    Within a share the input order is kept, so that results appear about in that order.
    """
    shares: list[list[int]] = [[] for _ in range(replicas)]
    load = [0] * replicas
    costs = list(map(predicted_tokens, requests))
    for index in sorted(range(len(requests)), key=lambda index: -costs[index]):
        target = load.index(min(load))
        shares[target].append(index)
        load[target] += costs[index]
    return [[requests[index] for index in sorted(share)] for share in shares]
