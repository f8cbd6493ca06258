"""The scheduler: each named behaviour on its own."""

import pytest
from scheduler_replica import STOP_TOKEN, Replica, request

from megalite.config.schema import SamplingParams
from megalite.errors import MegaliteError, ResourceError
from megalite.inference.request import Request, Sampled, StepPlan
from megalite.inference.scheduler import Scheduler


def rows(plan: StepPlan):
    """(request, sample, start, count, sampled) of each row."""
    return [(r.sequence.request.id, r.sequence.index, r.start, r.count, r.sample) for r in plan.rows]


def names(plan: StepPlan):
    return [row.sequence.request.id for row in plan.rows]


# ---- order and budget


def test_decodes_come_first_then_begun_prompts_then_new_ones_in_order():
    replica = Replica(budget=10)
    replica.add(request("a", 3), request("b", 12), request("c", [1, 2]))
    assert rows(replica.step()) == [("a", 0, 0, 3, True), ("b", 0, 0, 7, False)]
    assert rows(replica.step()) == [("a", 0, 3, 1, True), ("b", 0, 7, 5, True), ("c", 0, 0, 2, True)]
    assert rows(replica.step()) == [("a", 0, 4, 1, True), ("b", 0, 12, 1, True), ("c", 0, 2, 1, True)]
    replica.drain()


def test_more_sequences_than_tokens_in_a_step_do_not_starve_the_last():
    replica = Replica(max_num_seqs=8, budget=2)
    replica.add(*(request(name, [1]) for name in "abc"))
    replica.step()
    assert replica.scheduler.max_num_seqs == 2 and names(replica.step()) == ["a", "b"]
    replica.drain()


def test_nobody_overtakes_the_first_that_does_not_fit():
    replica = Replica(num_blocks=4)
    replica.add(request("a", 8, 2), request("b", [5] * 12, 2), request("c", [1, 2], 2))
    assert names(replica.step()) == ["a"]
    assert names(replica.step()) == ["a"] and replica.settle()[0].request.id == "a"
    assert names(replica.step()) == ["b"]
    replica.drain()


def test_one_block_is_left_for_each_sequence_that_grows():
    replica = Replica(num_blocks=3)
    replica.add(request("a", 4, 8), request("b", [1, 2, 3], 2), request("c", [1, 2, 3], 2))
    assert names(replica.step()) == ["a", "b"], "c would fit now, but then a could not grow"
    replica.drain()
    assert replica.scheduler.stats.preemptions == 0


# ---- sharing


def test_samples_share_the_prompt_in_the_plan_that_computes_it():
    replica = Replica()
    seqs = replica.add(request("a", 10, n=3))
    assert rows(replica.step()) == [("a", 0, 0, 10, True), ("a", 1, 8, 2, True), ("a", 2, 8, 2, True)]
    assert len({tuple(seq.blocks[:2]) for seq in seqs}) == 1 and len({seq.blocks[2] for seq in seqs}) == 3
    assert replica.scheduler.stats.prefix_hit_tokens == 16
    replica.drain()


def test_samples_wait_while_the_first_one_computes_the_prompt():
    replica = Replica(budget=6, cohorts=2)
    replica.add(request("a", 14, n=2), request("b", [1, 2, 3]))
    assert rows(replica.step()) == [("a", 0, 0, 6, False)]
    assert rows(replica.step()) == [("b", 0, 0, 3, True)], "the other cohort goes on with the next request"
    assert rows(replica.step()) == [("a", 0, 6, 6, False)]
    assert rows(replica.step()) == [("b", 0, 3, 1, True), ("a", 1, 12, 2, True)]
    assert names(replica.step()) == ["a"]
    assert names(replica.step()) == ["a", "b"], "the earlier arrival first"
    replica.drain()


LONGER = {"key_variant": lambda limit: limit > 14}
NO_CACHE = {"prefix_caching": False}


@pytest.mark.parametrize(
    ("options", "before", "now", "plan"),
    [
        pytest.param({}, ("a", 10), ("b", [*range(100, 110), 7, 7]), ("b", 0, 8, 4, True), id="full blocks are found"),
        pytest.param({}, ("a", 8), ("b", 8), ("b", 0, 4, 4, True), id="the last token is computed in any case"),
        pytest.param(NO_CACHE, ("a", 10), ("b", 10), ("b", 0, 0, 10, True), id="no cache"),
        pytest.param(LONGER, ("a", 10, 4), ("b", 10, 5), ("b", 0, 0, 10, True), id="other keys"),
        pytest.param(LONGER, ("a", 10, 5), ("b", 10, 9), ("b", 0, 8, 2, True), id="the same keys"),
    ],
)
def test_what_a_request_finds_of_an_earlier_one(options, before, now, plan):
    replica = Replica(**options)
    replica.add(request(*before))
    replica.drain()
    replica.add(request(*now))
    assert rows(replica.step()) == [plan]
    assert replica.scheduler.stats.prefix_hit_tokens == plan[2]
    replica.drain()


