"""The advice at the end of a run: made for runs that have one bottleneck, and followed there.

Runs are played with clocks of their own, through the collectors that real ones use, so that what a rank measures is
exact: whether the advice helps is a fact of the model and not of how busy this machine is.
"""

import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalite.core.schedules import Backward, Forward, Receive, Send, training
from megalite.errors import ConfigError
from megalite.monitor.advice import StageCosts, hints
from megalite.monitor.collector import Meter
from megalite.monitor.timeline import Timeline
from megalite.tools import plot_timeline, toolkit


class Rank:
    """A rank with a clock and a collector of its own."""

    def __init__(self, rank, **place):
        self.now = 0.0
        self.meter = Meter(lambda: self.now)
        self.facts = {"rank": rank, "tp": 0, "pp": 0, "dp": 0, "layers": (0, 1), "weight_bytes": 2**20} | place

    def spend(self, phase, seconds, name="", group=""):
        with self.meter.phase(phase, name, group):
            self.now += seconds

    def wait_until(self, when, name="hidden"):
        with self.meter.phase("waiting", name, "pp"):
            self.now = max(self.now, when)

    def report(self, **more):
        self.meter.stop()
        return self.meter.report(**self.facts, **more)


def generate(layers, each, head, *, steps=200, sinks=()):
    """A pipeline with one cohort a stage: seconds `each` of a layer, by stage, and `head` of the last stage besides."""
    bounds = [sum(layers[:stage]) for stage in range(len(layers) + 1)]
    ranks = [Rank(n, pp=n, layers=span) for n, span in enumerate(pairwise(bounds))]
    for rank, sink in zip(ranks, sinks, strict=False):
        rank.meter.sink = sink
    done = []
    for step in range(steps):
        sent = 0.0
        for stage, rank in enumerate(ranks):
            if step >= len(ranks):
                rank.wait_until(done[step - len(ranks)], "news")
            if stage:
                rank.wait_until(sent)
            rank.spend("compute", each[stage] * layers[stage], f"forward {step}")
            if rank is ranks[-1]:
                rank.spend("sampling", head)
            sent = rank.now
            rank.meter.step(decode_tokens=8, running=32)
        done.append(sent)
    return [rank.report(output_tokens=8 * steps) for rank in ranks]


def waiting(reports):
    return sum(report.share("waiting") for report in reports) / len(reports)


@pytest.mark.parametrize(
    ("layers", "each", "head", "why"),
    [
        ([8, 8, 8, 8], [0.02] * 4, 0.1, "the head and sampling cost as much as 5.0 of its layers"),
        ([8, 8, 8, 8], [0.02, 0.02, 0.05, 0.02], 0.02, "a layer takes 2.5 times as long there"),
        ([4, 12], [0.02, 0.02], 0.01, "it holds 12 layers"),
    ],
    ids=["a large head", "a slow machine", "a bad cut"],
)
def test_uneven_stages_are_cut_anew(layers, each, head, why):
    before = generate(layers, each, head)
    [hint] = hints(before)
    assert why in hint and "waited for stage" in hint
    cut = list(map(int, re.search(r"parallel\.layers=\[([\d,]+)\]", hint)[1].split(",")))
    assert sum(cut) == sum(layers) and len(cut) == len(layers)
    after = generate(cut, each, head)
    assert waiting(after) < 0.6 * waiting(before) and after[0].seconds < 0.9 * before[0].seconds
    assert not any("parallel.layers" in one for one in hints(after))
    promised = int(re.search(r"would wait (\d+)%", hint)[1]) / 100
    assert abs(promised - waiting(after)) < 0.03, "what was promised has come"


def test_even_stages_are_left_alone():
    assert hints(generate([8, 8, 8, 8], [0.02] * 4, 0.01)) == []


@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=5), st.floats(0, 3), st.integers(0, 12), st.integers(1, 2))
def test_the_cut_is_the_best_one(each, head, more, last):
    costs = StageCosts(each=tuple(each), head=head)

    def every(stages, left):
        if stages == 1:
            yield [left]
        else:
            for count in range(1, left - stages + 2):
                yield from ([count, *rest] for rest in every(stages - 1, left - count))

    found = costs.best(len(each) + more)
    assert costs.slowest(found) == pytest.approx(min(map(costs.slowest, every(len(each), len(each) + more))))


