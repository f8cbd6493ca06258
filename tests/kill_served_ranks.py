"""Bad days of a real server, one after another: `python tests/kill_served_ranks.py [section.key=value ...]`.

The demo model over dp=2 x tp=2, a few minutes on two cores. 20 streams run while a rank is killed, each rank in turn
and then both doors; while a rank is stopped; while clients leave; while the server is full; while it drains. Every
stream must be that of an undisturbed run. Says what it measured, and exits 1 if anything was not as promised.
"""

from __future__ import annotations

import asyncio
import json
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
address, path, begin, part, times, end = sys.argv[1:]
body = (begin + part * int(times) + end).encode()
while True:
    connection = http.client.HTTPConnection(address)
    connection.request("POST", path, body, {"Content-Type": "application/json"})
    print(connection.getresponse().status, flush=True)
"""
"""Sends a large body, again and again."""

LARGE = {
    "8 MB of token ids": ("/v1/completions", '{"prompt": [', "1, ", "2660000", "1]}"),
    "1 MB of text": ("/v1/completions", '{"prompt": "', "a b ", "250000", '"}'),
    "6 MB of text to tokenise": ("/tokenize", '{"prompt": "', "a b ", "1500000", '"}'),
    "8 MB of token ids to read": ("/detokenize", '{"tokens": [', "1, ", "2660000", "1]}"),
}


async def overload(server: Demo, http: httpx.AsyncClient) -> None:
    """255 requests run and wait, and 256 may: two more are refused, and quickly, also while the server reads large
    bodies of others; then 256, so that large bodies are refused before they are read."""
    tasks = []
    for count, tokens in ((32, 900), (223, TOKENS)):  # while the first run, none of the others does
        for number in range(count):
            body = {**BODY, "prompt": f"{number} times", "stream": True, "max_tokens": tokens}
            tasks.append(asyncio.create_task(http.post("/v1/completions", json=body)))
        await running(server, len(tasks))
    await refused(server, 2, "nothing else is sent")
    for what in LARGE:
        await beside(server, 2, {what}, {200, 400})
    tasks.append(asyncio.create_task(http.post("/v1/completions", json={**BODY, "prompt": "the last", "stream": True})))
    await running(server, 256)
    await beside(server, 1, set(LARGE), {429})
    answers = await asyncio.gather(*tasks)
    expect(all(one.status_code == 200 and "[DONE]" in one.text for one in answers), "the 256 are whole")


async def running(server: Demo, count: int) -> None:
    while sum(one["requests"] for one in await asyncio.to_thread(server.replicas)) < count:
        await asyncio.sleep(0.05)


async def beside(server: Demo, count: int, what: set[str], wanted: set[int]) -> None:
    """`refused`, while clients send these large bodies and are answered with one of the statuses `wanted`."""
    address = server.url.removeprefix("http://")
    senders = [
        subprocess.Popen(
            [sys.executable, "-c", SENDER, address, *LARGE[one]], stdout=subprocess.PIPE, preexec_fn=die_with_parent
        )
        for one in what
    ]
    try:
        firsts = []
        for sender in senders:
            assert sender.stdout is not None
            firsts.append(int(await asyncio.to_thread(sender.stdout.readline)))
        names = " and ".join(sorted(what))
        expect(set(firsts) <= wanted, f"{names}: answered with {firsts}")
        await refused(server, count, f"a client each sends {names}")
    finally:
        for sender in senders:
            sender.kill()
            sender.wait()


PROBE = """
import http.client, json, sys, time
address, server, count = sys.argv[1], *map(int, sys.argv[2:])

def lines():  # seconds that the first thread of the server, and this client, stood in line for a processor
    return [int(open(f"/proc/{one}/schedstat").read().split()[1]) / 1e9 for one in (server, "self")]

body = json.dumps({"prompt": ["one more"] * count})
for _ in range(20):
    connection = http.client.HTTPConnection(address)
    connection.connect()
    before, began = lines(), time.monotonic()
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    answer.read()
    seconds = time.monotonic() - began
    waited = max(now - then for now, then in zip(lines(), before))
    print(json.dumps([answer.status, int(answer.getheader("Retry-After", 0)), seconds, seconds - waited]))
    connection.close()
"""
"""20 requests, one after another: status, Retry-After, and seconds until the answer, by the clock and without the time
for which the server or this client, whichever waited longer, stood in line for a processor: the ranks and the other
clients want all of them, and on a core of its own the server would not have waited."""


async def refused(server: Demo, count: int, what: str) -> None:
    """Requests with `count` prompts are refused, and quickly."""
    address, pid = server.url.removeprefix("http://"), server.process.pid
    command = [sys.executable, "-c", PROBE, address, str(pid), str(count)]
    said = (await asyncio.to_thread(subprocess.run, command, stdout=subprocess.PIPE, check=True)).stdout
    statuses, retry, clock, honest = zip(*map(json.loads, said.splitlines()), strict=True)
    busy = sum(one["requests"] for one in await asyncio.to_thread(server.replicas))
    expect(set(statuses) == {429} and min(retry) >= 1, f"beside {busy} requests others are refused with 429")
    middle, most = (1000 * found for found in (sorted(honest)[10], max(honest)))
    by_clock = f"by the clock {1000 * sorted(clock)[10]:.1f} and {1000 * max(clock):.1f} ms"
    expect(middle < 50, f"within {middle:.1f} ms in the median, {most:.1f} ms at most ({by_clock}), while {what}")


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