def test_without_prefix_caching_the_samples_of_one_request_share():
    replica = Replica(prefix_caching=False)
    replica.add(request("a", 10, 2, n=2), request("b", 10, 2))
    assert rows(replica.step()) == [("a", 0, 0, 10, True), ("a", 1, 8, 2, True), ("b", 0, 0, 10, True)]
    replica.drain()


def test_after_a_reset_nothing_old_is_found_even_if_it_is_finished_later():
    replica = Replica(budget=10)
    replica.add(request("old", [*range(9)], 1), request("begun", 10, 5))
    assert rows(replica.step())[1] == ("begun", 0, 0, 1, False)
    replica.scheduler.reset_cache()
    replica.drain()
    replica.add(request("new", [*range(9)], 1))
    assert rows(replica.step()) == [("new", 0, 0, 9, True)]
    replica.drain()
    replica.add(request("newer", 10, 5))
    assert rows(replica.step()) == [("newer", 0, 0, 10, True)]
    replica.add(request("newest", 10, 5))
    assert ("newest", 0, 8, 2, True) in rows(replica.step())


def test_waiting_requests_follow_a_reset():
    replica = Replica(budget=6)
    replica.add(request("a", [1] * 9, 1, n=2), request("b", [1] * 9, 1, n=2))
    assert rows(replica.step()) == [("a", 0, 0, 6, False)]
    replica.scheduler.reset_cache()
    assert rows(replica.step()) == [("a", 0, 6, 3, True), ("a", 1, 0, 3, False)], "not what its sibling computed before"
    assert rows(replica.step()) == [("a", 1, 3, 6, True)]
    assert rows(replica.step()) == [("b", 0, 8, 1, True), ("b", 1, 8, 1, True)], "what the second sample computed after"
    replica.drain()


def test_a_request_that_waits_does_not_find_what_was_begun_before_a_reset():
    replica = Replica(max_num_seqs=1, budget=3)
    replica.add(request("a", 10, 1), request("b", 10, 1))
    replica.step()
    replica.scheduler.reset_cache()
    while replica.scheduler.num_waiting:
        plan = replica.step()
    assert rows(plan) == [("b", 0, 0, 3, False)]
    replica.drain()


# ---- preemption


def crowded(**options):
    """Three requests that do not fit to their ends; c is preempted after a few steps. d waits all the time."""
    replica = Replica(num_blocks=9, block_size=2, max_num_seqs=3, **options)
    seqs = replica.add(request("a", [1, 2, 3], 7), request("b", [4, 5, 6], 7), request("c", [7, 8, 9], 7))
    replica.add(request("d", [1, 2], 1))
    while replica.scheduler.stats.preemptions == 0:
        plan = replica.step()
    assert names(plan) == ["a", "b"] and seqs[2].cohort is None and seqs[2].finish_reason is None
    return replica, seqs, plan


def test_the_latest_arrival_is_preempted_and_comes_before_new_requests():
    replica, (_, _, c), plan = crowded()
    assert plan.copies == () and c.num_computed == 0 and c.num_output > 0
    while "c" not in names(plan):
        assert "d" not in names(plan)
        plan = replica.step()
    replica.drain()
    assert len(replica.ended) == 4


def test_a_prompt_that_is_partly_computed_gives_way_to_a_sequence_that_decodes():
    replica = Replica(num_blocks=10, block_size=2, budget=2)
    _, b = replica.add(request("a", [1, 2, 3], 9), request("b", 13, 2))
    while not replica.scheduler.stats.preemptions:
        assert b.num_computed < 12
        plan = replica.step()
    assert names(plan) == ["a"] and (b.num_computed, b.blocks) == (0, [])
    replica.drain()


def test_a_recomputed_sequence_finds_its_own_blocks():
    replica = Replica(num_blocks=6, block_size=2)
    replica.add(request("a", [1, 2, 3], 6), request("b", [4, 5, 6], 6))
    while not replica.scheduler.stats.preemptions:
        replica.step()
    replica.abort("a")
    replica.settle()
    assert rows(replica.step()) == [("b", 0, 4, 3, True)], "a has taken one of its three blocks, the last"
    assert replica.scheduler.stats.prefix_hit_tokens == 4
    replica.drain()


