"""Replicas as processes, without a model: their ends, restarts and connections, and the life of the HTTP process."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_replica import FakeEngine, expected
from forks import Forks, Program
from serve_program import make_request
from test_router import Told, check_whole, in_loop, read, request
from waiting import PATIENCE, wait_until

from megalite.config.schema import ServerSection
from megalite.inference.io.inputs import PromptLimits
from megalite.run.processes import Process
from megalite.serve.errors import RequestLost
from megalite.serve.fleet import Fleet
from megalite.serve.frames import NONCE_BYTES, frame, proof
from megalite.serve.messages import PASSED_ON
from megalite.serve.router import Router
from megalite.serve.server import AGAIN

HERE = Path(__file__).parent


def order(folder: Path, replica: int, start: int, **fault: Any) -> None:
    (folder / f"{replica}-{start}.json").write_text(json.dumps(fault))


def pids(folder: Path, replica: int) -> list[int]:
    """Of each start of a replica."""
    starts = len(list(folder.glob(f"{replica}-started-*")))
    return [int((folder / f"{replica}-started-{i}").read_text()) for i in range(1, starts + 1)]


@asynccontextmanager
async def running(
    folder: Path, replicas: int = 2, restarts: int = 5, *, hurried: bool = False
) -> AsyncIterator[tuple[Router, Fleet]]:
    """A fleet whose replicas were started; left in order. `hurried`: each says Hello before its start has returned."""
    limits = PromptLimits(tokenizer=None, vocab_size=1 << 16, max_model_len=1024)
    router = Router(ServerSection(balance="round_robin"), limits, replicas, Told())

    async def start(replica: int, path: str) -> asyncio.subprocess.Process:
        script = HERE / "fake_replica.py"
        process = await asyncio.create_subprocess_exec(
            sys.executable, script, folder, "--replica", str(replica), "--socket", path
        )
        if hurried:
            await until(lambda: fleet._doors[replica].early)
        return process

    fleet = Fleet(router, replicas, start, restarts=restarts, backoff=0.0)
    await fleet.listen(str(folder / "socket"))
    fleet.begin()
    try:
        yield router, fleet
    finally:
        await fleet.leave()


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not true():
            await asyncio.sleep(0.01)


async def all_ready(router: Router) -> None:
    await until(lambda: {one.state for one in router.replicas()} == {"ready"})


def test_each_replica_killed_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 streams over two replicas of which each dies, and one of them again: as an undisturbed run's."""
    # On a busy machine the last tokens of a replica may not be heard; then no request is to blame for all three.
    monkeypatch.setattr("megalite.serve.router.MOST_FRUITLESS", 3)
    for replica, start, steps in ((0, 1, 5), (1, 1, 15), (0, 2, 5)):
        order(tmp_path, replica, start, dies=steps)

    async def test() -> None:
        async with running(tmp_path) as (router, _):
            await all_ready(router)
            asked = [request(f"s{i:02d}", tokens=60, n=1 + i % 2) for i in range(20)]
            streams = router.submit_all(asked)
            for one, got in zip(asked, await asyncio.gather(*map(read, streams)), strict=True):
                check_whole(one, *got)
            await until(lambda: len(pids(tmp_path, 0)) >= 2 and len(pids(tmp_path, 1)) >= 2)
        assert not any(Process.of(pid) for replica in (0, 1) for pid in pids(tmp_path, replica))

    asyncio.run(test())


def test_a_replica_that_is_ready_before_its_process_is_known(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path, hurried=True) as (router, _):
            await all_ready(router)
            check_whole(one := request("soon", tokens=10), *await read(router.submit(one)))
            assert [replica.restarts for replica in router.replicas()] == [0, 0]

    asyncio.run(test())


def test_a_replica_that_stalls_is_killed_and_started_again(tmp_path: Path) -> None:
    order(tmp_path, 0, 1, stalls=3)

    async def test() -> None:
        async with running(tmp_path, 1) as (router, fleet):
            await all_ready(router)
            stream = router.submit(one := request("still", tokens=10))
            first: list[int] = []
            while len(first) < 3:
                first += (await anext(stream)).token_ids
            fleet.stalls(0)
            tokens, _, output = await read(stream)
            assert first + tokens[0] == expected(one)[0]
            assert output.outputs[0].token_ids == expected(one)[0]
            old, _ = pids(tmp_path, 0)
            assert Process.of(old) is None
            assert router.replicas()[0].restarts == 1

    asyncio.run(test())


