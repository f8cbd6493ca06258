"""The stopwatch and counters of a rank, and the report that is made of them."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from waiting import PATIENCE

from megalite.monitor.advice import hints
from megalite.monitor.collector import Meter
from megalite.monitor.memory import peak_memory, reset_peak_memory
from megalite.monitor.metrics import PHASES, RankReport
from megalite.monitor.report import format_report
from megalite.monitor.words import (
    COLUMNS,
    format_bytes,
    format_count,
    format_duration,
    format_rate,
    format_seconds,
    wrapped,
)

MIB = 2**20


class Clock:
    """Time that passes when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock():
    return Clock()


def report_of(meter):
    return meter.report(rank=0, tp=0, pp=0, dp=0, layers=(0, 4))


def test_every_second_counts_once(clock):
    """Also of a phase within a phase, and of one whose block fails; what no phase claims is in the total alone."""
    meter = Meter(clock)
    for turn in range(3):
        for n, phase in enumerate(PHASES):
            with meter.phase(phase):
                clock.sleep(n + turn)
        clock.sleep(0.5)
    with meter.phase("compute"):
        clock.sleep(1)
        with meter.phase("communication"):
            clock.sleep(10)
            with pytest.raises(RuntimeError), meter.phase("communication"):
                clock.sleep(20)
                raise RuntimeError
        with meter.phase("waiting"):
            clock.sleep(100)
        clock.sleep(2)
    meter.stop()
    clock.sleep(9)
    report = report_of(meter)
    assert [getattr(report, phase) for phase in PHASES] == [3 + 3, 6 + 30, 9 + 100, 12, 15]
    assert report.seconds == 46.5 + 133 and report.share("waiting") == 109 / 179.5
    with pytest.raises(KeyError):
        meter.phase("lunch")


def test_steps_are_divided_between_prefill_and_decode_by_tokens(clock):
    meter = Meter(clock)
    clock.sleep(4)
    meter.step(prefill_tokens=100, decode_tokens=0)
    clock.sleep(2)
    meter.step(prefill_tokens=0, decode_tokens=8)
    clock.sleep(1000)
    meter.step(prefill_tokens=0, decode_tokens=0)
    clock.sleep(10)
    meter.step(prefill_tokens=30, decode_tokens=10)
    report = report_of(meter)
    assert (report.steps, report.prefill_tokens, report.decode_tokens) == (3, 130, 18)
    assert (report.prefill_seconds, report.decode_seconds) == (4 + 7.5, 2 + 2.5)


def test_start_forgets_what_was_before(clock):
    meter = Meter(clock)
    with meter.phase("compute"):
        clock.sleep(7)
    meter.step(prefill_tokens=5, decode_tokens=5)
    meter.stop()
    meter.start()
    clock.sleep(2)
    meter.step(prefill_tokens=0, decode_tokens=1)
    report = report_of(meter)
    assert (report.compute, report.seconds, report.steps, report.prefill_tokens) == (0, 2, 1, 0)
    assert report.decode_seconds == 2


def test_a_phase_costs_next_to_nothing():
    meter = Meter(time.process_time)  # other programs on the machine do not count
    for _ in range(20_000):
        with meter.phase("compute"):
            pass
    report = report_of(meter)
    assert report.seconds < 0.5  # 25 us each, where about 1 us is normal


def test_a_report_travels_as_json():
    meter = Meter()
    meter.step(prefill_tokens=3, decode_tokens=4)
    report = meter.report(rank=3, tp=1, pp=0, dp=1, layers=(4, 8), load_peak_bytes=5, preemptions=2)
    assert RankReport.from_dict(json.loads(json.dumps(report.as_dict()))) == report
    assert report.peak_bytes > MIB
    with pytest.raises(TypeError, match="lunch"):
        RankReport.from_dict({**report.as_dict(), "lunch": 1})


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_seconds_have_three_digits_and_their_unit():
    given = (0.0, 3.27e-6, 0.00099949, 0.0125, 0.9999, 29.741, 12345.6)
    words = ["0 s", "3.27 us", "999 us", "12.5 ms", "1 s", "29.7 s", "12,346 s"]
    assert [format_seconds(one) for one in given] == words


def test_peak_memory_sees_what_was_freed_again():
    held = bytearray(64 * MIB)
    held[::4096] = b"x" * len(held[::4096])
    del held
    before = reset_peak_memory()
    peak_without = peak_memory() - before
    held = bytearray(48 * MIB)
    held[::4096] = b"x" * len(held[::4096])
    del held
    taken = peak_memory() - before
    assert peak_without < 8 * MIB
    assert 40 * MIB < taken < 56 * MIB


