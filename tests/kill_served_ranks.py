"""Bad days of a real server, one after another: `python tests/kill_served_ranks.py [section.key=value ...]`.

The demo model over dp=2 x tp=2, a few minutes on two cores. 20 streams run while a rank is killed, each rank in turn
and then both doors; while a rank is stopped; while clients leave; while the server is full; while it drains. Every
stream must be that of an undisturbed run. Says what it measured, and exits 1 if anything was not as promised.
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from serve_demo import Demo, demo
from served import after, stream

from megalite.run.processes import Process, descendants, die_with_parent

LAYOUT = ("parallel.dp=2", "parallel.tp=2", "server.balance=round_robin")
STREAMS, TOKENS = 20, 60
BODY = {"ignore_eos": True, "temperature": 0.8, "max_tokens": TOKENS}
PATIENCE = 600.0
problems: list[str] = []


def expect(fine: bool, what: str) -> None:
    print(f"{'as promised' if fine else 'NOT AS PROMISED'}: {what}", flush=True)
    if not fine:
        problems.append(what)


async def streams(http: httpx.AsyncClient, then: Callable[[], None] = lambda: None, at: int = 200) -> list[Any]:
    """All at once; `then` is called when so many events have come."""
    asked, heard = [{**BODY, "prompt": f"def f{seed}("} for seed in range(STREAMS)], after(at, then)
    return list(await asyncio.gather(*(stream(http, one, seed, heard) for seed, one in enumerate(asked))))


def doors(server: Demo) -> list[Process]:
    """The processes of the replicas, by when they were started."""
    found = [one for one in descendants(server.process.pid) if (p := one.parent()) and p.pid == server.process.pid]
    return sorted(found, key=lambda one: (one.start, one.pid))


def ranks(door: Process) -> list[Process]:
    return sorted(descendants(door.pid), key=lambda one: (one.start, one.pid))


async def run(server: Demo) -> None:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, limits=limits) as http:
        wanted = await streams(http)
        expect(all(len(one[1]) == TOKENS and one[2] == "length" for s in wanted for one in s), "20 streams are whole")
        for place in range(4):
            victim = ranks(doors(server)[0])[place % 2]  # the replica that was started first
            got = await streams(http, victim.kill)
            expect(got == wanted, f"a rank was killed, no token is lost or doubled ({place + 1})")
            await asyncio.to_thread(server.wait_ready)
        for place in range(2):
            got = await streams(http, doors(server)[0].kill)
            expect(got == wanted, f"a door was killed, no token is lost or doubled ({place + 1})")
            await asyncio.to_thread(server.wait_ready)
        restarts = sum(one["restarts"] for one in await asyncio.to_thread(server.replicas))
        expect(restarts == 6, f"replicas came back: {restarts} times")
        stopped = ranks(doors(server)[0])[1]
        began = time.monotonic()
        got = await streams(http, lambda: stopped.kill(signal.SIGSTOP))
        expect(got == wanted, f"a rank was stopped, no token is lost or doubled; {time.monotonic() - began:.1f} s")
        await asyncio.to_thread(server.wait_ready)
        for streamed in (True, False):
            await leave(server, http, streamed)
        await overload(server, http)
        server.process.send_signal(signal.SIGTERM)


async def leave(server: Demo, http: httpx.AsyncClient, streamed: bool) -> None:
    """A client goes away."""
    body = {**BODY, "prompt": "a", "n": 16, "max_tokens": 900, "stream": streamed}
    task = asyncio.create_task(http.post("/v1/completions", json=body))
    while not any(one["running"] for one in await asyncio.to_thread(server.replicas)):
        await asyncio.sleep(0.02)
    task.cancel()
    began = time.monotonic()
    while any(one["kv_usage"] for one in await asyncio.to_thread(server.replicas)):
        await asyncio.sleep(0.02)
    seconds = time.monotonic() - began
    what = "reads a stream" if streamed else "waits for an answer"
    expect(seconds < 1.0, f"a client that {what} left, its memory was free after {seconds:.2f} s")


SENDER = """
import http.client, sys
body = b'{"prompt": [' + b"1, " * 2_000_000 + b"1]}"
while True:
    connection = http.client.HTTPConnection(sys.argv[1])
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    print(connection.getresponse().status, flush=True)
"""
"""Sends bodies of 6 MB, one after another."""


async def overload(server: Demo, http: httpx.AsyncClient) -> None:
    """256 requests run and wait; one more is refused, and quickly, also while large bodies arrive."""
    asked = [{**BODY, "prompt": f"{number} times", "stream": True} for number in range(256)]
    for one in asked[:32]:
        one["max_tokens"] = 900  # they run first, and none of the others ends before it is measured
    tasks = [asyncio.create_task(http.post("/v1/completions", json=one)) for one in asked]
    while sum(one["requests"] for one in await asyncio.to_thread(server.replicas)) < 256:
        await asyncio.sleep(0.05)
    await refused(server, http, "nothing else is sent")
    command = [sys.executable, "-c", SENDER, server.url.removeprefix("http://")]
    senders = [subprocess.Popen(command, stdout=subprocess.PIPE, preexec_fn=die_with_parent) for _ in range(3)]
    try:
        for sender in senders:
            assert sender.stdout is not None
            expect(await asyncio.to_thread(sender.stdout.readline) == b"429\n", "a body of 6 MB is refused with 429")
        await refused(server, http, "three clients send bodies of 6 MB")
    finally:
        for sender in senders:
            sender.kill()
    answers = await asyncio.gather(*tasks)
    expect(all(one.status_code == 200 and "[DONE]" in one.text for one in answers), "the 256 are whole")


async def refused(server: Demo, http: httpx.AsyncClient, what: str) -> None:
    """20 requests, one after another."""
    times, statuses, retry = [], set(), []
    for _ in range(20):
        began = time.monotonic()
        answer = await http.post("/v1/completions", json={**BODY, "prompt": "one more"})
        times.append(1000 * (time.monotonic() - began))
        statuses.add(answer.status_code)
        retry.append(int(answer.headers.get("retry-after", 0)))
    running = sum(one["requests"] for one in await asyncio.to_thread(server.replicas))
    middle = sorted(times)[len(times) // 2]
    expect(statuses == {429} and min(retry) >= 1, f"beside {running} requests others are refused with 429")
    expect(middle < 50, f"within {middle:.1f} ms in the median, {max(times):.1f} ms at most, while {what}")


async def drain(server: Demo) -> None:
    """Streams that run when the signal comes end as they would have."""
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE) as http:
        wanted = await streams(http)
        got = await streams(http, lambda: server.process.send_signal(signal.SIGTERM), at=50)
        expect(got == wanted, "streams that ran at SIGTERM are whole")


def main() -> int:
    more = sys.argv[1:]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bound = ("server.max_queued_requests=256", "server.restarts=20", "server.stall_timeout=60")
        with demo(folder, *LAYOUT, *bound, "distributed.peer_timeout=2", *more) as server:
            asyncio.run(run(server))
            code = server.process.wait(120)
            expect(code == 0, f"it ended with {code} after SIGTERM")
        with demo(folder, *LAYOUT, "server.drain_timeout=300", *more) as server:
            asyncio.run(drain(server))
            code = server.process.wait(120)
            expect(code == 0, f"it ended with {code} once they were")
        with demo(folder, *LAYOUT, *more) as server:
            left = descendants(server.process.pid)
            asyncio.run(at_once(server))
            code = server.process.wait(30)
            expect(code == 143, f"a second signal ended it with {code}")
            time.sleep(1.0)
            expect(not any(one.alive() for one in left), "and nothing of it is left")
    print(f"{len(problems)} problems")
    return 1 if problems else 0


async def at_once(server: Demo) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE) as http:
        task = asyncio.create_task(http.post("/v1/completions", json={**BODY, "prompt": "a", "max_tokens": 900}))
        while not any(one["running"] for one in await asyncio.to_thread(server.replicas)):
            await asyncio.sleep(0.02)
        server.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(1.0)
        server.process.send_signal(signal.SIGTERM)
        try:
            await task
        except httpx.HTTPError:
            pass


if __name__ == "__main__":
    sys.exit(main())