def decode(tp, dp, *, tokens=512, layers=16, message=8 << 10):
    """Sequences divided among replicas; two sums a layer over tp, each of which takes 1 ms however small it is."""
    ranks = [Rank(n, tp=n % tp, dp=n // tp, layers=(0, layers)) for n in range(tp * dp)]
    for rank in ranks:
        for _ in range(tokens):
            for _ in range(layers):
                rank.spend("compute", 0.0005 + 0.001 / tp / dp)
                for _ in range(2 if tp > 1 else 0):
                    with rank.meter.communication("tp", message, "all_reduce"):
                        rank.now += 0.001
            rank.meter.step(decode_tokens=8 // dp, running=8 // dp)
    return [rank.report() for rank in ranks]


def test_many_small_sums_over_tp_ask_for_replicas():
    before = decode(2, 1)
    [hint] = hints(before)
    assert "ranks 0, 1 spent up to 67% of the time in collectives of 8.0 KiB along tp, which take their latency" in hint
    layout = {name: int(size) for name, size in re.findall(r"parallel\.(tp|dp)=(\d)", hint)}
    assert "2.0 MiB of weights" in hint and layout["dp"] == 2 and layout["tp"] == 1
    after = decode(layout["tp"], layout["dp"])
    assert hints(after) == [] and after[0].seconds < 0.5 * before[0].seconds
    assert after[0].share("communication") == 0
    [large] = hints(decode(2, 1, message=8 << 20))
    assert "for which the links are too slow" in large


def train(stages, micro_batches, chunks=1, *, steps=4):
    """The real schedule, played: a forward pass takes a second, a backward pass two, divided by the chunks."""
    ranks = [Rank(n, pp=n, layers=(4 * n, 4 * n + 4)) for n in range(stages)]
    for _ in range(steps):
        sent = {}
        left = {n: list(training(stages, n, micro_batches, chunks)) for n in range(stages)}
        while any(left.values()):
            for n, rank in enumerate(ranks):
                while left[n] and (when := arrival(left[n][0], n, stages, chunks, sent)) is not None:
                    one = left[n].pop(0)
                    if isinstance(one, Forward | Backward):
                        rank.wait_until(when)
                        rank.spend("compute", (1 if isinstance(one, Forward) else 2) / chunks)
                        sent[type(one), one.micro_batch, one.chunk * stages + n] = rank.now
        for rank in ranks:
            rank.meter.step(learnt_tokens=8)
    return [rank.report(learnt_tokens=8 * steps) for rank in ranks]


def arrival(one, stage, stages, chunks, sent):
    """When the input of an instruction is there; None: not yet."""
    if isinstance(one, Send | Receive):
        return 0.0
    place = one.chunk * stages + stage
    before = place - 1 if isinstance(one, Forward) else place + 1
    if before in (-1, stages * chunks):
        return 0.0
    return sent.get((type(one), one.micro_batch, before))


def test_a_pipeline_that_fills_and_drains_asks_for_more_micro_batches():
    before = train(4, 4)
    [hint] = hints(before)
    assert "the 4 stages waited 41%" in hint and "train.gradient_accumulation_steps" in hint
    more, interleaved = train(4, 16), train(4, 4, 2)
    assert "parallel.interleave=2" in hint
    assert waiting(more) < 0.5 * waiting(before) and waiting(interleaved) < 0.7 * waiting(before)
    assert hints(more) == []


def queue(places, *, arrivals=64, steps=20):
    """Requests that come at once, of which as many run as there are places."""
    rank, left, running = Rank(0), arrivals, []
    while left or running:
        while left and len(running) < places:
            running.append(steps)
            left -= 1
        rank.spend("compute", 0.1)
        rank.meter.step(decode_tokens=len(running), running=len(running), queued=left)
        running = [more - 1 for more in running if more > 1]
    return [rank.report(prompts=arrivals)]


def test_a_long_queue_asks_for_places():
    before = queue(8)
    [hint] = hints(before)
    assert "28 sequences waited for a place on average while 8 ran" in hint and "engine.max_num_seqs" in hint
    after = queue(64)
    assert hints(after) == [] and after[0].queued_seconds == 0 < before[0].queued_seconds


# The picture


def test_a_pipeline_as_a_picture(tmp_path, capsys):
    """Before and after the advice, on one scale."""
    files = []
    for name, layers in (("before.json", [1, 3, 3, 1]), ("after.json.gz", [2, 2, 2, 2])):
        path = tmp_path / name
        Timeline.create(path, "")
        sinks = [
            Timeline(path, rank=n, ranks=4, label=f"rank {n}: stage {n}", to_origin=lambda at: at, ends=n == 0)
            for n in range(4)
        ]
        generate(layers, [0.02] * 4, 0.0, steps=40, sinks=sinks)
        for sink in sinks:
            sink.close()
        files.append(str(path))
    parser = toolkit.Parser("")
    plot_timeline.add_arguments(parser)
    out = tmp_path / "picture.svg"
    assert plot_timeline.run(parser.parse_args([*files, "--out", str(out), "--title", "as it was"])) == 0
    said = capsys.readouterr().out
    assert "as it was: 240.0 ms, in which 4 ranks waited 33% on average" in said
    assert f"{files[1]}: 160.0 ms, in which 4 ranks waited 0% on average" in said
    texts = [one.text for one in ElementTree.parse(out).iter("{http://www.w3.org/2000/svg}text")]
    assert texts.count("rank 1: stage 1") == 2 and texts.count("waits 67%") == 2 and texts.count("waits 0%") == 6
    assert any(re.fullmatch(r"F\d+", text) for text in texts)
    for wrong, said in ((["--first", "99"], "has 40 steps, too few"), (["--steps", "41"], "too few for 41")):
        with pytest.raises(ConfigError, match=said):
            plot_timeline.run(parser.parse_args([files[0], "--out", str(out), *wrong]))
    with pytest.raises(ConfigError, match="no timeline that megalite wrote"):
        plot_timeline.run(parser.parse_args([str(out), "--out", str(out)]))
