"""The collector's spans, on host and device, the timeline that is made of them, and the clocks of ranks."""

import json
import threading
from collections import deque

import pytest
import torch.distributed as dist

from megalite.monitor import timeline as timeline_module
from megalite.monitor.collector import Meter
from megalite.monitor.timeline import Timeline, read_timeline
from megalite.run.tracing import clock_offset


class Clock:
    """Time that passes when told to."""

    def __init__(self, now=100.0):
        self.now = now

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class Device:
    """A stream: what is given to it happens one after the other, each thing no sooner than it was given."""

    def __init__(self, clock):
        self.clock, self.free_at, self.events = clock, 0.0, 0

    def work(self, seconds):
        self.free_at = max(self.free_at, self.clock()) + seconds

    def event(self):
        self.events += 1
        return StreamEvent(self)


class StreamEvent:
    def __init__(self, device):
        self.device, self.at = device, None

    def record(self):
        self.at = max(self.device.free_at, self.device.clock())

    def query(self):
        return self.at <= self.device.clock()

    def elapsed_time(self, end):
        return 1000 * (end.at - self.at)


class Spans:
    """A sink that keeps what it is given."""

    def __init__(self):
        self.spans, self.flows, self.ticks = [], [], 0

    def span(self, lane, name, begin, end, phase="", values=None):
        self.spans.append((lane, name, begin, end))

    def flow(self, name, number, at, *, begins):
        self.flows.append((name, number, begins))

    def values(self, lane, at, values):
        pass

    def tick(self, now):
        self.ticks += 1


def report_of(meter):
    return meter.report(rank=0, tp=0, pp=0, dp=0, layers=(0, 4))


def test_a_device_is_measured_without_waiting_for_it():
    """The host launches in no time and is far ahead; the phases are the device's, each second once, also nested."""
    clock = Clock()
    device, meter = Device(clock), Meter(clock)
    meter.watch_device(device.event)
    meter.sink = sink = Spans()
    for _ in range(3):
        with meter.phase("compute", "forward"):
            device.work(2)
            with meter.communication("tp", 1000, "all_reduce"):
                device.work(1)
            device.work(3)
        with meter.phase("scheduling", on_device=False):
            clock.sleep(0.5)
        meter.step(decode_tokens=1)
    assert clock() == 101.5 and report_of(meter).device == {}, "nothing is over yet, and nobody waited"
    clock.sleep(30)
    meter.stop()
    report = report_of(meter)
    assert report.device == pytest.approx({"compute": 15, "communication": 3})
    assert (report.compute, report.spent("compute"), report.scheduling) == (0, pytest.approx(15), 1.5)
    assert report.traffic["tp"].bandwidth == pytest.approx(1000)
    on_device = [one for one in sink.spans if one[0] == "device"]
    assert on_device[0] == ("device", "forward", 100, 102) and on_device[1] == ("device", "all_reduce", 102, 103)
    assert [one[2:] for one in on_device] == sorted(one[2:] for one in on_device)
    for _ in range(50):
        with meter.phase("compute"):
            device.work(0.1)
        clock.sleep(1)
        meter.step(decode_tokens=1)
    assert device.events <= 16, "events are used again"


def test_what_a_graph_moves_counts_on_each_replay():
    clock = Clock()
    device, meter = Device(clock), Meter(clock)
    meter.watch_device(device.event)
    with meter.phase("compute"), meter.capturing() as tally:
        clock.sleep(5)
        for _ in range(4):
            with meter.communication("tp", 100):
                clock.sleep(1)
        meter.count_bytes("dp", 7)
    assert report_of(meter).traffic == {} and device.events == 2
    for _ in range(3):
        meter.replayed(tally)
    moved = report_of(meter).traffic
    assert (moved["tp"].bytes, moved["tp"].messages, moved["dp"].bytes) == (1200, 12, 21)
    assert moved["tp"].timed_bytes == 0 and moved["tp"].bandwidth == 0, "its time is not known apart"


