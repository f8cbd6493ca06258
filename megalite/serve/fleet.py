"""The replicas as processes: starts them, accepts their connections, notices their end, starts them again. Torch-free.

    HTTP process --starts--> door (run.launcher) --starts--> ranks of one replica
         ^------------ unix socket, frames of messages ------------ its control rank

Ranks of a launcher only connect here (`start` is None); then the loss of one is the end of all, as with any launcher.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
import traceback
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from hmac import compare_digest
from typing import cast

import msgspec

from megalite.errors import EXIT_CHECKPOINT, EXIT_CONFIG, EXIT_CRASH, EXIT_RANK_LOST, EXIT_RESOURCES
from megalite.monitor.words import format_count, wrapped
from megalite.run.processes import Process, descendants
from megalite.serve.frames import NONCE_BYTES, Frames, frame, proof
from megalite.serve.messages import FromReplica, Hello, Leave, Step, ToReplica
from megalite.serve.router import Router

Start = Callable[[int, str], Awaitable[asyncio.subprocess.Process]]
"""Starts a replica, by its number, which connects to the unix socket at a path."""

SAY_HELLO = 30.0
"""Seconds within which who connects must have said Hello."""
LEFTOVERS = 3.0
"""Seconds that a replica has to end by itself once its connection is gone."""
LEAVING = 10.0
"""Seconds that the replicas have to end in order."""
KILLED = 5.0
"""Seconds for killed processes to vanish."""
HOUR = 3600.0
LONGEST_BACKOFF = 30.0
HOPELESS = (EXIT_CONFIG, EXIT_CHECKPOINT, EXIT_RESOURCES)
"""Exit codes of a replica's first start that the next one would give too."""


class Link(asyncio.Protocol):
    """The HTTP process's end of a connection."""

    def __init__(self, fleet: Fleet, token: bytes | None):
        """`token`: the run's, which the other end must prove to know; None: nobody else can connect."""
        self._fleet, self._token = fleet, token
        self._nonce = os.urandom(NONCE_BYTES)
        self._proof = b""
        self._frames = Frames.of_replica()
        self._transport: asyncio.Transport | None = None
        self._unsent: list[ToReplica] = []
        self.door: _Door | None = None
        """Whose it is, once it has said so."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its type
        if self._token is not None:
            self._transport.write(self._nonce)
        asyncio.get_running_loop().call_later(SAY_HELLO, lambda: None if self.door else self.close())

    def data_received(self, data: bytes) -> None:
        if self._token is not None and len(self._proof) < NONCE_BYTES:
            missing = NONCE_BYTES - len(self._proof)
            self._proof, data = self._proof + data[:missing], data[missing:]
            if len(self._proof) < NONCE_BYTES:
                return
            if not compare_digest(self._proof, proof(self._token, self._nonce)):
                self.close()
                return
        self.take(self._frames.feed(data))

    def take(self, messages: Iterable[FromReplica]) -> None:
        """Do what these say; where one can't be read, or was not to be expected, the connection is closed."""
        try:
            for message in messages:
                self._received(message)
        except (ValueError, msgspec.MsgspecError) as error:
            self._fleet.say(f"warning: a connection is closed that sent what none of us sends ({error})")
            self.close()

    def _received(self, message: FromReplica) -> None:
        """ValueError: it was not to be expected."""
        if self._transport is None or self._transport.is_closing():
            return
        if self.door is not None and isinstance(message, Step):
            self._fleet.router.received(self.door.replica, message)
        elif self.door is None and isinstance(message, Hello):
            self._fleet.greeted(self, message)
        else:
            raise ValueError("Hello comes first, and once")

    def send(self, messages: Sequence[ToReplica]) -> None:
        """In order; all of one turn of the event loop are one frame and one write."""
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self._flush)
        self._unsent += messages

    def _flush(self) -> None:
        messages, self._unsent = self._unsent, []
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame(messages))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        if self.door is not None:
            self.door.is_gone("its connection ended")


