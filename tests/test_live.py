"""The live table: what a rank tells of itself, and how it is drawn."""

import io
import json
from types import SimpleNamespace

import pytest
import torch

from megalite.config.command_line import read_arguments
from megalite.monitor.collector import Meter
from megalite.monitor.live import EVERY, LiveBoard, LiveFeed, table
from megalite.run.tracing import gpu_use

console = pytest.importorskip("rich.console")


def told_by(rank, pp, compute):
    """What a rank tells after steps of 0.1 s, of which so much is compute."""
    now, told = [0.0], []
    meter = Meter(lambda: now[0])
    feed = LiveFeed(meter, told.append, tp=0, pp=pp, dp=0)
    for _ in range(12):
        with meter.phase("compute"):
            now[0] += compute
        with meter.phase("waiting", "hidden", "pp"):
            now[0] += 0.1 - compute
        meter.step(decode_tokens=8, running=8, queued=3)
    feed.close()
    for _ in range(20):
        now[0] += 1
        meter.step(decode_tokens=8)
    return told


def drawn(found):
    out = io.StringIO()
    console.Console(file=out, width=140).print(found)
    return out.getvalue()


def test_ranks_tell_of_themselves_now_and_then():
    told = told_by(0, 0, 0.06)
    assert len(told) == 2, f"every {EVERY} s, and no more once it is closed"
    last = json.loads(told[-1])
    assert last["busy"]["compute"] == pytest.approx(0.6) and last["tokens"] == pytest.approx(80)
    assert (last["running"], last["queued"], last["gpu"], last["pp"]) == (8, 3, None, 0)


def test_the_table_has_a_line_for_each_rank():
    told = {rank: json.loads(told_by(rank, rank, compute)[-1]) for rank, compute in ((0, 0.06), (1, 0.1))}
    lines = drawn(table(told)).splitlines()
    assert lines[0].strip() == "80 tokens/s", "the stages of a replica work on the same tokens"
    rows = [line.replace("│", " ").split() for line in lines if "0/" in line]
    assert rows == ["0 0/0/0 60% 0% 40% 0% 10 80 8 3".split(), "1 0/1/0 100% 0% 0% 0% 10 80 8 3".split()]
    assert "power" not in lines[2]
    told[1]["gpu"] = {"use": 0.9, "watts": 412.3, "memory": 3 << 30}
    assert "90%" in (text := drawn(table(told))) and "412 W" in text and "3.0 GiB" in text


def test_the_board_draws_until_it_is_closed_and_survives_nonsense():
    out, asked = io.StringIO(), []

    def read():
        asked.append(1)
        return {0: "no JSON"} if len(asked) == 1 else {0: told_by(0, 0, 0.06)[-1]}

    board = LiveBoard(read, stream=out)
    board._closed = SimpleNamespace(wait=lambda seconds: len(asked) >= 3, set=lambda: None)
    with board:
        board._thread.join()
    assert len(asked) == 3
    assert "tokens/s" in out.getvalue()


def test_a_gpu_is_read_and_left_out_where_it_cannot_be(monkeypatch):
    for name, value in (("utilization", 90), ("power_draw", 412_300), ("device_memory_used", 3 << 30)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    gpu = torch.device("cuda", 1)
    assert gpu_use(gpu) == {"use": 0.9, "watts": 412.3, "memory": 3 << 30}
    monkeypatch.setattr(torch.cuda, "power_draw", lambda device: 1 / 0)
    assert gpu_use(gpu) is gpu_use(torch.device("cpu")) is None


def test_the_option_is_the_key():
    assert read_arguments(["--config", "x", "--live"]).overrides == ("monitor.live=true",)
