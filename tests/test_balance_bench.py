"""The simulation behind docs/balance.md: what it says is possible is, and what it claims of the balancer holds."""

import json
import random
from dataclasses import replace
from xml.etree import ElementTree

from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.inference.feeds import Feed, SharedQueue, deal
from megalite.tools.benchmarks.arrivals import RECORDINGS, read_trace, record, tailed
from megalite.tools.benchmarks.balance import most_hits, row
from megalite.tools.benchmarks.replica_model import BLOCK, Machine, SimRequest, least_seconds
from megalite.tools.benchmarks.simulation import MemoryStore, Simulation, run_batch

SMALL = Machine(rows=4, blocks=200, tokens=256)
SHAPES = st.tuples(st.floats(0, 5), st.lists(st.integers(0, 3), max_size=2), st.integers(1, 300), st.integers(1, 100))


@settings(max_examples=40)
@given(st.lists(SHAPES, min_size=1, max_size=12), st.lists(st.sampled_from([0.5, 1.0]), min_size=1, max_size=3))
def test_no_schedule_beats_the_bound(shapes, speeds):
    """Each replica with its share as its own, whatever is shared, late or slow; and none for longer than by turns."""
    requests = [
        SimRequest(
            index, arrival, tuple((1 + sum(parts[: n + 1]) * 4 + n, 3) for n in range(len(parts))), tail, out, out
        )
        for index, (arrival, parts, tail, out) in enumerate(sorted(shapes, key=lambda shape: shape[0]))
    ]
    bound = least_seconds(requests, SMALL, speeds)
    for policy in ("round_robin", "prefix"):
        result = Simulation(SMALL, speeds, policy).run(requests)
        assert result.makespan >= bound * (1 - 1e-9)
        assert result.found <= most_hits(requests) * sum(one.prompt for one in requests) + 1e-6
    at_once = [replace(one, arrival=0.0) for one in requests]
    alone = sum(least_seconds([one], SMALL, [min(speeds)]) for one in at_once)
    shares = deal(at_once, len(speeds))
    store = MemoryStore()
    for feeds in (list(map(Feed, shares)), [SharedQueue(shares, own, store, "") for own in range(len(speeds))]):
        result = run_batch(SMALL, speeds, feeds)
        assert len(result.first) == len(requests)
        assert least_seconds(at_once, SMALL, speeds) * (1 - 1e-9) <= result.makespan
        assert result.makespan <= alone + sum(one.prompt for one in requests) * SMALL.prefill * 2 / min(speeds) + 1


def test_a_batch_of_heavy_tailed_prompts_ends_within_a_twentieth_of_the_bound():
    machine = Machine(rows=16)
    requests = [replace(one, max_tokens=one.output) for one in tailed(random.Random(0), 1000)]
    shares, store = deal(requests, 4), MemoryStore()
    result = run_batch(machine, [1.0] * 4, [SharedQueue(shares, own, store, "") for own in range(4)])
    assert len(result.first) == 1000
    assert result.makespan <= 1.05 * least_seconds(requests, machine, [1.0] * 4)


def test_prefixes_are_found_and_a_slow_replica_gets_less():
    recording = RECORDINGS["one at half speed"]
    requests = record(recording, 600, Machine(), recording.speeds, load=0.75)
    rows = {
        policy: row("", policy, requests, Machine(), recording.speeds, simulation.run(requests))
        for policy in ("round_robin", "least_tokens", "prefix")
        for simulation in [Simulation(Machine(), recording.speeds, policy)]
    }
    assert rows["prefix"].hits > rows["least_tokens"].hits + 0.1
    assert rows["prefix"].first_p99 < rows["least_tokens"].first_p99 < rows["round_robin"].first_p99 / 4


def test_requests_of_lost_replicas_end_elsewhere():
    speeds = (1.0,) * 10
    requests = record(RECORDINGS["bursty"], 400, Machine(), speeds, load=0.75)
    result = Simulation(Machine(), speeds, "prefix").run(requests, losing=4)
    assert len(result.first) == 400 and result.replayed > 10


def test_a_published_trace_is_read(tmp_path):
    trace = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": 0, "input_length": 1500, "output_length": 7, "hash_ids": [0, 5, 6]},
        {"timestamp": 3000, "input_length": 1024, "output_length": 9, "hash_ids": [0, 8]},
    ]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, second = read_trace(trace, scale=0.5)
    assert (first.prompt, second.prompt, second.arrival, second.output) == (1500, 1024, 1.5, 9)
    assert first.parts == ((0, 512 // BLOCK), (5, 512 // BLOCK))
    assert len(second.parts) == 1, "the last token is computed in any case"
    ids = [one.prompt_token_ids for one in (first, second)]
    assert ids[0][:512] == ids[1][:512] and not set(ids[0][512:]) & set(ids[1][512:])
    assert list(map(len, ids)) == [1500, 1024]


def test_the_picture_is_drawn_from_the_rows(forks, tmp_path):
    rows = [
        {"recording": "a & b", "policy": policy, "hits": 0.25 * number, "first_p99": 0.1 * (number + 1)}
        for number, policy in enumerate(("round_robin", "least_tokens", "prefix"))
    ]
    (tmp_path / "rows.json").write_text(json.dumps([*rows, {"recording": "c", "policy": "sync"}]))
    run = forks.tool("draw_balance", tmp_path / "rows.json", "--out", tmp_path / "out.svg")
    assert run.code == 0, run.err
    words = [one.text for one in ElementTree.parse(tmp_path / "out.svg").iter("{http://www.w3.org/2000/svg}text")]
    assert {"a & b", "0%", "25%", "50%", "100 ms", "300 ms"} <= set(words)
    (tmp_path / "rows.json").write_text("[]")
    assert "has no request" in forks.tool("draw_balance", tmp_path / "rows.json", "--out", tmp_path / "out.svg").err
