"""The scheduler over random histories: whatever happens, every request ends once, with its own tokens."""

import os
import random
import subprocess
import sys
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_replica import Replica, expected_output, request
from waiting import PATIENCE

from megalite.errors import ResourceError

OPTIONS = st.fixed_dictionaries(
    {
        "num_blocks": st.integers(2, 16),
        "block_size": st.integers(1, 4),
        "max_num_seqs": st.integers(1, 6),
        "budget": st.integers(1, 12),
        "cohorts": st.integers(1, 3),
        "overlap": st.integers(0, 2),
        "host_blocks": st.sampled_from([0, 5]),
        "prefix_caching": st.booleans(),
        "contiguous": st.booleans(),
        "key_variant": st.sampled_from([lambda limit: 0, lambda limit: limit > 12, lambda limit: limit]),
    }
)
# Few different beginnings, so that prompts meet in the prefix cache.
PROMPTS = st.builds(
    lambda start, repeat, end: ([1, 2, 3, 4] if start else [5]) * repeat + end,
    st.booleans(),
    st.integers(1, 3),
    st.lists(st.integers(0, 1), max_size=3),
)
REQUESTS = st.fixed_dictionaries(
    {
        "prompt": PROMPTS,
        "max_tokens": st.integers(0, 24),
        "n": st.integers(1, 3),
        "stops": st.booleans(),
        "min_tokens": st.integers(0, 3),
        "grammar": st.sampled_from(["", "", "a"]),
        "prompt_logprobs": st.sampled_from([None, 0]),
    }
)
EVENTS = st.one_of(
    st.tuples(st.just("add"), REQUESTS),
    st.tuples(st.just("step"), st.integers(1, 6)),
    st.tuples(st.just("abort"), st.integers(0, 9)),
    st.tuples(st.just("reset"), st.none()),
)


def play(replica: Replica, events) -> set[str]:
    """Let the events happen, then work everything off; returns the names of aborted requests."""
    names, aborted = [], set()
    for action, value in events:
        if action == "add":
            new = request(f"r{len(names)}", **value)
            try:
                replica.add(new)
                names.append(new.id)
            except ResourceError:
                longest = len(new.prompt_token_ids) + max(0, new.max_tokens - 1)
                assert longest > replica.scheduler.pool.num_blocks * replica.block_size
        elif action == "step":
            for _ in range(value):
                replica.step()
        elif action == "abort" and names:
            name = names[value % len(names)]
            replica.abort(name)
            aborted.add(name)
        elif action == "reset":
            replica.scheduler.reset_cache()
    replica.drain()
    return aborted


@settings(max_examples=300, deadline=None)
@given(options=OPTIONS, events=st.lists(EVENTS, max_size=25))
def test_every_request_ends_once_with_the_tokens_of_its_own_history(options, events):
    """Results therefore depend neither on the pool, the cohorts, the batch nor on what else happened."""
    replica = Replica(**options)
    aborted = play(replica, events)
    assert len(replica.ended) == len(replica.sequences)
    for seq in replica.sequences:
        name, output = seq.request.id, seq.token_ids[seq.num_prompt :]
        expected, reason = expected_output(seq.request, seq.index)
        if seq.finish_reason == "abort":
            assert name in aborted and output == expected[: len(output)]
        else:
            assert (output, seq.finish_reason) == (expected, reason)
        prompt = seq.request.prompt_token_ids
        inputs = prompt if seq.request.max_tokens or len(prompt) == 1 else prompt[:-1]
        assert tuple(seq.token_ids[: seq.num_prompt]) == inputs
        if seq.index == 0 and seq.request.params.prompt_logprobs is not None:
            scored = replica.scored.get(name, [])
            assert scored == list(range(len(scored))), "each position once, in order"
            assert len(scored) == seq.num_prompt - 1 or (name in aborted and not output)
        elif seq.request.params.prompt_logprobs is None:
            assert name not in replica.scored


@settings(max_examples=60, deadline=None)
@given(options=OPTIONS, events=st.lists(EVENTS, max_size=15))
def test_equal_histories_make_equal_plans(options, events):
    first, second = Replica(**options), Replica(**options)
    play(first, events)
    play(second, events)
    assert first.trace == second.trace


def scripted_history() -> tuple[Replica, list[int]]:
    """A long crowded history from a seeded generator, and the scheduler's hash after each step."""
    luck = random.Random(0)
    replica = Replica(num_blocks=16, block_size=2, max_num_seqs=6, budget=9, cohorts=2, host_blocks=12)
    for step in range(300):
        if luck.random() < 0.3:
            prompt = [1, 2, 3, 4, 5][: luck.randrange(1, 6)] + [luck.randrange(3) for _ in range(luck.randrange(4))]
            samples, stops = luck.randrange(1, 4), luck.random() < 0.3
            replica.add(request(f"r{step}", prompt, luck.randrange(20), n=samples, stops=stops))
        if luck.random() < 0.05:
            replica.abort(f"r{luck.randrange(step + 1)}")
        replica.step()
    replica.drain()
    return replica, replica.trace


def test_a_crowded_history_does_meet_preemption_swap_and_sharing():
    replica, trace = scripted_history()
    stats = replica.scheduler.stats
    assert stats.preemptions > 20 and stats.swapped_blocks > 20
    assert 200 < stats.prefix_hit_tokens < stats.prefix_query_tokens
    assert len(set(trace)) == len(trace), "every step changes the state"
    assert {seq.finish_reason for seq in replica.ended} == {"stop", "length", "abort"}


def test_histories_do_not_depend_on_the_hash_seed_and_need_no_torch():
    script = (
        "import sys; from test_scheduler_histories import scripted_history; "
        "print(scripted_history()[1]); print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE,
    )
    assert done.stdout.splitlines() == [str(scripted_history()[1]), "False"], "this process hashes by another seed"
