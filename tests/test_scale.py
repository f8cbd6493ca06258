"""A run of many ranks: how they meet and are watched costs little more for each rank that comes."""

from __future__ import annotations

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from test_distributed import launched, rank_info
from torch.distributed import HashStore
from waiting import PATIENCE

from megalite.run.rendezvous import Deadline, meet
from megalite.run.stall import blame, read_account
from megalite.tools.benchmarks import published_training, scale
from megalite.tools.benchmarks.simulated_ranks import Task, account_of

RANKS = 64


@pytest.mark.parametrize(
    "strike", [scale.lose(1), scale.lose(8), scale.stand_still], ids=["one lost", "a host lost", "one does not come"]
)
def test_a_hub_of_many_ranks_ends_them_all(strike):
    """The watch of rank 0 as it is, over sockets that speak as the others' would."""
    with scale.watched(RANKS, step_timeout=10.0) as (hub, ranks, found):
        assert found["memory of the hub for it: MiB"] < 16
        assert set(strike(hub, ranks, RANKS)) >= {"seconds until all have ended"}


class Counting:
    """A store that counts what this rank asks of it; looks whether something is there are not counted."""

    def __init__(self, store: HashStore, lock: threading.Lock):
        self._store, self._lock, self.requests = store, lock, Counter()

    def check(self, keys):
        with self._lock:
            return self._store.check(keys)

    def __getattr__(self, name):
        def ask(*arguments):
            if arguments != ("came", 0):
                self.requests[name] += 1
            with self._lock:
                return getattr(self._store, name)(*arguments)

        return ask


def test_a_rank_meets_the_others_in_a_few_requests():
    common, lock = HashStore(), threading.Lock()
    stores = [Counting(common, lock) for _ in range(RANKS)]

    def one(rank: int):
        env = launched(rank, RANKS)
        return meet(env, stores[rank], rank_info(rank), "", Deadline(PATIENCE), lambda here: "gloo")

    with ThreadPoolExecutor(RANKS) as pool:
        met = list(pool.map(one, range(RANKS)))
    assert all([info.rank for info in ranks] == list(range(RANKS)) for ranks, _ in met)
    assert stores[0].requests.total() <= RANKS + 5
    assert max(store.requests.total() for store in stores[1:]) <= 5


def test_who_does_not_come_is_found_among_a_thousand():
    """Generous, for a busy machine: alone it takes a third of a second."""
    world = 1024
    accounts = {0: 11.0, **{rank: read_account(account_of(rank, world)) for rank in range(1, world)}}
    began = time.process_time()
    ranks, line = blame(accounts, Task(world).peers, 10.0)
    assert time.process_time() - began < 10
    assert ranks == [world - 1] and f"has not entered all_reduce #812 of world group [1, 2, ... {world - 1}]" in line


def test_published_training_runs_are_near():
    """All of Megatron-LM's; Llama 3's where its stages have one chunk at least and a chunk a layer at most."""
    known = {one.name: one.predicted() / one.tokens_a_second for one in published_training.TRAINED if not one.missing}
    assert len(known) == 8 and all(abs(ratio - 1) < 0.2 for ratio in known.values()), known
    for one in published_training.TRAINED:
        if one.missing:
            once, often = (one.predicted(interleave=chunks) / one.tokens_a_second for chunks in (1, 7))
            assert 0.5 < once < 0.75 < often < 1.3, one
