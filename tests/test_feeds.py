"""How work is dealt out over replicas, and that all ranks were given the same."""

import threading
from hashlib import sha256
from itertools import accumulate, pairwise

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from waiting import PATIENCE

from megalite.config.schema import SamplingParams
from megalite.core.agreement import compare_ranks
from megalite.errors import ConfigError
from megalite.inference.feeds import BACKLOG, Feed, SharedQueue, deal, predicted_tokens
from megalite.inference.request import Request


def requests(*samples: int) -> list[Request]:
    return [make(number, 1, 1, n) for number, n in enumerate(samples)]


def make(number: int, prompt: int, max_tokens: int, n: int) -> Request:
    params = SamplingParams(n=n)
    return Request(id=str(number), prompt_token_ids=(1,) * prompt, params=params, seed=0, max_tokens=max_tokens)


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50), st.integers(1, 3)), max_size=40), st.integers(1, 5))
def test_deal_covers_everything_and_balances(shapes, replicas):
    asked = [make(number, *shape) for number, shape in enumerate(shapes)]
    shares = deal(asked, replicas)
    numbers = [[int(request.id) for request in share] for share in shares]
    assert sorted(sum(numbers, [])) == list(range(len(asked)))
    for share in shares:
        bits = [request.max_tokens.bit_length() for request in share]
        assert bits == sorted(bits, reverse=True), "long outputs first"
    loads = [sum(map(predicted_tokens, share)) for share in shares]
    # Greedy: no replica is ahead of another by more than one request.
    assert max(loads) - min(loads) <= max(map(predicted_tokens, asked), default=0)


def test_a_share_is_handed_out_once_and_not_at_once_if_it_is_very_large():
    feed = Feed(requests(*[BACKLOG] * 9))
    assert not feed.exhausted
    claims = [(2, (0, 1)), (-BACKLOG, (1, 1)), (BACKLOG, (1, 3)), (9 * BACKLOG, (3, 9)), (1, (9, 9))]
    assert [(room, feed.take(room)) for room, _ in claims] == claims
    assert feed.exhausted and feed.sequences(1, 3) == 2 * BACKLOG


def test_deal_keeps_the_order_of_like_requests_and_prompts_that_share_together():
    def ask(number: int, prefix: int, tail: int) -> Request:
        ids = (prefix,) * 200 + (tail,) * 50
        return Request(id=str(number), prompt_token_ids=ids, params=SamplingParams(), seed=0, max_tokens=9)

    apart = [ask(number, number, 1) for number in range(20)]
    assert deal(apart, 1) == [apart]
    mixed = [ask(number, number % 4, number) for number in range(40)]
    [share] = deal(mixed, 1)
    assert [int(request.id) for request in share] == sorted(range(40), key=lambda number: (number % 4, number))
    shares = deal(mixed, 2)
    assert [{int(request.id) % 4 for request in share} for share in shares] == [{0, 2}, {1, 3}]
    assert sorted(map(len, deal(mixed, 2, sharing=False))) == [20, 20]
    assert deal(mixed, 1, sharing=False) == [mixed]


@pytest.mark.parametrize("replicas", [1, 3])
def test_a_shared_queue_gives_each_request_once(tmp_path, replicas):
    shares, taken = deal(requests(*[1] * 50), replicas), [[] for _ in range(replicas)]

    def replica(number: int) -> None:
        store = dist.FileStore(str(tmp_path / "store"), replicas)
        queue = SharedQueue(shares, number, store, "queue")
        while not queue.exhausted:
            taken[number].append(queue.take(room=4))

    threads = [threading.Thread(target=replica, args=(number,)) for number in range(replicas)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=PATIENCE)
    places = sorted(place for claims in taken for claim in claims for place in range(*claim))
    assert places == list(range(50))
    assert all(hi - lo <= 4 for claims in taken for lo, hi in claims)


@given(st.lists(st.integers(1, 20), max_size=30), st.lists(st.integers(-2, 40), min_size=1), st.integers(1, 3))
def test_a_claim_fills_the_room_that_there_is(samples, rooms, replicas):
    """Room is of sequences: a request of 8 samples takes 8. A first one that takes more is taken whole."""
    store, shares = dist.HashStore(), deal(requests(*samples), replicas)
    queues = [SharedQueue(shares, own, store, "queue") for own in range(replicas)]
    left = set(range(len(samples)))
    ends = list(accumulate(map(len, shares), initial=0))
    turn = 0
    while left:
        own = turn % replicas
        queue, room = queues[own], max(rooms[turn % len(rooms)], turn % 2)
        lo, hi = queue.take(room)
        claim = set(range(lo, hi))
        if room > 0:
            assert claim and claim <= left
            assert hi == lo + 1 or queue.sequences(lo, hi) <= room
            mine = left & set(range(ends[own], ends[own + 1]))
            assert (
                lo == min(mine)
                if mine
                else hi - 1 in {max(left & set(range(*pair)), default=0) for pair in pairwise(ends)}
            )
            left -= claim
        else:
            assert lo == hi
        turn += 1
    assert all(queue.take(9) == (0, 0) and queue.exhausted for queue in queues)


def test_claims_get_smaller_to_the_end():
    shares = deal(requests(*[1] * 20), 2)
    first, second = (SharedQueue(shares, own, store, "queue") for store in [dist.HashStore()] for own in range(2))
    sizes = []
    while not first.exhausted:
        lo, hi = first.take(room=100)
        sizes.append(hi - lo)
    assert sizes == [5, 2, 1, 1, 1] * 2, "its own share, then the other one"
    assert second.take(room=100) == (0, 0) and second.exhausted


def compared(rank: int, given: list[str]) -> str:
    try:
        compare_ranks(sha256(given[rank].encode()).digest(), "data.source")
    except ConfigError as error:
        return str(error)
    return "the same"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["a", "a", "a"], "the same"),
        (["a", "b", "a"], "data.source: rank 1 has others than rank 0."),
        (["b", "a", "a"], "data.source: ranks 1, 2 have others than rank 0."),
    ],
)
def test_ranks_that_were_given_something_else_are_named_on_all(given, says, ranks):
    assert all(said.startswith(says) for said in ranks(3).run(compared, given))