def test_restarts_used_up(tmp_path: Path) -> None:
    for start in (1, 2):
        order(tmp_path, 0, start, dies=start)

    async def test() -> None:
        async with running(tmp_path, 1, restarts=1) as (router, fleet):
            await all_ready(router)
            stream = router.submit(request("lost", tokens=10))
            with pytest.raises(RequestLost):
                await stream.result()
            assert await fleet.over == 70
            assert router.replicas()[0].state == "ended" and len(pids(tmp_path, 0)) == 2

    asyncio.run(test())


@pytest.mark.parametrize(("code", "starts"), [(3, 1), (1, 3)])
def test_what_cannot_start(tmp_path: Path, code: int, starts: int) -> None:
    """A checkpoint that is damaged is so the next time too; what crashed is tried again."""
    for start in range(1, 4):
        order(tmp_path, 0, start, exit=code)

    async def test() -> None:
        async with running(tmp_path, 1, restarts=2) as (router, fleet):
            assert await fleet.over == (code if code == 3 else 70)
            assert not router.healthy and len(pids(tmp_path, 0)) == starts

    asyncio.run(test())


def test_only_its_own_replicas_may_connect(tmp_path: Path) -> None:
    order(tmp_path, 0, 1, stalls=0)

    async def test() -> None:
        async with running(tmp_path, 1) as (router, _):
            reader, writer = await asyncio.open_unix_connection(tmp_path / "socket")
            writer.write(frame([FakeEngine(0).hello]))
            assert await reader.read() == b""
            reader, writer = await asyncio.open_unix_connection(tmp_path / "socket")
            writer.write(b"\xff" * 100)
            assert await reader.read() == b""
            await all_ready(router)

    asyncio.run(test())


@in_loop
async def test_ranks_of_a_launcher_prove_that_they_know_the_token() -> None:
    limits = PromptLimits(tokenizer=None, vocab_size=1 << 16, max_model_len=1024)
    router = Router(ServerSection(), limits, 2, Told())
    fleet = Fleet(router, 2, None, restarts=5)
    here, there = socket.socketpair()
    with here, there, socket.socket(socket.AF_UNIX) as unix, socket.create_server(("127.0.0.1", 0)) as tcp:
        unix.bind("")  # a name that the kernel finds
        unix.listen()
        await fleet.listen(unix, tcp, b"secret")
        fleet.begin()
        writers = []
        for token in (b"guessed", b"secret"):
            reader, writer = await asyncio.open_connection(*tcp.getsockname())
            nonce = await reader.readexactly(NONCE_BYTES)
            writer.write(proof(token, nonce) + frame([FakeEngine(1).hello]))
            writers.append(writer)
            if token == b"guessed":
                assert await reader.read() == b""
        _, writer = await asyncio.open_unix_connection(unix.getsockname())
        writer.write(frame([FakeEngine(0).hello]))
        await all_ready(router)
        writer.close()  # the loss of one is the end of all
        assert await fleet.over == 70
        assert not router.healthy
        for one in writers:
            one.close()
        await fleet.leave()


# ---- the HTTP process


class Served:
    """A server that runs as a program."""

    def __init__(self, forks: Forks, folder: Path, dp: int = 1, **section: Any):
        self.folder = folder
        self.program: Program = forks.start(
            HERE / "serve_program.py", folder, dp, json.dumps(section), preload=("megalite.serve.server", "fastapi")
        )
        wait_until(lambda: "\n" in self.program.out, "its address")
        self.client = httpx.Client(base_url=self.program.out.split()[0], timeout=PATIENCE)
        wait_until(lambda: set(self.state()["replicas"]) == {"ready"}, "its replicas")

    def state(self) -> Any:
        return self.client.get("/state").json()

    def stream(self, name: str, tokens: int) -> Iterator[Any]:
        with self.client.stream("GET", f"/stream?id={name}&tokens={tokens}") as response:
            yield response.status_code
            for line in response.iter_lines():
                yield json.loads(line)

    def replicas(self) -> list[int]:
        return [pid for replica in (0, 1) for pid in pids(self.folder, replica)]


