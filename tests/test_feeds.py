"""How work is dealt out over replicas, and that all ranks were given the same."""

import threading
from hashlib import sha256

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
    assert all(share == sorted(share) for share in numbers)
    loads = [sum(map(predicted_tokens, share)) for share in shares]
    # Greedy: no replica is ahead of another by more than one request.
    assert max(loads) - min(loads) <= max(map(predicted_tokens, asked), default=0)


def test_a_share_is_handed_out_once_and_not_at_once_if_it_is_very_large():
    feed = Feed(requests(*[BACKLOG] * 9))
    assert not feed.exhausted
    claims = [(2, (0, 1)), (-BACKLOG, (1, 1)), (BACKLOG, (1, 3)), (9 * BACKLOG, (3, 9)), (1, (9, 9))]
    assert [(room, feed.take(room)) for room, _ in claims] == claims
    assert feed.exhausted and feed.sequences(1, 3) == 2 * BACKLOG


@pytest.mark.parametrize("replicas", [1, 3])
def test_a_shared_queue_gives_each_request_once(tmp_path, replicas):
    taken = [[] for _ in range(replicas)]

    def replica(number: int) -> None:
        store = dist.FileStore(str(tmp_path / "store"), replicas)
        queue = SharedQueue(requests(*[1] * 50), store, "queue", replicas)
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
    store = dist.HashStore()
    queues = [SharedQueue(requests(*samples), store, "queue", replicas) for _ in range(replicas)]
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


def test_claims_get_smaller_to_the_end():
    queue = SharedQueue(requests(*[1] * 20), dist.HashStore(), "queue", 2)
    sizes = []
    while not queue.exhausted:
        lo, hi = queue.take(room=100)
        sizes.append(hi - lo)
    assert sizes == [5, 3, 3, 2, 1, 1, 1, 1, 1, 1, 1]


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
