"""Where the requests of a replica come from: a share dealt out before the run, and what others have left of theirs."""

from __future__ import annotations

import secrets
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Protocol

from megalite.inference.balancer import PAGE, LoadBalancer, Policy
from megalite.inference.prefix_index import page_keys
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
    """Asynchronous data parallelism: every replica has a share, and one that is done with its own takes from others'.

    The run's store has a key for each share, with the part of it that nobody has taken. Its replica takes from the
    front, the others from the end of the share that has most left: small requests, least like what runs there. At most
    half of what is left is taken at once, so that there is something to take to the end, and replicas end together
    (work stealing, Blumofe and Leiserson 1999). There is no process to lose.
    """

    def __init__(self, shares: Sequence[Sequence[Request]], own: int, store: Store, key: str):
        super().__init__(request for share in shares for request in share)
        self._store, self._key, self._own = store, key, own
        self._name = secrets.token_hex(8)
        ends = list(accumulate(map(len, shares), initial=0))
        self._left = [(start, end) for start, end in pairwise(ends)]
        """What is left of each share, as far as is known: never less than what is."""
        self._seen = [""] * len(shares)
        """What the store holds for each share, as far as is known."""
        self._cost = list(accumulate(map(predicted_tokens, self.requests), initial=0))

    def take(self, room: int) -> tuple[int, int]:
        # A claim holds only if what it is made of is still so. Shares only shrink, so the fullest as far as is known is
        # the fullest indeed if the claim holds.
        while room > 0 and not self.exhausted:
            share, (start, end) = self._fullest()
            most = max(1, min(room, self.sequences(start, end) // 2))
            if share == self._own:
                taken = start, max(start + 1, bisect_right(self._before, self._before[start] + most) - 1)
                left = taken[1], end
            else:
                taken = min(end - 1, bisect_left(self._before, self._before[end] - most)), end
                left = start, taken[0]
            claim = f"{left[0]} {left[1]} {self._name}"
            seen = self._store.compare_set(f"{self._key}/{share}", self._seen[share], claim).decode()
            self._seen[share] = seen
            first, last = seen.split()[:2]
            self._left[share] = int(first), int(last)
            if seen == claim:
                return taken
        return 0, 0

    @property
    def exhausted(self) -> bool:
        return all(start == end for start, end in self._left)

    def _fullest(self) -> tuple[int, tuple[int, int]]:
        """The share to take from, and what is left of it: the own one, then the one with the most predicted tokens."""
        start, end = self._left[self._own]
        if start < end:
            return self._own, (start, end)
        cost = [self._cost[end] - self._cost[start] for start, end in self._left]
        share = cost.index(max(cost))  # a request costs something: it has a prompt
        return share, self._left[share]


def predicted_tokens(request: Request) -> int:
    """Tokens a request costs if every sample runs to its limit."""
    return len(request.prompt_token_ids) + request.num_samples * request.max_tokens


def deal(
    requests: Sequence[Request], replicas: int, *, block_size: int = 16, sharing: bool = True
) -> list[list[Request]]:
    """Split requests over replicas by outstanding tokens: longest first, each to the least loaded (Graham 1969).

    Each share is in the order in which it is to run. `sharing`: prompts with a common beginning rather go to one
    replica, and run there one after another.
    """
    policy: Policy = "prefix" if sharing else "least_tokens"
    balancer = LoadBalancer(range(replicas), policy, block_size=block_size, imbalance=0.0)
    shares: list[list[int]] = [[] for _ in range(replicas)]
    costs = list(map(predicted_tokens, requests))
    for index in sorted(range(len(requests)), key=lambda index: -costs[index]):
        shares[balancer.assign(requests[index])].append(index)
    place = _places(requests, PAGE * block_size if sharing else 0)
    return [[requests[index] for index in sorted(share, key=place.__getitem__)] for share in shares]


def _places(requests: Sequence[Request], page: int) -> list[int]:
    """The place of each request in the order in which they best run; where all are alike, the order given.

    Those with long outputs come first, by powers of two, so that short ones are left to even out the end. Among them, a
    prompt that shares pages of so many tokens with another one follows the first of these, as in a walk through the
    tree of prompts: then a cache has to hold the least (Zheng et al. 2024, SGLang, theorem 3.1). Page 0: nothing is
    shared.
    """
    keys = [page_keys(request.prompt_token_ids, page) if page else [] for request in requests]
    times = Counter(key for path in keys for key in path)
    first: dict[int, int] = {}
    order = []
    for index, (request, path) in enumerate(zip(requests, keys, strict=True)):
        shared = [first.setdefault(key, index) for key in path if times[key] > 1]
        order.append((-request.max_tokens.bit_length(), *shared, index))
    places = [0] * len(requests)
    for place, (*_, index) in enumerate(sorted(order)):
        places[index] = place
    return places
