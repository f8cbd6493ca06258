"""How work is dealt out over replicas."""

import threading
from hashlib import sha256

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from waiting import PATIENCE

from megalite.config.schema import SamplingParams
from megalite.errors import ConfigError
from megalite.inference.channel import BACKLOG, Share, SharedQueue, compare_ranks, deal, predicted_tokens
from megalite.inference.request import Request


def request(index: int, prompt: int, max_tokens: int, n: int = 1) -> Request:
    return Request(
        id=str(index),
        prompt_token_ids=(1,) * prompt,
        params=SamplingParams(n=n),
        seed=0,
        max_tokens=max_tokens,
    )


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50), st.integers(1, 3)), max_size=40), st.integers(1, 5))
def test_deal_covers_everything_and_balances(shapes, replicas):
    requests = [request(i, *shape) for i, shape in enumerate(shapes)]
    shares = deal(requests, replicas)
    assert sorted(index for share in shares for index in share) == list(range(len(requests)))
    assert all(share == sorted(share) for share in shares)
    loads = [sum(predicted_tokens(requests[index]) for index in share) for share in shares]
    # Greedy: no replica is ahead of another by more than one request.
    assert max(loads) - min(loads) <= max((predicted_tokens(r) for r in requests), default=0)


def test_a_share_is_handed_out_once():
    share = Share([4, 2, 7], [1, 1, 1])
    assert not share.exhausted
    assert share.take(1) == (0, 3)
    assert share.exhausted
    assert share.take(1) == (3, 3)


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_shared_queue_gives_each_place_once(tmp_path, replicas):
    taken = [[] for _ in range(replicas)]

    def replica(number: int) -> None:
        queue = SharedQueue(range(50), [1] * 50, dist.FileStore(str(tmp_path / "store"), replicas), "queue", replicas)
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


def test_a_share_is_not_taken_at_once_if_it_is_very_large():
    share = Share(range(9), [BACKLOG] * 9)
    assert share.take(room=2) == (0, 1)
    assert share.take(room=-BACKLOG) == (1, 1)
    assert share.take(room=BACKLOG) == (1, 3)
    assert share.take(room=9 * BACKLOG) == (3, 9) and share.exhausted


@given(st.lists(st.integers(1, 20), max_size=30), st.lists(st.integers(-2, 40), min_size=1), st.integers(1, 3))
def test_a_claim_fills_the_room_that_there_is(samples, rooms, replicas):
    """Room is of sequences: a request of 8 samples takes 8. A first one that takes more is taken whole."""
    queues = [SharedQueue(range(len(samples)), samples, store := dist.HashStore(), "queue", replicas)]
    queues += [SharedQueue(range(len(samples)), samples, store, "queue", replicas) for _ in range(replicas - 1)]
    place = turn = 0
    while place < len(samples):
        queue, room = queues[turn % replicas], max(rooms[turn % len(rooms)], turn % 2)
        lo, hi = queue.take(room)
        if room > 0:
            assert lo == place and hi > lo
            assert hi == lo + 1 or sum(samples[lo:hi]) <= room
            place = hi
        else:
            assert lo == hi
        turn += 1
    assert all(queue.take(9) == (0, 0) and queue.exhausted for queue in queues)


def test_shared_queue_respects_room(tmp_path):
    queue = SharedQueue(range(3), [1] * 3, dist.FileStore(str(tmp_path / "store"), 1), "queue", 1)
    assert queue.take(room=0) == (0, 0)
    assert queue.take(room=10) == (0, 1)
    assert [queue.take(10), queue.take(10), queue.take(10)] == [(1, 2), (2, 3), (0, 0)]


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
