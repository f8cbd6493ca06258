"""tools/bench.py serve: its client against answers cut anywhere, and what it makes of them."""

from __future__ import annotations

import json
import socket
import threading
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serve_fakes import request
from waiting import PATIENCE

from megalite.errors import ConfigError
from megalite.serve.frames import Frames, frame
from megalite.serve.link import Link
from megalite.serve.messages import Hello, Leave, Step, Submit
from megalite.tools.benchmarks.fake_replica import FakeReplica
from megalite.tools.benchmarks.http_load import BadAnswer, Exchange, Server, exchange
from megalite.tools.benchmarks.serve import Bench, Figures, Load, line, percentile
from megalite.tools.benchmarks.serve_parts import measure_control

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
TEXTS = ["a", "", "data: b\n\n", "é" * 200]


def event(text: str, **more: object) -> bytes:
    return b"data: " + json.dumps({"choices": [{"text": text}], **more}).encode() + b"\n\n"


def streamed(tokens: int, texts: list[str]) -> bytes:
    events = [event(text) for text in texts]
    parts = [
        *events[:1],
        b"".join(events[1:]),
        event("", usage={"completion_tokens": tokens}) + b"data: [DONE]\n\n",
        b"",
    ]
    return HEAD + b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts if part) + b"0\r\n\r\n"


@settings(max_examples=50)
@given(st.lists(st.integers(0, 1000), max_size=8), st.sampled_from([TEXTS, ["x"], ["x", "y"] * 40]))
def test_a_stream_is_read_however_it_is_cut(cuts: list[int], texts: list[str]) -> None:
    data, one = streamed(9, texts), Exchange(1.0)
    places = sorted({0, len(data), *(cut % len(data) for cut in cuts)})
    one.pieces = [(2.0 + i, data[a:b]) for i, (a, b) in enumerate(zip(places, places[1:], strict=False))]
    answer = one.answered()
    assert answer.tokens == 9 and len(answer.times) == sum(map(bool, texts))
    assert answer.first >= 1.0 and answer.ended == one.pieces[-1][0] and all(gap >= 0 for gap in answer.gaps)
    assert list(answer.times) == sorted(answer.times)


def test_what_is_no_answer() -> None:
    for data, words in (
        (b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 4\r\n\r\nfull", "status 429: full"),
        (b"", "without an answer"),
        (HEAD + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n", "without text"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b'data: {"error": {"message": "lost"}}\n\n', "lost"),
    ):
        one = Exchange(0.0)
        one.pieces = [(1.0, data)] if data else []
        with pytest.raises(BadAnswer, match=words):
            one.answered()
    with pytest.raises(ConfigError, match="http://"):
        exchange("https://127.0.0.1", [b""], [0.0])


@contextmanager
def scripted() -> Iterator[str]:
    """The address of a server that answers every request with as many tokens as it asks for."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        listener.settimeout(PATIENCE)

        def serve() -> None:
            while True:
                with listener.accept()[0] as made, made.makefile("rb") as lines:
                    if not (asked := lines.readline()):
                        return
                    length = next(int(one[15:]) for one in lines if one.lower().startswith(b"content-length"))
                    assert asked == b"POST /v1/completions HTTP/1.1\r\n" and lines.readline() == b"\r\n"
                    body = json.loads(lines.read(length))
                    assert body["temperature"] == 0 and body["ignore_eos"]
                    if body.get("stream"):
                        made.sendall(streamed(body["max_tokens"], ["x"] * body["max_tokens"]))
                    else:
                        answer = json.dumps({"usage": {"completion_tokens": body["max_tokens"]}}).encode()
                        made.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(answer), answer))

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            socket.create_connection(listener.getsockname()).close()
            thread.join(PATIENCE)


def test_a_server_of_any_kind_is_measured() -> None:
    rows: list[dict[str, object]] = []
    with scripted() as url:
        bench = Bench(Load(requests=6, prompt=4, new=3), Server(url, "model"))
        reached = bench.at_once(2, rows.append)
        bench.arriving(200.0, rows.append)
    assert [row["what"] for row in rows] == ["HTTP", "HTTP, streamed", "200 requests/s"] and reached > 0
    assert "first_token_p99_ms" in rows[1] and "first_token_p50_ms" not in rows[0] and "of_offline" not in rows[0]
    assert line(rows[1]).count("|") == line(rows[0]).count("|")


def test_a_fake_replica_speaks_the_protocol() -> None:
    near, far = socket.socketpair()
    frames, messages = Frames.of_replica(), []
    replica = threading.Thread(target=lambda: FakeReplica(Link(near, patience=PATIENCE)).serve(0.0))
    replica.start()
    with far:
        for name, stream in (("a", True), ("b", False)):
            far.sendall(frame([Submit(request(id=name, max_tokens=3, stream=stream))]))
        while sum(len(one.outputs) for one in messages if isinstance(one, Step)) < 2:
            messages += frames.feed(far.recv(1 << 16))
        far.sendall(frame([Leave()]))
        replica.join(PATIENCE)
    assert not replica.is_alive() and isinstance(messages[0], Hello)
    steps = [one for one in messages if isinstance(one, Step)]
    deltas = [delta for one in steps for delta in one.deltas]
    [whole] = [one.outputs[0] for step in steps for one in step.outputs if one.request_id == "a"]
    assert {one.request_id for one in deltas} == {"a"} and deltas[-1].finish_reason == "length"
    assert "".join(one.text for one in deltas) == whole.text
    assert [token for one in deltas for token in one.token_ids] == whole.token_ids


@pytest.mark.parametrize("kind", ["offline", "whole", "streamed"])
def test_a_control_rank_without_a_device(kind: str) -> None:
    found = measure_control(Namespace(requests=4, prompt=20, new=24, rounds=1), kind, None)
    assert found["what"] == f"control rank, {kind}" and {"request_us", "token_us"} < found.keys()


def test_figures() -> None:
    assert [percentile(range(1, 101), share) for share in (50, 99, 100)] == [50, 99, 100] and percentile([7.0], 1) == 7
    offline, mine = (
        Figures("offline", rates=[100.0, 50.0, 100.0], cpu=[0.5] * 3),
        Figures("HTTP", rates=[95.0, 49.0, 90.0], cpu=[1.0] * 3),
    )
    assert mine.row(offline)["of_offline"] == 0.95 and mine.row(offline)["of_offline_cpu"] == 0.5
    arrivals = Load(1000, 1, 1).arrivals(10.0)
    assert arrivals == sorted(arrivals) and 80 < arrivals[-1] < 120