def test_queues_and_parts_are_summed_over_time():
    clock = Clock()
    meter = Meter(clock)
    for queued in (4, 2, 0):
        clock.sleep(2)
        meter.step(decode_tokens=3, running=3, queued=queued)
    report = report_of(meter)
    assert (report.running_seconds, report.queued_seconds, report.steps) == (18, 12, 3)
    for _ in range(2):
        with meter.part("sampling"):
            clock.sleep(3)
    assert meter.take_parts() == {"sampling": 6} and meter.take_parts() == {}
    heard = []
    meter.on_step.append(lambda prefill, decode: heard.append((prefill, decode)))
    meter.step(prefill_tokens=2, decode_tokens=1)
    assert heard == [(2, 1)]


def record(path, rank, ranks=1, **how):
    return Timeline(path, rank=rank, ranks=ranks, label=f"rank {rank}", to_origin=lambda at: at - 100, **how)


@pytest.mark.parametrize("name", ["t.json", "t.json.gz"])
def test_a_timeline_of_two_ranks(name, tmp_path):
    """A message is an arrow from the sender's span to what the receiver does next."""
    path = tmp_path / "new" / name
    Timeline.create(path, "token")
    assert Timeline.was_created(path, "token") and not Timeline.was_created(path, "other")
    assert not Timeline.was_created(tmp_path / "absent", "token")
    clock = Clock()
    meters = [Meter(clock), Meter(clock)]
    sinks = [record(path, rank, 2, ends=rank == 0) for rank in range(2)]
    for meter, sink in zip(meters, sinks, strict=True):
        meter.sink = sink
    with meters[0].phase("communication", "send", "pp"):
        clock.sleep(1)
        meters[0].message("hidden 0>1", begins=True)
    with meters[1].phase("waiting", "hidden", "pp"):
        clock.sleep(0.5)
        meters[1].message("hidden 0>1", begins=False)
    with meters[1].phase("compute", "forward"):
        clock.sleep(2)
    meters[1].step(prefill_tokens=3, running=1)
    for sink in sinks:
        sink.close()
    torn = list(read_timeline(path))
    sinks[0].finish()
    events = list(read_timeline(path))
    assert events[:-1] == torn and events[-1]["name"] == "end", "without its end it reads the same"
    if name == "t.json":
        assert json.loads(path.read_text()) == events
    tracks = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    spans = {e["name"]: (tracks[e["pid"], e["tid"]], e["ts"], e["dur"]) for e in events if e["ph"] == "X"}
    assert spans["forward"] == ("host", 1.5e6, 2e6) and spans["send"] == ("pp", 0, 1e6)
    assert spans["step"] == ("steps", 0, 3.5e6)
    out, into = (next(e for e in events if e["ph"] == kind) for kind in "sf")
    assert out["id"] == into["id"] and (out["pid"], into["pid"]) == (0, 1) and out["ts"] <= into["ts"]
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    assert [e for e in read_timeline(path)] == events[: len(list(read_timeline(path)))], "what a kill leaves"


def test_a_timeline_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(timeline_module, "FILE_BYTES", 40_000)
    path = tmp_path / "t.json"
    Timeline.create(path, "")
    sink = record(path, 0, 2, ends=True)
    most = 0
    for step in range(20_000):
        sink.span("host", "forward", 100 + step, 101 + step)
        sink.tick(100.0)
        most = max(most, len(sink._lines))
    sink.close()
    assert most <= timeline_module.FLUSH_EVENTS and sink.dropped > 10_000
    assert path.stat().st_size <= 20_000 + 200
    with pytest.raises(ValueError, match="no timeline"):
        (tmp_path / "x").write_text("{}")
        list(read_timeline(tmp_path / "x"))


def test_clocks_of_other_hosts_are_brought_to_rank_0s():
    """Ranks 1 and 2 share a host whose clock is 1,000 s ahead; every message takes a moment."""
    store, ticks = dist.HashStore(), deque([0.0])
    lock = threading.Lock()

    def clock(ahead):
        with lock:
            ticks[0] += 0.001
            return ticks[0] + ahead

    found = {}

    def ask(rank):
        ahead = 0.0 if rank in (0, 3) else 1000.0
        found[rank] = clock_offset(store, rank, [1, 2], lambda: clock(ahead))

    threads = [threading.Thread(target=ask, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[3] == 0 and found[1] == pytest.approx(-1000, abs=1) == found[2]