def test_swap_copies_out_and_in_again_before_anything_new_is_admitted():
    replica, (_, _, c), plan = crowded(host_blocks=4)
    computed = c.num_computed
    assert [copy.kind for copy in plan.copies] == ["out"] * -(-computed // 2)
    assert [copy.target for copy in plan.copies] == c.host_blocks
    assert replica.scheduler.stats.swapped_blocks == len(plan.copies)
    held = list(c.host_blocks)
    while c.cohort is None:
        assert "d" not in names(plan)
        plan = replica.step()
    into = [(copy.source, copy.target) for copy in plan.copies if copy.kind == "in"]
    assert into and set(into) <= set(zip(held, c.blocks, strict=False)), "blocks still cached need no copy"
    assert ("c", 0, computed, 1, True) in rows(plan) and c.host_blocks == []
    replica.drain()


def test_a_shared_block_that_is_swapped_out_stays_with_the_other_holder():
    replica = Replica(num_blocks=8, block_size=2, host_blocks=8)
    first, second = replica.add(request("a", 5, 7, n=2))
    while not replica.scheduler.stats.preemptions:
        plan = replica.step()
    shared = first.blocks[:2]
    assert [copy.source for copy in plan.copies][:2] == shared and second.host_blocks
    while second.cohort is None:
        replica.step()
    assert second.blocks[:2] == shared, "found in the cache again"
    replica.drain()


def test_only_the_own_cohort_is_preempted_at_last_the_sequence_itself():
    replica = Replica(num_blocks=6, block_size=2, cohorts=2, host_blocks=6)
    a, b = replica.add(request("a", [1, 2, 3], 8), request("b", [4, 5, 6], 8))
    while not replica.scheduler.stats.preemptions:
        plan = replica.step()
    assert plan.rows == () and plan.copies == (), "what is to be copied goes with the next plan that has rows"
    preempted, other = (a, b) if a.cohort is None else (b, a)
    assert preempted.host_blocks and other.cohort is not None
    plan = replica.step()
    assert names(plan) == [other.request.id] and {copy.kind for copy in plan.copies} == {"out"}
    replica.drain()


# ---- cohorts


def test_cohorts_share_the_work_evenly():
    replica = Replica(cohorts=2, max_num_seqs=8)
    replica.add(*(request(name, [1, 2, 3]) for name in "abcde"))
    assert names(replica.step()) == ["a", "b", "c"] and names(replica.step()) == ["d", "e"]
    replica.drain()


def test_each_cohort_gets_its_part_of_the_sequences_at_least_one():
    replica = Replica(cohorts=3, max_num_seqs=2)
    replica.add(*(request(name, [1, 2, 3]) for name in "abcdef"))
    assert [names(replica.step()) for _ in range(3)] == [["a"], ["b"], ["c"]]
    assert (replica.scheduler.num_running, replica.scheduler.num_waiting) == (3, 3)
    replica.drain()


def test_a_cohort_without_work_gets_an_empty_plan():
    replica = Replica(cohorts=2)
    replica.add(request("a", 3))
    replica.step()
    plan = replica.step()
    assert plan.rows == () and plan.cohort == 1
    assert replica.scheduler.finish(plan, ()) == []


# ---- the end of a sequence


@pytest.mark.parametrize(
    ("token", "stopped", "options", "reason"),
    [
        (STOP_TOKEN, False, {}, "stop"),
        (STOP_TOKEN, False, {"min_tokens": 2}, None),
        (STOP_TOKEN, False, {"min_tokens": 1}, "stop"),
        (0, True, {}, "stop"),
        (0, False, {}, None),
        (0, False, {"max_tokens": 1}, "length"),
        (STOP_TOKEN, False, {"max_tokens": 1}, "stop"),
    ],
)
def test_finish_reasons(token, stopped, options, reason):
    scheduler = Replica().scheduler
    (seq,) = scheduler.add(request("a", 3, **{"max_tokens": 4, **options}, stops=True))
    ended = scheduler.finish(scheduler.schedule(), (Sampled(token, stopped),))
    assert seq.finish_reason == reason and ended == ([seq] if reason else [])
    assert seq.token_ids == [100, 101, 102, token]
    assert scheduler.has_work() == (reason is None)


def test_no_output_wanted_only_scores_the_prompt():
    replica = Replica(budget=4)
    (seq,) = replica.add(request("a", 6, 0, prompt_logprobs=1))
    plans = [replica.step(), replica.step()]
    assert [rows(plan) for plan in plans] == [[("a", 0, 0, 4, False)], [("a", 0, 4, 1, False)]], "the last is no input"
    assert [plan.rows[0].prompt_logits for plan in plans] == [(0, 4), (4, 5)]
    assert replica.settle() == [seq] and seq.finish_reason == "length" and seq.num_output == 0


def test_abort_of_what_waits_what_runs_and_what_is_in_flight():
    replica = Replica(max_num_seqs=2)
    a, b, c = replica.add(*(request(name, 3) for name in "abc"))
    replica.step()
    assert replica.scheduler.abort("c") == [c] and c.finish_reason == "abort"
    assert replica.scheduler.abort("b") == [b] and b.finish_reason == "abort", "in flight"
    assert len(replica.scheduler._free_rows) == 0, "the plan in flight still writes to its row"
    assert replica.settle() == [] and b.num_output == 0 and len(replica.scheduler._free_rows) == 1
    assert replica.scheduler.abort("a") == [a] and a.num_output == 1, "its plan is finished already"
    assert replica.scheduler.abort("a") == [] and not replica.scheduler.has_work()
    assert replica.scheduler.pool.num_free == replica.scheduler.pool.num_blocks


def test_tokens_are_planned_before_the_last_one_is_known_and_dropped_where_that_was_the_end():
    replica = Replica(overlap=1)
    [a] = replica.add(Request(id="a", prompt_token_ids=(1, 2), params=SamplingParams(), seed=0, max_tokens=3))
    assert [rows(replica.step())[0][2:] for _ in range(3)] == [(0, 2, True), (2, 1, True), (3, 1, True)]
    assert rows(replica.step()) == [], "all that it may have are planned"
    replica.drain()
    assert a.num_output == 3
    replica.add(stopping := request("b", 2, 9))
    [b] = replica.sequences[1:]
    plans = [replica.scheduler.schedule(), replica.scheduler.schedule()]
    assert replica.scheduler.finish(plans[0], (Sampled(7, stopped=True),)) == [b] and b.finish_reason == "stop"
    assert replica.scheduler.finish(plans[1], (Sampled(8),)) == [] and b.token_ids == [*stopping.prompt_token_ids, 7]


def test_a_row_without_a_token_ends_its_sequence_alone():
    replica = Replica()
    a, b = replica.add(request("a", 3), request("b", 4))
    plan = replica.scheduler.schedule()
    assert replica.scheduler.finish(plan, (Sampled(-1), Sampled(3))) == [a]
    assert a.finish_reason == "error" and a.num_output == 0 and b.token_ids[-1] == 3


# ---- what cannot be, and what is reported


def test_what_can_never_run_is_refused():
    scheduler = Scheduler(num_blocks=3, block_size=4, max_num_seqs=4, max_num_batched_tokens=8, max_model_len=20)
    with pytest.raises(ResourceError, match=r"10 tokens\) and output \(4\) .* 3 blocks of 4 tokens"):
        scheduler.add(request("a", 10, 4))
    with pytest.raises(MegaliteError, match=r"10 tokens\) and output \(11\) exceed max_model_len \(20\)"):
        scheduler.add(request("a", 10, 11))
    with pytest.raises(MegaliteError, match="prompt is empty"):
        scheduler.add(request("a", [], 4))
    assert not scheduler.has_work()
    scheduler.add(request("a", 10, 3))  # the last token is never computed: 12 tokens in the cache
    with pytest.raises(MegaliteError, match="request a: a request of this id is unfinished"):
        scheduler.add(request("a", 3))


def test_results_come_in_the_order_of_the_plans_and_match_them():
    scheduler = Replica().scheduler
    scheduler.add(request("a", 3))
    plan, later = scheduler.schedule(), scheduler.schedule()
    with pytest.raises(AssertionError, match="plan 1 is not the oldest in flight"):
        scheduler.finish(later, (Sampled(0),))
    with pytest.raises(AssertionError, match="0 results for 1 sampled rows"):
        scheduler.finish(plan, ())


def test_sequences_that_fit_are_contiguous_when_that_is_asked_for():
    for contiguous in (True, False):
        replica = Replica(contiguous=contiguous, num_blocks=40)
        seqs = replica.add(*(request(name, [ord(name)] * 3, 20) for name in "abcde"))
        for _ in range(12):
            replica.step()
        assert all(len(seq.blocks) > 2 and seq.contiguous == contiguous for seq in seqs)


def test_the_hash_of_the_state_tells_results_apart():
    schedulers = [Replica().scheduler for _ in range(2)]
    plans = []
    for scheduler in schedulers:
        scheduler.add(request("a", 3, 9))
        plans.append(scheduler.schedule())
    assert schedulers[0].state_hash() == schedulers[1].state_hash()
    for token, (scheduler, plan) in enumerate(zip(schedulers, plans, strict=True)):
        scheduler.finish(plan, (Sampled(token),))
    assert schedulers[0].state_hash() != schedulers[1].state_hash()


def test_a_row_with_a_grammar_waits_for_its_values_and_no_other_does():
    replica = Replica(overlap=1)
    replica.add(request("free", 3, 5), request("bound", 2, 3, grammar="a"))
    assert [names(replica.step()) for _ in range(7)] == [
        ["free", "bound"],
        ["free"],
        ["free", "bound"],
        ["free"],
        ["free", "bound"],
        [],  # the last tokens are on their way
        [],
    ]
    replica.drain()