def test_monitor_needs_no_torch_and_nothing_of_ours():
    code = (
        "import sys, megalite.monitor.report; "
        "print([m for m in sys.modules if m.split('.')[0] in ('torch', 'numpy') or "
        "m.startswith('megalite.') and not m.startswith('megalite.monitor')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert done.stdout.strip() == "[]"


# The report


def rank(number, **changes):
    """A healthy rank of a run of 10 seconds."""
    values = dict(
        rank=number,
        tp=0,
        pp=0,
        dp=0,
        layers=(0, 8),
        weight_bytes=20 * MIB,
        kv_bytes=64 * MIB,
        kv_blocks=1024,
        load_peak_bytes=21 * MIB,
        load_bound_bytes=22 * MIB,
        peak_bytes=400 * MIB,
        seconds=10.0,
        compute=7.0,
        communication=1.0,
        waiting=0.5,
        sampling=0.8,
        scheduling=0.2,
        steps=100,
        prefill_tokens=6000,
        decode_tokens=2000,
        prefill_seconds=3.0,
        decode_seconds=5.0,
        prompts=64,
        output_tokens=2064,
        prompt_tokens=8000,
        cached_tokens=2000,
    )
    return RankReport(**{**values, **changes})


def cells(text, number):
    """The row of a rank: its header and cell texts."""
    lines = text.splitlines()
    row = next(line for line in lines if line.split()[:1] == [str(number)])
    assert len(row) == len(lines[0])  # columns line up
    return row


def test_one_healthy_rank():
    lines = format_report([rank(0)]).splitlines()
    assert lines[0].split() == "rank tp/pp/dp layers weights KV cache prefill decode busy comm wait host".split()
    row = cells("\n".join(lines), 0)
    assert row.split() == "0 0/0/0 0-7 20.0 MiB 64.0 MiB 2,000 400 70% 10% 5% 10%".split()
    assert " ".join(line.strip() for line in lines[2:]) == (
        "total: 64 prompts, 2,064 tokens in 10.0 s, 206 tokens/s, 25% of prompt tokens from the prefix cache "
        "memory: at most 400 MiB in one process"
    )


def test_a_rank_that_trains():
    nothing = ("kv_bytes", "prefill_tokens", "decode_tokens", "prompts", "output_tokens", "cached_tokens")
    training = dict.fromkeys(nothing, 0) | {"steps": 1}
    ranks = [rank(n, tp=n, **training, learnt_tokens=5000 * (n == 0)) for n in range(2)]
    lines = format_report(ranks).splitlines()
    assert lines[0].split() == "rank tp/pp/dp layers weights memory busy comm wait host".split()
    assert cells("\n".join(lines), 1).split() == "1 1/0/0 0-7 20.0 MiB 400 MiB 70% 10% 5% 10%".split()
    assert lines[3:] == [
        "total: 1 step, 5,000 tokens in 10.0 s, 500 tokens/s",
        "memory: at most 400 MiB in one process",
    ]


sizes = st.integers(0, 10**16)
shares = st.floats(0, 10)


@given(
    st.lists(
        st.builds(
            rank,
            st.integers(0, 9999),
            tp=st.integers(0, 63),
            pp=st.integers(0, 9),
            dp=st.integers(0, 99),
            layers=st.sampled_from([(0, 8), (90, 126), (3, 3)]),
            weight_bytes=sizes,
            kv_bytes=sizes,
            load_peak_bytes=sizes,
            peak_bytes=sizes,
            starved=st.floats(0, 1),
            compute=shares,
            communication=shares,
            waiting=shares,
            prefill_tokens=st.integers(0, 10**9),
            decode_tokens=st.integers(0, 10**9),
            preemptions=sizes,
            prompts=sizes,
            output_tokens=st.integers(0, 10**9),
        ),
        min_size=1,
        max_size=9,
    )
)
def test_a_report_fits_a_terminal(ranks):
    assert max(map(len, format_report(ranks).splitlines())) <= COLUMNS == 80


def test_lines_of_a_log_break_between_their_parts():
    short = "step 2000/2000  loss 2.1234  lr 1.00e-04  norm 0.123  45,678 tokens/s  MFU 12.3%"
    assert wrapped(short) == short and len(short) == 80
    parts = ["iteration 1/3", "reward 0.250 (best of each prompt 0.500)", "log-probabilities within 1.2e-06", "3.1 s"]
    assert wrapped("  ".join(parts)) == f"{parts[0]}  {parts[1]}\n  {parts[2]}  {parts[3]}"
    assert wrapped(f"step 1  {'word ' * 20}end").count("\n") == 1, "a part that is too long breaks at its words"


def waits_are_counted() -> bool:
    """Whether the kernel says how long threads ran and waited for a core."""
    try:
        return int(Path("/proc/self/schedstat").read_text().split()[0]) > 0
    except (OSError, ValueError, IndexError):
        return False


@pytest.mark.skipif(not waits_are_counted(), reason="this kernel does not count how long threads wait for a core")
def test_a_thread_without_a_core_is_seen():
    """Busy processes on the one core that this one may use; the share is theirs."""
    code = (
        "import os, sys, time; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
        "from megalite.monitor.collector import Meter; meter = Meter(); end = time.process_time() + 0.3\n"
        "while time.process_time() < end: pass\n"
        "print(meter.report(rank=0, tp=0, pp=0, dp=0, layers=(0, 1)).starved)"
    )
    started = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    found = [float(process.communicate(timeout=PATIENCE)[0]) for process in started]
    assert all(0 <= share <= 1 for share in found) and max(found) > 0.2


def test_totals_count_each_replica_once_and_failed_prompts():
    """Only control ranks (last stage, tp 0) know; the others' counts must not matter. Replica 1 took 40 prompts."""
    ranks = []
    for number in range(8):
        dp, pp, tp = number // 4, number // 2 % 2, number % 2
        counts = {"prompts": 999, "failed_prompts": 999, "output_tokens": 0, "prompt_tokens": 0, "cached_tokens": 0}
        if (pp, tp) == (1, 0):
            counts = {"prompts": (24, 40)[dp], "failed_prompts": dp, "output_tokens": 1000, "preemptions": 1}
            counts |= {"prompt_tokens": 100 * (dp + 1), "cached_tokens": 30}
        ranks.append(rank(number, tp=tp, pp=pp, dp=dp, layers=(4 * pp, 4 * pp + 4), seconds=10.0 + dp, **counts))
    text = format_report(reversed(ranks))
    rows = text.splitlines()[1:9]
    assert [row.split()[0] for row in rows] == list("01234567") and rows[6].split()[1:3] == ["0/1/1", "4-7"]
    words = " ".join(text.split())
    assert "total: 64 prompts (1 failed), 2,000 tokens in 11.0 s, 182 tokens/s, 20% of" in words
    assert "2 preemptions memory:" in words and "hint" not in words
    assert "pipeline idle: 5% (stage 0: 5%, stage 1: 5%)" in words


def test_bytes_between_ranks_are_in_the_report_by_axis(clock):
    meter = Meter(clock)
    meter.count_bytes("tp", 2**20)
    meter.start()
    meter.count_bytes("tp", 3 * 2**30)
    meter.count_bytes("pp", 2**20)
    meter.count_bytes("world", 8)
    told = meter.report(rank=0, tp=0, pp=0, dp=0, layers=(0, 2))
    assert {group: one.bytes for group, one in told.traffic.items()} == {"tp": 3 * 2**30, "pp": 2**20, "world": 8}
    text = format_report([told, rank(1)])
    assert "along tp: at most 3.0 GiB by a rank, in 1 message of 3.0 GiB\n" in text
    assert "along pp: at most 1.0 MiB by a rank, in 1 message of 1.0 MiB" in text
    assert "along" not in format_report([rank(0)])


def test_what_was_not_measured_is_a_dash():
    empty = RankReport(rank=0, tp=0, pp=0, dp=0, layers=(3, 3))
    text = format_report([empty])
    assert cells(text, 0).split() == "0 0/0/0 none 0 B 0 B 0% 0% 0% 0%".split()
    assert text.splitlines()[2:] == ["total: 0 prompts, 0 tokens in 0.0 s", "memory: at most 0 B in one process"]
    assert "hint" not in text


def test_bytes_are_readable():
    sizes = (0, 1, 1023, 640 * 2**10, 12.5 * MIB, 300 * MIB, 1023.9 * MIB, 3.25 * 2**30, 5000 * 2**30)
    words = ["0 B", "1 B", "1023 B", "640 KiB", "12.5 MiB", "300 MiB", "1.0 GiB", "3.2 GiB", "4.9 TiB"]
    assert [format_bytes(int(size)) for size in sizes] == words
    assert [format_count(n, "prompt") for n in (0, 1, 2000)] == ["0 prompts", "1 prompt", "2,000 prompts"]


@pytest.mark.parametrize(
    ("number", "seconds", "words"),
    [
        (0, 1, "-"),
        (5, 0, "-"),
        (1, 32, "0.031"),
        (3, 4, "0.75"),
        (0.004, 1, "0.004"),
        (42, 10, "4.2"),
        (99.4, 10, "9.9"),
        (99.6, 10, "10"),
        (1300, 1, "1,300"),
        (99_999, 1, "99,999"),
        (123_456, 1, "123k"),
        (1_100_000, 1, "1.1M"),
    ],
)
def test_rates_are_readable(number, seconds, words):
    assert format_rate(number, seconds) == words


def test_durations_and_lines_are_readable():
    assert [format_duration(s) for s in (0.4, 89, 90, 7000, 11_100)] == ["0 s", "89 s", "2 min", "117 min", "3 h 5 min"]
    assert wrapped("a " * 50).splitlines() == ["a " * 39 + "a", "  " + ("a " * 10).strip()]


# The hints


def stages(*waits):
    return [
        rank(n, pp=n, layers=(4 * n, 4 * n + 4), waiting=wait, compute=9 - wait, communication=0.5)
        for n, wait in enumerate(waits)
    ]


BUSY = {"communication": 8.0, "waiting": 0.0, "preemptions": 99, "starved": 0.9, "seconds": 9.9}


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        (
            [rank(0, starved=0.15), rank(1, tp=1, starved=0.6, communication=8.0)],
            "rank 1 had threads that could have run and got no core for up to 60% of the time.*OMP_NUM_THREADS=1",
        ),
        (
            stages(0.3, 6.1, 7.0),
            r"replica 0: stages 1 \(61%\), 2 \(70%\) waited for stage 0: a layer takes .*try parallel.layers=\[2,4,6\]",
        ),
        (stages(5.5, 0.1), r"stage 0 \(55%\) waited for stage 1: the head and .*try parallel.layers=\[6,2\]"),
        (stages(4.9, 4.9), None),
        (stages(6.0, 6.5), "all 2 stages of replica 0 waited more than half of the time: too few prompts"),
        (
            [rank(0, sampling=6.0, compute=2.0), rank(1, tp=1, waiting=6.2, compute=2.0)],
            "rank 1 waited more than half of the time for rank 0, which spent 60% of it sampling.$",
        ),
        (
            [rank(n, tp=n, communication=(4.5, 5.5, 3.9)[n], compute=2.0) for n in range(3)],
            "ranks 0, 1 spent up to 55% of the time in communication.*parallel.tp",
        ),
        ([rank(0, preemptions=6)], None),
        (
            [rank(0, preemptions=7)],
            "replica 0 ran out of KV cache: 7 preemptions for 64 prompts.*engine.swap_space",
        ),
        ([rank(0, load_peak_bytes=86 * MIB)], None),
        (
            [rank(0), rank(1, tp=1, load_peak_bytes=87 * MIB)],
            r"rank 1 took 87.0 MiB while loading, more than its weights and one tensor \(22.0 MiB\).$",
        ),
        (
            [rank(0), rank(1, dp=1, seconds=6.9, compute=4.0), rank(2, dp=2, seconds=7.1)],
            "replica 1 was done after 6.9 s, replica 0 after 10.0 s.*parallel.dp_mode=async",
        ),
        ([rank(0), rank(1, dp=1, seconds=7.0, compute=4.0)], None),
        ([rank(n, tp=n, **BUSY) for n in range(2)], None),  # a short run says little of speed
        ([rank(0, load_peak_bytes=200 * MIB, **BUSY)], "while loading"),
    ],
)
def test_what_cost_speed_or_memory_is_named(ranks, said):
    found = hints(ranks)
    assert len(found) == bool(said) and all(re.search(said, hint) for hint in found), found
    assert all(" ".join(format_report(ranks).split()).endswith(f"hint: {hint}") for hint in found)


def test_idle_stages_are_in_the_report():
    assert "pipeline idle: 45% (stage 0: 3%, stage 1: 61%, stage 2: 70%)" in format_report(stages(0.3, 6.1, 7.0))