class _Door:
    """One start of a replica, and what is known of it."""

    def __init__(self, replica: int, process: asyncio.subprocess.Process | None):
        self.replica, self.process = replica, process
        self.began = time.monotonic()
        self.early: list[tuple[Link, Hello]] | None = None
        """Who has said Hello; None: it is known which process was started, so that they are answered."""
        self.link: Link | None = None
        self.ranks: list[Process] = []
        """The processes that it had started when it said Hello."""
        self.gone: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """How it was lost."""
        self.stalls = False
        """It does nothing, and won't end by itself."""

    def is_gone(self, how: str) -> None:
        if not self.gone.done():
            self.gone.set_result(how)

    def processes(self) -> list[Process]:
        """What lives of it, the door first."""
        if self.process is None or self.process.returncode is not None:
            return [rank for rank in self.ranks if rank.alive()]
        door = Process.of(self.process.pid)
        found = [*([door] if door else []), *descendants(self.process.pid)]
        return found + [rank for rank in self.ranks if rank.alive() and rank not in found]


class Fleet:
    """Keeps `count` replicas running for a router."""

    def __init__(self, router: Router, count: int, start: Start | None, *, restarts: int, backoff: float = 1.0):
        """`restarts`: of a replica within an hour; `backoff`: seconds before the second of them, doubled each time."""
        self.router = router
        self.over: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        """The exit code, when no replica is left, or they can't be started."""
        self._start, self._restarts, self._backoff = start, restarts, backoff
        self._doors: dict[int, _Door] = {}
        """The current start of each replica."""
        self._count = count
        self._keepers: list[asyncio.Task[None]] = []
        self._servers: list[asyncio.Server] = []
        self._path = ""
        """Path of the unix socket, where it was made here."""
        self._leaving = asyncio.Event()
        self._was_whole = False
        """All replicas have been ready."""

    def say(self, line: str) -> None:
        sys.stderr.write(f"{wrapped(line)}\n")
        sys.stderr.flush()

    # ---- connections

    async def listen(self, unix: socket.socket | str, tcp: socket.socket | None = None, token: bytes = b"") -> None:
        """Accept replicas at a unix socket, or at the path of one to be made, and at a TCP socket with a token."""
        loop = asyncio.get_running_loop()
        where = {"path": unix} if isinstance(unix, str) else {"sock": unix}
        self._path = unix if isinstance(unix, str) else self._path
        self._servers.append(await loop.create_unix_server(lambda: Link(self, None), **where))
        if tcp is not None:
            self._servers.append(await loop.create_server(lambda: Link(self, token), sock=tcp))

    def greeted(self, link: Link, hello: Hello) -> None:
        """A replica says that it is ready. ValueError: it is none that is awaited."""
        door = self._doors.get(hello.replica)
        if door is None or door.link is not None or door.gone.done():
            raise ValueError(f"replica {hello.replica} is not awaited")
        if door.early is not None:
            door.early.append((link, hello))
            return
        if door.process is not None:
            door.ranks = descendants(door.process.pid)
            if hello.pid not in [door.process.pid, *(rank.pid for rank in door.ranks)]:
                raise ValueError(f"process {hello.pid} is none of replica {hello.replica}")
        door.link, link.door = link, door
        blocks = format_count(hello.num_kv_blocks, "KV block")
        after = f" after {time.monotonic() - door.began:.1f} s" if door.process is not None else ""
        self.say(
            f"replica {hello.replica} is ready{after}: {hello.dtype} on {hello.device}, max_model_len "
            f"{hello.max_model_len}, {blocks} of {hello.block_size} tokens"
        )
        self.router.joined(hello, link.send)
        self._was_whole = self._was_whole or all(
            one in self._doors and self._doors[one].link for one in range(self._count)
        )

    # ---- processes

    def begin(self) -> None:
        """Start all replicas, or wait for their connections."""
        for replica in range(self._count):
            keep = self._keep(replica, self._start) if self._start else self._await(replica)
            keeper = asyncio.create_task(keep)
            keeper.add_done_callback(self._kept)
            self._keepers.append(keeper)

    def _kept(self, keeper: asyncio.Task[None]) -> None:
        """What must not happen, but must not stay hidden either."""
        if not keeper.cancelled() and (error := keeper.exception()) is not None:
            traceback.print_exception(error)
            self._end(EXIT_CRASH)

    def stalls(self, replica: int) -> None:
        """Count a replica as lost because it finishes no step."""
        if replica in self._doors:
            self._doors[replica].stalls = True
            self._doors[replica].is_gone("it finished no step")

    async def _await(self, replica: int) -> None:
        """A replica that somebody else has started."""
        door = self._doors[replica] = _Door(replica, None)
        how = await door.gone
        if not self._leaving.is_set():
            self.say(f"replica {replica} was lost: {how}")
            self.router.fail_all(f"replica {replica} was lost")
            self._end(EXIT_RANK_LOST)

    async def _keep(self, replica: int, start: Start) -> None:
        """Start a replica again whenever it is lost, as often as is allowed."""
        restarts: deque[float] = deque()
        while True:
            door = await self._begin(replica, start)
            how = await door.gone
            if self._leaving.is_set():
                await self._remove(door)
                return
            while restarts and restarts[0] < time.monotonic() - HOUR:
                restarts.popleft()
            again = len(restarts) < self._restarts
            moved = self.router.lost(replica, again=again)
            code = await self._remove(door)
            hopeless = code in HOPELESS and not self._was_whole
            again = again and not hopeless and not self._leaving.is_set()
            self.say(
                f"replica {replica} was lost: {how}, exit code {code}"
                + (f"; {format_count(moved, 'request')} will go on" if moved else "")
                + ("; it is started again" if again else "; it is not started again")
            )
            if hopeless:
                self.router.fail_all(f"replica {replica} can't be started")
            if self.router.state == "lost":
                self._end(code if hopeless else EXIT_RANK_LOST)
            if not again:
                return
            with suppress(TimeoutError):
                pause = min(LONGEST_BACKOFF, self._backoff * (2 ** len(restarts) // 2))
                await asyncio.wait_for(self._leaving.wait(), pause)
                return
            restarts.append(time.monotonic())
            self.router.restarting(replica)

    async def _begin(self, replica: int, start: Start) -> _Door:
        early: list[tuple[Link, Hello]] = []
        door = self._doors[replica] = _Door(replica, None)
        door.early = early
        try:
            door.process = process = await start(replica, self._path)
        except OSError as error:
            door.is_gone(f"it can't be started ({error.strerror})")
            return door
        ended = asyncio.create_task(process.wait())
        ended.add_done_callback(lambda _: door.is_gone("it ended"))
        door.early = None
        for link, hello in early:
            link.take([hello])
        return door

    async def _remove(self, door: _Door) -> int:
        """Wait until all of a replica's processes have ended, after some time by force; its exit code."""
        if door.process is not None and not door.stalls:
            with suppress(TimeoutError):
                await asyncio.wait_for(door.process.wait(), LEAVING if self._leaving.is_set() else LEFTOVERS)
        if door.link is not None:
            door.link.close()
        end = time.monotonic() + KILLED
        while (left := door.processes()) and time.monotonic() < end:
            kill(left)
            await asyncio.sleep(0.02)
        if door.process is None:
            return EXIT_RESOURCES
        code = EXIT_RANK_LOST if left else await door.process.wait()
        return code if code >= 0 else 128 - code  # as a shell gives it

    def _end(self, code: int) -> None:
        if not self.over.done():
            self.over.set_result(code)

    # ---- the end

    async def leave(self, *, at_once: bool = False) -> None:
        """End all replicas in order, by force after LEAVING seconds, or `at_once`."""
        self._leaving.set()
        if at_once:
            self.kill_all()
        for door in self._doors.values():
            if door.link is not None:
                door.link.send([Leave()])
            else:  # it has not begun
                kill(door.processes())
        waiting = [keeper for keeper in self._keepers if not keeper.done()]
        if waiting:
            await asyncio.wait(waiting, timeout=LEAVING)
        for keeper in waiting:
            keeper.cancel()
        for server in self._servers:
            server.close()
        self.kill_all()

    def kill_all(self) -> None:
        kill([process for door in self._doors.values() for process in door.processes()])


def kill(processes: Sequence[Process]) -> None:
    """Kill all; they are stopped first, so that none sees another die and complains."""
    for signum in (signal.SIGSTOP, signal.SIGKILL):
        for process in processes:
            process.kill(signum)