def test_draining(forks: Forks, tmp_path: Path) -> None:
    """What runs goes on to its end, nothing new is taken, and everything ends with 0; also where a launcher's signal
    comes a second time, passed on by rank 0."""
    order(tmp_path, 0, 1, waits=str(tmp_path / "go"))
    served = Served(forks, tmp_path, drain_timeout=PATIENCE)
    lines = served.stream("ends", 30)
    assert next(lines) == 200
    got = [next(lines)]
    served.program.signal(signal.SIGTERM)
    wait_until(lambda: served.state()["state"] == "draining", "its draining")
    late = time.monotonic() + 1.1 * AGAIN
    while time.monotonic() < late:  # one at least would count as a second signal
        served.program.signal(PASSED_ON)
        time.sleep(0.05)
    served.program.signal(PASSED_ON)
    refused = served.client.get("/stream?id=new&tokens=3")
    assert refused.status_code == 503 and refused.json()["retry_after"] == PATIENCE
    (tmp_path / "go").touch()
    *rest, end = lines
    tokens = [token for line in got + rest for token in line["tokens"]]
    assert [tokens] == expected(make_request("ends", 30)) == [end["all"]]
    assert served.program.ended().code == 0
    assert not any(map(Process.of, served.replicas()))


def test_what_does_not_end_in_time_is_aborted(forks: Forks, tmp_path: Path) -> None:
    order(tmp_path, 0, 1, slow=True)
    served = Served(forks, tmp_path, drain_timeout=0.0)
    lines = served.stream("long", 100_000)
    assert next(lines) == 200
    first = next(lines)
    served.program.signal(PASSED_ON)
    *rest, end = lines
    assert rest[-1]["reason"] == "abort"
    assert end["all"] == [token for line in [first, *rest] for token in line["tokens"]]
    assert served.program.ended().code == 0


def test_a_second_signal_ends_at_once(forks: Forks, tmp_path: Path) -> None:
    for replica in (0, 1):  # whichever gets the request
        order(tmp_path, replica, 1, stalls=2)
    served = Served(forks, tmp_path, 2, drain_timeout=PATIENCE)
    lines = served.stream("still", 10)
    assert next(lines) == 200
    served.program.signal(signal.SIGTERM)
    wait_until(lambda: served.state()["state"] == "draining", "its draining")
    while served.program.runs:  # until one comes late enough to count as a second
        served.program.signal(signal.SIGTERM)
        time.sleep(0.05)
    ended = served.program.ended()
    assert ended.code == 143, ended.err
    wait_until(lambda: not any(map(Process.of, served.replicas())), "the end of the replicas")


def test_no_replica_left(forks: Forks, tmp_path: Path) -> None:
    order(tmp_path, 0, 1, dies=2)
    served = Served(forks, tmp_path, restarts=0, drain_timeout=10 * PATIENCE)  # for which it does not wait
    status, *got = served.stream("lost", 10)
    assert status == 200 and sum(len(line["tokens"]) for line in got[:-1]) == 2
    assert "no replica is left" in got[-1]["error"]
    ended = served.program.ended()
    assert ended.code == 70 and "replica 0 was lost" in ended.err and "exit code 137" in ended.err


def test_all_stall(forks: Forks, tmp_path: Path) -> None:
    order(tmp_path, 0, 1, stalls=2)
    served = Served(forks, tmp_path, stall_timeout=1.0)
    _, *got = served.stream("still", 10)
    assert "stall" in got[-1]["error"]
    ended = served.program.ended()
    assert ended.code == 70 and "no replica has finished a step for 1 s" in ended.err
    assert not any(map(Process.of, served.replicas()))


def test_replicas_do_not_outlive_the_http_process(forks: Forks, tmp_path: Path) -> None:
    served = Served(forks, tmp_path)
    served.program.signal(signal.SIGKILL)
    assert served.program.ended().code == -signal.SIGKILL
    wait_until(lambda: not any(map(Process.of, served.replicas())), "the end of the replica")
